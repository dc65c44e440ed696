"""What the parts of a model are, found from its modules rather than from a table of model names.

A *block* is one element of the largest outermost `nn.ModuleList` of like modules. Inside a block the
attention part is the child that holds a query map; what else is linear there is feed-forward. Names of maps
(`query`, `q_proj`, `c_attn` ...) are the vocabulary of the field, not of one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Q_NAMES = {"q", "query", "q_proj", "q_lin", "to_q", "wq", "query_proj", "q_linear"}
K_NAMES = {"k", "key", "k_proj", "k_lin", "to_k", "wk", "key_proj", "k_linear"}
V_NAMES = {"v", "value", "v_proj", "v_lin", "to_v", "wv", "value_proj", "v_linear"}
QKV_NAMES = {"qkv", "qkv_proj", "c_attn", "query_key_value", "in_proj", "wqkv", "attn_qkv"}
O_NAMES = {"o", "o_proj", "out_proj", "out_lin", "wo", "to_out", "dense", "c_proj", "proj", "out", "fc_out"}
GATE_NAMES = {"gate", "gate_proj", "w1", "wi_0"}
HEAD_NAMES = {"classifier", "score", "lm_head", "qa_outputs", "head", "fc", "cls", "projector"}


class Added(nn.Module):
    """What a method adds below a module of a model: no part of the base, so its anatomy passes it by.

    `graft`: name of the graft that it belongs to, set by `attach`. Inactive, it leaves the model as it was.
    """

    active = True
    survives_fold = False
    graft = ""


@dataclass(frozen=True)
class Site:
    """One module that holds parameters of its own: where a method may attach."""

    name: str
    module: nn.Module
    role: str  # q, k, v, o, qkv, up, gate, down, linear, norm, embedding, head, pooler or other
    block: int | None  # index of its block; None outside of the blocks

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters(recurse=False))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a map x W + b: `nn.Linear`, or the `Conv1D` of GPT-2 with W transposed.

    The output map of `nn.MultiheadAttention` is none: its weight is used, but it is never called.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored (in, out), as the `Conv1D` of GPT-2 does."""
    return type(module).__name__ == "Conv1D"


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear map."""
    if isinstance(module, nn.Linear):  # not the shape of its weight, which may be packed
        return module.in_features, module.out_features
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(rows), int(columns)) if is_transposed(module) else (int(columns), int(rows))  # type: ignore[arg-type]


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm of any model, BatchNorm, GroupNorm: told by the class name, as models bring their own."""
    return "norm" in type(module).__name__.lower()


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of each block in order: the largest outermost list of modules of one class."""
    best: list[tuple[str, nn.Module]] = []
    best_size = 0
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or name.startswith(inside or ("\0",)):
            continue
        if len({type(child) for child in module}) != 1 or not any(is_linear(m) for m in module.modules()):
            continue
        inside += (f"{name}.",)
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > best_size:
            best = [(f"{name}.{index}", child) for index, child in enumerate(module)]
            best_size = size
    return best


def find_sites(model: nn.Module) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """All sites of a model in definition order, and the names of its blocks."""
    blocks = find_blocks(model)
    owner = {name: index for index, (name, _) in enumerate(blocks)}
    attention = [_attention_part(block) for _, block in blocks]
    sites = []
    for name, module in base_modules(model):
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        block = next(
            (i for prefix, i in owner.items() if name == prefix or name.startswith(prefix + ".")), None
        )
        if block is None:
            role = _outside_role(model, name, module)
        else:
            role = _inside_role(name[len(blocks[block][0]) + 1 :], module, attention[block])
        sites.append(Site(name, module, role, block))
    if not any(site.role == "head" for site in sites) and not blocks:
        last = max((i for i, s in enumerate(sites) if is_linear(s.module)), default=None)
        if last is not None:  # a user's own module: its last linear map is its head
            sites[last] = Site(sites[last].name, sites[last].module, "head", None)
    return tuple(sites), tuple(name for name, _ in blocks)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each module that no method added."""
    added: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Added):
            added |= set(module.modules())
        if module not in added:
            yield name, module


def _attention_part(block: nn.Module) -> str | None:
    """Relative name of the part of a block that is attention: the outermost such module around the query map."""
    modules = dict(block.named_modules())
    for name, module in modules.items():
        if not (is_linear(module) and name.rpartition(".")[2].lower() in Q_NAMES | QKV_NAMES):
            continue
        part = name.rpartition(".")[0]
        while outer := part.rpartition(".")[0]:
            if not any(word in type(modules[outer]).__name__.lower() for word in ("attention", "attn")):
                break
            part = outer
        return part or None
    return None


def _inside_role(relative: str, module: nn.Module, attention: str | None) -> str:
    leaf = relative.rsplit(".", 1)[-1].lower()
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "other"
    if not is_linear(module):
        return "other"
    for names, role in ((Q_NAMES, "q"), (K_NAMES, "k"), (V_NAMES, "v"), (QKV_NAMES, "qkv")):
        if leaf in names:
            return role
    if attention is not None and relative.startswith(attention + "."):
        return "o" if leaf in O_NAMES else "linear"
    if attention is None and leaf in O_NAMES and leaf not in ("dense", "c_proj", "proj", "out"):
        return "o"
    if leaf in GATE_NAMES:
        return "gate"
    inputs, outputs = features(module)
    if inputs == outputs:
        return "linear"
    return "up" if outputs > inputs else "down"


def _outside_role(model: nn.Module, name: str, module: nn.Module) -> str:
    parts = name.lower().split(".")
    prefix = getattr(model, "base_model_prefix", "")
    has_base = bool(prefix) and hasattr(model, prefix)
    if "pooler" in parts:
        return "pooler"
    if has_base and not name.startswith(f"{prefix}."):
        return "head"
    if isinstance(module, nn.Embedding) or any("embed" in part for part in parts):
        return "norm" if is_norm(module) else "embedding"
    if is_norm(module):
        return "norm"
    if not has_base and parts[-1] in HEAD_NAMES and is_linear(module):
        return "head"
    return "linear" if is_linear(module) else "other"
