"""Choose the number type to compute in by what is fast on the machine."""

from __future__ import annotations

import json
import time
from collections.abc import Container
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from graftkit.backbone.anatomy import has_statistics, is_linear
from graftkit.backbone.walk import parameters_of
from graftkit.engine.fp8 import refuse_fp8
from graftkit.engine.machine import cpu_name
from graftkit.files import special, write_json
from graftkit.optim.labels import Labels
from graftkit.recipe.environment import cache_folder

WORTHWHILE = 1.3  # how much faster a bf16 matrix product must be to be chosen
SIZE = 768
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose(wanted: str, device: torch.device) -> str:
    """Return the number type of products. On a CPU, 'auto' is measured once and cached in the user's cache folder.

    'auto' is fp32 or bf16. Raises `UserError` for fp8 on a device that has no such products.
    """
    if wanted == "fp8":
        refuse_fp8(device)
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if cpu_speedup() >= WORTHWHILE else "fp32"


def cpu_speedup() -> float:
    """Return how many times faster this CPU multiplies bf16 matrices than fp32 ones."""
    cache = cache_folder() / "machine.json"
    key = f"{cpu_name()} threads={torch.get_num_threads()} torch={torch.__version__}"
    try:
        known = {} if special(cache) else json.loads(cache.read_text(encoding="utf-8"))
        if key in known:
            return float(known[key])
    except (OSError, ValueError, TypeError, RecursionError):
        known = {}
    ratio = _measure(torch.float32) / _measure(torch.bfloat16)
    try:
        write_json(cache, {**(known if isinstance(known, dict) else {}), key: round(ratio, 2)})
    except Exception:
        pass  # without the cache, the next run measures again
    return ratio


def _measure(dtype: torch.dtype) -> float:
    left, right = torch.ones(SIZE, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times[2:])


def rounded_names(model: nn.Module, labels: Labels, weight_type: str) -> set[str]:
    """Return the trained parameters stored in bf16 and rounded stochastically: matrices of the backbone's own.

    Norms, biases and what a method adds have few values, and stay in fp32.
    """
    if weight_type != "bf16":
        return set()
    return {
        name
        for name, parameter in parameters_of(model).items()
        if name in labels and labels[name].role == "base" and parameter.dim() > 1
    }


def full_precision_names(model: nn.Module, trained: Container[str], rounded: Container[str] = ()) -> set[str]:
    """Return the parameters stored in fp32: trained ones but those in `rounded`, others in the same norm, and those of
    BatchNorm.

    A normalization needs its weight and bias in one type, and BatchNorm in that of its running statistics, which stay
    in fp32; linear layers and embeddings are cast by autocast.
    """
    names = set()
    for prefix, module in model.named_modules(remove_duplicate=True):
        own = [f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters(recurse=False)]
        kept = [name for name in own if name in trained and name not in rounded]
        whole = has_statistics(module) or (kept and not is_linear(module))
        names.update(own if whole else kept)
    return names


def cast(model: nn.Module, trained: Container[str], precision: str, rounded: Container[str] = ()) -> None:
    """Convert frozen parameters to the compute type and trained ones to fp32, or bf16 if in `rounded`, in place."""
    frozen = HALF.get(precision, torch.float32)
    full = full_precision_names(model, trained, rounded)
    for name, parameter in parameters_of(model).items():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(torch.float32 if name in full else frozen)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which to call the model."""
    if precision in HALF:
        return torch.autocast(device.type, dtype=HALF[precision])
    return nullcontext()


def with_tf32(device: torch.device, precision: str) -> bool:
    """Let a GPU that has TF32 use it where fp32 is computed, for the rest of the process; return whether it does.

    TF32 keeps the range of fp32 and 10 bits of the 23 of its fraction, in the inputs of products alone.
    """
    if device.type != "cuda" or precision != "fp32" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    torch.set_float32_matmul_precision("high")
    return True
