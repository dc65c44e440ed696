"""Backbones whose frozen maps are stored in four or eight bits (NF4, int8), by bitsandbytes."""

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
    """What `from_pretrained` is given to quantize a model while it is loaded. Raises `UserError` where it cannot be.

    NF4: Dettmers et al. (2023), QLoRA; int8: Dettmers et al. (2022), LLM.int8(). Embeddings, norms, the output map
    and the modules of `kept` stay as they are.
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
            f"quantize={kind!r}: {LIBRARY} {version} cannot compute on a CPU, and there is no CUDA device; take a newer "
            "one, or leave quantize out."
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
    """Keep bitsandbytes from casting biases in place in its forward pass, be they trained or frozen.

    It does so where a bias has another type than the input (int8), or than the layer computes in (NF4). Instead the
    layer computes in the type that its bias is held in, as autocast has an `nn.Linear` compute in one type.
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
    """Give the maps of a model without values the shapes and types that they have once they are quantized."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_linear(module) and module is not output and name not in kept:
            size = module.in_features * module.out_features
            shape = (size // 2, 1) if kind == "nf4" else (module.out_features, module.in_features)
            dtype = torch.uint8 if kind == "nf4" else torch.int8
            module.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def shape_of(module: nn.Module, name: str, parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter, of a quantized map that of the weight that it stands for."""
    if name == "weight" and isinstance(module, nn.Linear) and not parameter.dtype.is_floating_point:
        return module.out_features, module.in_features
    return tuple(parameter.shape)


def move(model: nn.Module, device: torch.device) -> None:
    """Put a model on a device; a quantized one is where it was loaded."""
    if not getattr(model, "is_quantized", False):
        model.to(device)
