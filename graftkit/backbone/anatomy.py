"""Kinds of modules: linear layers, convolutions, norms, additions. See `graftkit.backbone.parts` for their roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from graftkit.backbone.walk import modules_of

Q_NAMES = {"q", "query", "q_proj", "q_lin", "to_q", "wq", "query_proj", "q_linear"}
BY_WEIGHT = {"WavLMAttention"}  # pass the weights of their linear layers to `multi_head_attention_forward`
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
    """One module with its own parameters, where a method may attach."""

    name: str
    module: nn.Module
    role: (
        str  # q, k, v, o, qkv, up, gate, down, linear, conv, experts, norm, embedding, head, pooler or other
    )
    block: int | None  # index of its block; None outside the blocks
    called: bool = True  # False if its parent multiplies by its weight instead

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters(recurse=False))


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: `nn.Linear`, or the `Conv1D` of GPT-2 with W transposed.

    The output projection of `nn.MultiheadAttention` does not count: its weight is used, but it is never called. Nor does
    a router of experts, which returns more than the product.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear) or "router" in type(module).__name__.lower():
        return False
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_uncalled(parent: nn.Module, name: str, module: nn.Module) -> bool:
    """Return whether the module `parent.name` is never called because its parent multiplies by its weight: the output
    projection of `nn.MultiheadAttention`, and projections of classes that pass all weights to torch's function."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return True
    return type(parent).__name__ in BY_WEIGHT and is_linear(module) and name.endswith("_proj")


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weight is stored (in, out), as in the `Conv1D` of GPT-2."""
    return type(module).__name__ == "Conv1D"


def features(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear layer."""
    if isinstance(module, nn.Linear):  # not the shape of its weight, which may be packed
        return module.in_features, module.out_features
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(rows), int(columns)) if is_transposed(module) else (int(columns), int(rows))  # type: ignore[arg-type]


def is_conv(module: nn.Module) -> bool:
    """Return whether a module is a convolution in one to three dimensions."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_map(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, a convolution, or an `nn.MultiheadAttention`."""
    return is_linear(module) or is_conv(module) or isinstance(module, nn.MultiheadAttention)


def holds_experts(module: nn.Module) -> bool:
    """Return whether a module stores the matrices of several experts as one parameter (experts, out, in)."""
    return "expert" in type(module).__name__.lower() and any(
        parameter.dim() == 3 for parameter in module.parameters(recurse=False)
    )


def holds_query(name: str, module: nn.Module) -> bool:
    """Return whether a module with this name computes the queries of an attention."""
    named = name.rpartition(".")[2].lower() in Q_NAMES | QKV_NAMES
    return isinstance(module, nn.MultiheadAttention) or (named and (is_linear(module) or is_conv(module)))


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm, by its class name, as many models have their own classes."""
    return "norm" in type(module).__name__.lower()


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for each module that no method added."""
    added: set[nn.Module] = set()
    for name, module in modules_of(model).items():
        if isinstance(module, Added):
            added |= set(modules_of(module).values())
        if module not in added:
            yield name, module


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module keeps running statistics of its input, as BatchNorm does."""
    return getattr(module, "running_mean", None) is not None
