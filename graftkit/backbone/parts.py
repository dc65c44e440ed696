"""Find the parts of a model from its modules instead of a table of model names.

Inside a block (see `graftkit.backbone.blocks`) the attention is the child that holds a query projection; other linear
layers are feed-forward. Names of layers (`query`, `q_proj`, `c_attn`, ...) are those common in the field,
not of one model.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from graftkit.backbone.anatomy import (
    Q_NAMES,
    QKV_NAMES,
    Site,
    base_modules,
    features,
    holds_experts,
    holds_query,
    is_conv,
    is_linear,
    is_map,
    is_norm,
    is_uncalled,
)
from graftkit.backbone.blocks import find_blocks
from graftkit.backbone.walk import modules_of

K_NAMES = {"k", "key", "k_proj", "k_lin", "to_k", "wk", "key_proj", "k_linear"}
V_NAMES = {"v", "value", "v_proj", "v_lin", "to_v", "wv", "value_proj", "v_linear"}
O_NAMES = {"o", "o_proj", "out_proj", "out_lin", "wo", "to_out", "dense", "c_proj", "proj", "out", "fc_out"}
GATE_NAMES = {"gate", "gate_proj", "w1", "wi_0"}
HEAD_NAMES = {"classifier", "score", "lm_head", "qa_outputs", "head", "fc", "cls", "projector"}


def find_sites(model: nn.Module) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """Return all sites of a model in definition order, and the names of its blocks."""
    blocks, base = find_blocks(model), _base_of(model)
    classifiers = _classifiers_of_timm(model)
    poolers = tuple(f"{name}." for name, module in modules_of(model).items() if _is_pooler(name, module))
    owner = {name: index for index, (name, _) in enumerate(blocks)}
    attention = [_attention_parts(block) for _, block in blocks]
    sites = []
    for name, module in base_modules(model):
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        block = next(
            (i for prefix, i in owner.items() if name == prefix or name.startswith(prefix + ".")), None
        )
        if block is None:
            in_pooler = f"{name}.".startswith(poolers)
            role = "pooler" if in_pooler else _outside_role(base, classifiers, name, module)
        else:
            role = _inside_role(name[len(blocks[block][0]) + 1 :], module, attention[block])
        parent, _, leaf = name.rpartition(".")
        called = not is_uncalled(model.get_submodule(parent), leaf, module)
        sites.append(Site(name, module, role, block, called))
    return tuple(_with_last_as_head(model, sites)), tuple(name for name, _ in blocks)


def _with_last_as_head(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Mark the last layer after the blocks of a user's own module as its head."""
    if any(site.role == "head" for site in sites) or hasattr(model, "base_model_prefix"):
        return sites
    maps = [i for i, site in enumerate(sites) if is_map(site.module)]
    if maps and sites[maps[-1]].block is None:
        last = sites[maps[-1]]
        sites[maps[-1]] = Site(last.name, last.module, "head", None)
    return sites


def _classifiers_of_timm(model: nn.Module) -> tuple[str, ...]:
    """Return timm's names for a model's classifier, which lies inside the base that transformers' wrapper holds."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else model
    about = getattr(base, "pretrained_cfg", None)
    names = about.get("classifier") if isinstance(about, dict) else None
    names = (names,) if isinstance(names, str) else tuple(names or ())
    return tuple(f"{prefix}.{name}" if prefix else name for name in names)


def _attention_parts(block: nn.Module) -> tuple[str, ...]:
    """Return the relative names of attention modules in a block: the outermost one around each query projection."""
    modules = modules_of(block)
    parts: list[str] = []
    for name, module in modules.items():
        if not holds_query(name, module) or any(name.startswith(f"{part}.") for part in parts):
            continue
        part = name if isinstance(module, nn.MultiheadAttention) else name.rpartition(".")[0]
        while outer := part.rpartition(".")[0]:
            if not any(word in type(modules[outer]).__name__.lower() for word in ("attention", "attn")):
                break
            part = outer
        if part:
            parts.append(part)
    return tuple(parts)


def _inside_role(relative: str, module: nn.Module, attention: tuple[str, ...]) -> str:
    leaf = relative.rsplit(".", 1)[-1].lower()
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.MultiheadAttention):
        return "qkv"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "o"
    if holds_experts(module):
        return "experts"
    if not is_linear(module) and not is_conv(module):
        return "other"
    for names, role in ((Q_NAMES, "q"), (K_NAMES, "k"), (V_NAMES, "v"), (QKV_NAMES, "qkv")):
        if leaf in names:
            return role
    if is_conv(module):
        return "conv"
    if any(relative.startswith(f"{part}.") for part in attention):
        return "o" if leaf in O_NAMES else "linear"
    if not attention and leaf in O_NAMES and leaf not in ("dense", "c_proj", "proj", "out"):
        return "o"
    if leaf in GATE_NAMES:
        return "gate"
    inputs, outputs = features(module)
    if inputs == outputs:
        return "linear"
    return "up" if outputs > inputs else "down"


def _base_of(model: nn.Module) -> str:
    """Return the name of the bare model inside one with a head, or ''. A bare model, as `AutoModel` makes it, may have
    its encoder under that name."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        return ""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    kinds = ((names,) if isinstance(names, str) else names for names in MODEL_MAPPING_NAMES.values())
    return "" if any(type(model).__name__ in names for names in kinds) else prefix


def _is_pooler(name: str, module: nn.Module) -> bool:
    """Return whether a module pools states, by its name or a class such as `SiglipMultiheadAttentionPoolingHead`."""
    kind = type(module).__name__.lower()
    return name.rpartition(".")[2] == "pooler" or kind.endswith(("pooler", "poolinghead"))


def _outside_role(base: str, classifiers: tuple[str, ...], name: str, module: nn.Module) -> str:
    parts = name.lower().split(".")
    if name in classifiers or (base and not f"{name}.".startswith(f"{base}.")):
        return "head"
    if isinstance(module, nn.Embedding) or any("embed" in part for part in parts):
        return "norm" if is_norm(module) else "embedding"
    if is_norm(module):
        return "norm"
    if not base and parts[-1] in HEAD_NAMES and is_linear(module):
        return "head"
    if is_conv(module):
        return "conv"
    return "linear" if is_linear(module) else "other"
