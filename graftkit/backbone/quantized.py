"""Backbones whose frozen linear layers are stored in four or eight bits (NF4, int8), by bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graftkit.backbone.anatomy import is_linear
from graftkit.errors import UserError
from graftkit.libraries import leave_unpacked

LIBRARY = "bitsandbytes"


def loading(kind: str, name: str, kept: Sequence[str] = ()) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that quantize a model while loading. Raises `UserError` if impossible.

    NF4: Dettmers et al. (2023), QLoRA; int8: Dettmers et al. (2022), LLM.int8(). Embeddings, norms, the output layer
    and the modules in `kept` are not quantized.
    """
    cuda = torch.cuda.is_available()
    if importlib.util.find_spec(LIBRARY) is None:
        raise UserError(
            f"quantize={kind!r} needs the library {LIBRARY}: pip install {LIBRARY}. Or leave quantize out."
        )
    library: Any = importlib.import_module(LIBRARY)
    if not cuda and "cpu" not in getattr(library, "supported_torch_devices", ()):
        version = getattr(library, "__version__", "")
        raise UserError(
            f"quantize={kind!r}: {LIBRARY} {version} cannot compute on a CPU, and there is no CUDA device; install a "
            "newer version, or leave quantize out."
        )
    import transformers

    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    settings: Any = transformers.BitsAndBytesConfig(
        load_in_4bit=kind == "nf4", load_in_8bit=kind == "int8", bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32, llm_int8_skip_modules=list(kept) or None,
    )  # fmt: skip
    where = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return {"quantization_config": settings, "device_map": {"": where}}


def keep_gradients(model: nn.Module) -> None:
    """Let maps of NF4 be computed on CPUs in the one way that has gradients.

    Where the CPU multiplies bf16, bitsandbytes packs a weight anew when it is first used in eval mode, for products
    without gradients, and leaves it so: after an evaluation nothing before that map would be trained.
    """
    module: Any
    for module in model.modules():
        leave_unpacked(module)


def keep_biases(model: nn.Module) -> None:
    """Keep bitsandbytes from casting biases, trained or frozen, in place in its forward pass.

    It does so if a bias has another dtype than the input (int8), or than the layer computes in (NF4). Instead, the
    layer computes in the dtype of its bias, as an `nn.Linear` under autocast computes in one dtype.
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Linear)
            and module.bias is not None
            and not module.weight.is_floating_point()
        ):
            module.register_forward_pre_hook(_in_type_of_bias)


def _in_type_of_bias(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    dtype = module.bias.dtype
    if hasattr(module, "compute_dtype"):
        module.compute_dtype, module.compute_type_is_set = dtype, True
    return args[0].to(dtype), *args[1:]


def with_shapes(model: nn.Module, kind: str, kept: Sequence[str] = ()) -> None:
    """Give the linear layers of a model on the meta device the shapes and dtypes that they have when quantized."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_linear(module) and module is not output and name not in kept:
            size = module.in_features * module.out_features
            shape = (size // 2, 1) if kind == "nf4" else (module.out_features, module.in_features)
            dtype = torch.uint8 if kind == "nf4" else torch.int8
            module.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def shape_of(module: nn.Module, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter; for a quantized layer, that of the original weight."""
    if name == "weight" and isinstance(module, nn.Linear) and not parameter.dtype.is_floating_point:
        return module.out_features, module.in_features
    return tuple(parameter.shape)


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device; a quantized one stays where it was loaded."""
    if not getattr(model, "is_quantized", False):
        model.to(device)
