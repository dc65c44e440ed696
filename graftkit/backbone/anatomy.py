"""What a module is: a map, a norm, something that a method added. See `graftkit.backbone.parts` for its role."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Q_NAMES = {"q", "query", "q_proj", "q_lin", "to_q", "wq", "query_proj", "q_linear"}
BY_WEIGHT = {"WavLMAttention"}  # use their maps by `multi_head_attention_forward`
QKV_NAMES = {"qkv", "qkv_proj", "c_attn", "query_key_value", "in_proj", "wqkv", "attn_qkv"}


class Added(nn.Module):
    """What a method adds below a module of a model: no part of the base, so its anatomy passes it by.

    `graft`: name of the graft that it belongs to, set by `attach`. Inactive, it leaves the model as it was.
    `changes_outputs`: False for one that only keeps what others use, or has a part in training alone.
    `lone`: there can be one active at a module, and no more.
    `ids_until`: at a word embedding, the id up to which (not included) tokens have a row because of it.
    `each_row_alone`: what it makes of a row of its input depends on no other row, and not on which row it is.
    """

    active = True
    survives_fold = False
    changes_outputs = True
    lone = False
    ids_until = 0
    each_row_alone = False
    graft = ""


@dataclass(frozen=True)
class Site:
    """One module that holds parameters of its own: where a method may attach."""

    name: str
    module: nn.Module
    role: (
        str  # q, k, v, o, qkv, up, gate, down, linear, conv, experts, norm, embedding, head, pooler or other
    )
    block: int | None  # index of its block; None outside of the blocks
    called: bool = True  # or its parent multiplies by its weight itself

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters(recurse=False))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a map x W + b: `nn.Linear`, or the `Conv1D` of GPT-2 with W transposed.

    The output map of `nn.MultiheadAttention` is none: its weight is used, but it is never called. Nor is a router of
    experts, which gives more than the product.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear) or "router" in type(module).__name__.lower():
        return False
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_uncalled(parent: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether the module `parent.name` is never called, since its parent multiplies by its weight itself: the output map
    of `nn.MultiheadAttention`, and the maps of those that hand all of their weights to torch's function for it."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return True
    return type(parent).__name__ in BY_WEIGHT and is_linear(module) and name.endswith("_proj")


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (in, out), as the `Conv1D` of GPT-2 does."""
    return type(module).__name__ == "Conv1D"


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear map."""
    if isinstance(module, nn.Linear):  # not the shape of its weight, which may be packed
        return module.in_features, module.out_features
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(rows), int(columns)) if is_transposed(module) else (int(columns), int(rows))  # type: ignore[arg-type]


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution, in one to three dimensions."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_map(module: nn.Module) -> bool:
    """A linear map, a convolution, or the joint map of `nn.MultiheadAttention`."""
    return is_linear(module) or is_conv(module) or isinstance(module, nn.MultiheadAttention)


def holds_experts(module: nn.Module) -> bool:
    """Whether the matrices of several experts are kept as one parameter (experts, out, in)."""
    return "expert" in type(module).__name__.lower() and any(
        parameter.dim() == 3 for parameter in module.parameters(recurse=False)
    )


def holds_query(name: str, module: nn.Module) -> bool:
    """Whether a module of that name makes the queries of an attention."""
    named = name.rpartition(".")[2].lower() in Q_NAMES | QKV_NAMES
    return isinstance(module, nn.MultiheadAttention) or (named and (is_linear(module) or is_conv(module)))


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm of any model, BatchNorm, GroupNorm: told by the class name, as models bring their own."""
    return "norm" in type(module).__name__.lower()


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each module that no method added."""
    added: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Added):
            added |= set(module.modules())
        if module not in added:
            yield name, module


def has_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics of what passes through it, as BatchNorm does."""
    return getattr(module, "running_mean", None) is not None
