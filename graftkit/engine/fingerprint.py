"""What cached activations depend on: a key for the frozen prefix of a network, and a digest for each row.

Two runs with the same key compute the same activations for a row with the same digest, up to the rounding that other rows
of a batch cause. The key covers every byte of the weights before the point where a pass starts, and the code: versions of
the libraries, the structure of the modules, the files that define their classes, and the model's configuration.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor, nn

from graftkit.data.source import Pass
from graftkit.engine.forward import Forward, evaluating
from graftkit.engine.starts import Start
from graftkit.libraries import installed
from graftkit.tasks.base import Dataset

FORMAT = 1  # raised when equal inputs no longer give equal files
DIGEST = 16  # bytes of the digest of a row
# entries of a configuration that a frozen prefix does not depend on
IRRELEVANT = (
    "_name_or_path", "transformers_version", "use_cache", "architectures", "num_labels", "id2label", "label2id",
    "problem_type",
)  # fmt: skip


def key_of(plain: Forward, start: Start, dataset: Dataset) -> str | None:
    """Return the key of the prefix that ends at `start`, 32 hexadecimal digits; None if it cannot be told.

    That is so for quantized weights, whose scales are no parameters.
    """
    used = _used(plain, start, dataset)
    if any(not p.is_floating_point() for module in used.values() for p in module.parameters(recurse=False)):
        return None
    config: Any = getattr(plain.graft.model, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else {}
    about = {
        "format": FORMAT,
        "versions": _versions(),
        "place": start.place,
        "rows": f"{type(dataset).__module__}.{type(dataset).__qualname__} {dataset.uniform}",
        "precision": plain.precision,
        "device": _device(plain.device),
        "config": {name: value for name, value in entries.items() if name not in IRRELEVANT},
        "attention": getattr(config, "_attn_implementation", None),
        "modules": [(name, type(module).__qualname__, module.extra_repr()) for name, module in used.items()],
        "code": _code(used),
        "weights": _weights(used),
    }
    return _short(json.dumps(about, sort_keys=True, default=str).encode())


def digests_of(dataset: Dataset, seed: int) -> np.ndarray | None:
    """Return the digest of each row in each view, (views * rows, DIGEST) bytes; None if the rows have no identity."""
    passes = [Pass(seed, view) for view in range(dataset.views)]
    if not len(dataset) or dataset.identity(0, passes[0]) is None:
        return None
    digests = (
        hashlib.blake2b(dataset.identity(row, at) or b"", digest_size=DIGEST).digest()
        for at in passes for row in range(len(dataset))
    )  # fmt: skip
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST)


def _short(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST).hexdigest()


def _versions() -> dict[str, str | None]:
    pillow = getattr(sys.modules.get("PIL"), "__version__", "")
    return {
        "graftkit": installed("graftkit"), "torch": torch.__version__, "transformers": transformers.__version__,
        "numpy": np.__version__, "pillow": pillow,
    }  # fmt: skip


def _device(device: torch.device) -> str:
    """Return the kind of a device, without its number."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@torch.no_grad()
def _used(plain: Forward, start: Start, dataset: Dataset) -> dict[str, nn.Module]:
    """Return the modules that the prefix may use, by name: those defined before its end, and those that are called in a
    pass up to there."""
    model = plain.graft.model
    end = start.end
    names = [name for name, module in model.named_modules() if module is end]
    behind = {id(module) for module in end.modules()}
    called: set[int] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, _: called.add(id(module)))
        for module in model.modules() if id(module) not in behind
    ]  # fmt: skip
    try:
        with evaluating(model):
            start.capture(plain, dataset.batch(np.array([dataset.lengths.argmin()]), plain.device))
    finally:
        for handle in handles:
            handle.remove()
    found, before = {}, True
    for name, module in model.named_modules():
        before = before and name not in names
        if (before or id(module) in called or start.last) and id(module) not in behind:
            found[name] = module
    return found


def _code(used: dict[str, nn.Module]) -> dict[str, str]:
    """Return a digest of each file that defines the class of a module."""
    files = {module: getattr(sys.modules.get(module), "__file__", None) for module in
             sorted({type(one).__module__ for one in used.values()})}  # fmt: skip
    found = {}
    for module, file in files.items():
        try:
            found[module] = _short(Path(file).read_bytes()) if file else ""
        except OSError:  # in an archive
            found[module] = ""
    return found


def _weights(used: dict[str, nn.Module]) -> str:
    """Return a digest of every byte of the parameters and buffers of these modules."""
    found = xxhash.xxh3_128()
    for prefix, module in used.items():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in sorted(own, key=lambda pair: pair[0]):
            found.update(f"{prefix}.{name} {tensor.dtype} {list(tensor.shape)};".encode())
            if tensor.numel():
                found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
