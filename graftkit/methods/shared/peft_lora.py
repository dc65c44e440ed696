"""Read and write PEFT's LoRA: names of tensors, ranks and alphas by pattern, biases, attention and experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.walk import parameters_of
from graftkit.backbone.weights import Weight, has_geometry
from graftkit.methods.base import PeftForm, exactly
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.methods.shared.updates import by_site, peft_targets
from graftkit.recipe.catalogue import entry_name

if TYPE_CHECKING:
    from graftkit.methods.shared.low_rank import LowRankMethod

# initialisations that rewrite the base's weights
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# order in which modules of experts hold their parameters; PEFT nests them in this order
EXPERTS_ORDER = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")
OUT_PROJ = ".base_layer.out_proj"  # of a `nn.MultiheadAttention`, below its wrapper
# the last version of PEFT that applies the update of this projection twice in a forward pass (peft#3774)
TWICE_UP_TO = (0, 21)
NAMES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "b", "lora_embedding_A": "A",
         "lora_embedding_B": "B", "lora_magnitude_vector": "m"}  # fmt: skip


def write(
    method: LowRankMethod, backbone: Backbone, graft: str, *, with_magnitudes: bool = False
) -> PeftForm | None:
    """Return an equivalent PEFT adapter; None if PEFT has none. `with_magnitudes`: it is a DoRA."""
    named = {name: weight for name, (_, weight) in method.named(backbone).items()}
    sizes = {name: method.peft_size(*size) for name, size in method.sizes(backbone).items()}
    rank, alpha = method.peft_size(method.rank, method.alpha_at(method.rank))
    whole = {"packed", "experts"} & {weight.kind for weight in named.values()}
    if not _is_expressible(method, named) or (with_magnitudes and whole):
        return None
    tensors: dict[str, Tensor] = {}
    modules, parameters, wrapped = [], [], {}
    ranks, alphas = {}, {}
    for name, weight in named.items():
        owner = name[: -len(weight.parameter) - 1]
        path, key = _path(owner, weight, named), owner
        if weight.kind == "experts":
            parameters.append(key := name)
        else:
            modules.append(owner)
            wrapped[owner] = path
        update: Any = method.update_at(weight, graft)
        tensors |= {f"base_model.model.{path}.{k}": tensor for k, tensor in update.peft_tensors().items()}
        if weight.kind == "packed":  # PEFT always updates both projections of an attention
            wrapped[f"{owner}.out_proj"] = path + OUT_PROJ
            width = weight.shape[1]
            tensors[f"base_model.model.{path}{OUT_PROJ}.lora_A.weight"] = torch.zeros(sizes[name][0], width)
            tensors[f"base_model.model.{path}{OUT_PROJ}.lora_B.weight"] = torch.zeros(width, sizes[name][0])
        if sizes[name][0] != rank:
            ranks[f"^{re.escape(key)}"] = sizes[name][0]
        if sizes[name][1] != alpha:
            alphas[f"^{re.escape(key)}"] = _whole(sizes[name][1])
    base = parameters_of(backbone.model)
    for name in method.biases(backbone):
        owner = name.rpartition(".")[0]
        path = f"{wrapped[owner]}.base_layer" if owner in wrapped else owner
        tensors[f"base_model.model.{path}.bias"] = base[name]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0 if parameters else method.dropout,
        "target_modules": peft_targets(backbone, modules),
        "fan_in_fan_out": any(weight.kind == "transposed" for weight in named.values()),
        "bias": method.bias,
    }
    more = {
        "use_dora": with_magnitudes,
        "use_rslora": method.use_rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_bias": method.lora_bias,
        "target_parameters": parameters,
    }
    return PeftForm(config | {key: value for key, value in more.items() if value}, tensors)


def _is_expressible(method: LowRankMethod, named: dict[str, Weight]) -> bool:
    kinds = {weight.kind for weight in named.values()}
    if "experts" in kinds and ("transposed" in kinds or method.lora_bias):  # PEFT supports only one of them
        return False
    for name, weight in named.items():
        if name == weight.parameter:  # PEFT replaces modules, but not the model itself
            return False
        if has_geometry(weight) and not method.peft_conv:
            return False
        if weight.kind == "packed" and weight.parameter != "in_proj_weight":  # see TWICE_UP_TO
            return False
    return True


def _path(owner: str, weight: Weight, named: dict[str, Weight]) -> str:
    """Return where PEFT puts the tensors of a weight: below the module, or below the wrappers around it."""
    if weight.kind != "experts":
        return owner
    beside = [p for p, _ in weight.module.named_parameters(recurse=False) if f"{owner}.{p}" in named]
    return owner + ".base_layer" * (len(beside) - 1 - beside.index(weight.parameter))


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def has_magnitudes(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration of PEFT's LoRA is that of a DoRA."""
    return bool(config.get("use_dora"))


def read(
    reading: PeftReading, kind: type, *, with_magnitudes: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options and parameters of the method that is equivalent to a PEFT adapter."""
    method = entry_name(kind.__module__)
    rank = reading.field("r", 8, int)
    alpha = reading.field("lora_alpha", 8, (int, float))
    if rank < 1 or alpha <= 0:
        raise reading.error(f"r is {rank} and lora_alpha is {alpha}; both must be above 0.")
    start = reading.field("init_lora_weights", True)
    if str(start).lower().startswith(CHANGES_BASE):
        raise reading.error(
            f"init_lora_weights={start!r} rewrote the base's weights, which graftkit does not read. Save it with "
            "PEFT's path_initial_model_for_weight_conversion, which converts it to a plain LoRA."
        )
    reading.ignore("fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
    reading.ignore("use_dora")  # already used to find the method
    bias = reading.field("bias", "none", str)
    found, keys = _tensors(reading, method, with_magnitudes)
    options: dict[str, Any] = {
        "rank": rank,
        "alpha": float(alpha),
        "sites": exactly(site for sites in keys.values() for site in sites),
        "dropout": float(reading.field("lora_dropout", 0.0, (int, float))),
        "use_rslora": bool(reading.field("use_rslora", False)),
        "rank_pattern": by_site(reading, "rank_pattern", keys),
        "alpha_pattern": by_site(reading, "alpha_pattern", keys),
    }
    if any("_out_proj_default." in name for name in found) and _applies_twice(reading):
        options["alpha_pattern"] = _doubled(options["alpha_pattern"] or {}, float(alpha), method, found)
    if bias != "none":
        options["bias"] = bias
        found |= _biases(reading)
    if reading.field("lora_bias", False):
        if with_magnitudes:
            raise reading.error(
                "lora_bias together with use_dora is not read by graftkit; train without one of them."
            )
        options["lora_bias"] = True
    if any(name.endswith(".A") and tensor[:1, :1].numel() > 1 for name, tensor in found.items()):
        options["peft_conv"] = True
    return {key: value for key, value in options.items() if value is not None and value is not False}, found


def _tensors(
    reading: PeftReading, method: str, with_magnitudes: bool
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return the parameters by our names, and for each name that PEFT matches patterns against, its sites."""
    has_bias = reading.field("lora_bias", False)
    absent = {
        key for key, name in NAMES.items() if (name == "m") > with_magnitudes or (name == "b") > has_bias
    }
    taken = reading.take(rf"(.+)\.({'|'.join(map(re.escape, NAMES.keys() - absent))})")
    outputs = {match[1] for match in taken if match[1].endswith(OUT_PROJ)}
    parameters = reading.names("target_parameters")
    found: dict[str, Tensor] = {}
    keys: dict[str, list[str]] = {}
    for match, tensor in taken.items():
        path = match[1]
        module, depth = re.fullmatch(r"(.+?)((?:\.base_layer)*)", path).groups()  # type: ignore[union-attr]
        held = _held(module, parameters)
        key, site, part = module, module, ""
        if path in outputs:
            key = module = path.removesuffix(OUT_PROJ)
            site, part = f"{module}.out_proj", "out_proj_"
        elif f"{path}{OUT_PROJ}" in outputs:
            part = "in_proj_weight_"
        elif held:
            parameter = held[-1 - depth.count(".")] if depth.count(".") < len(held) else ""
            key, part = f"{module}.{parameter}", f"{parameter}_".removeprefix("weight_")
            site = key if part else module
        found[f"{module}.{method}_{part}default.{NAMES[match[2]]}"] = tensor
        keys.setdefault(key, []).append(site)
    # PEFT also saves the whole weight of an embedding that it targets
    for match in reading.take(r"(.+)\.base_layer\.weight"):
        if match[1] not in keys:
            raise reading.error(f"{match[0]!r} belongs to a module without an adapter.")
    return found, keys


def _applies_twice(reading: PeftReading) -> bool:
    version = re.match(r"(\d+)\.(\d+)", str(reading.field("peft_version")))
    return version is None or tuple(map(int, version.groups())) <= TWICE_UP_TO


def _doubled(alphas: dict[str, float], alpha: float, method: str, found: Iterable[str]) -> dict[str, float]:
    """Return `alphas` with doubled values for the output projections of attentions."""
    doubled: dict[float, list[str]] = {}
    for name in found:
        module, is_output, _ = name.partition(f".{method}_out_proj_default.")
        if is_output:
            own = [
                a for selection, a in alphas.items() if re.fullmatch(selection.removeprefix("re:"), module)
            ]
            doubled.setdefault(2 * (own or [alpha])[-1], []).append(f"{module}.out_proj")
    return alphas | {exactly(sites): value for value, sites in doubled.items()}


def _held(module: str, parameters: Iterable[str]) -> list[str]:
    """Return the names of the parameters of a module that PEFT targets, in the order in which it wraps them."""
    held = [
        target.rpartition(".")[2]
        for target in parameters
        if f".{module}".endswith(f".{target.rpartition('.')[0]}")
    ]
    return sorted(
        dict.fromkeys(held),
        key=lambda p: EXPERTS_ORDER.index(p) if p in EXPERTS_ORDER else len(EXPERTS_ORDER),
    )


def _biases(reading: PeftReading) -> dict[str, Tensor]:
    """Return the biases of the base, except those of modules that PEFT saves as a whole."""
    saved = [rf"(.*\.)?{re.escape(name)}(\..*)?" for name in reading.names("modules_to_save")]
    reading.take(r"(.+\.)?(original_module|modules_to_save)\..+")  # duplicates of saved modules
    found = {}
    for match, tensor in reading.take(r"(?:(.+)\.)?bias").items():
        owner = (match[1] or "").replace(".base_layer", "")
        if any(re.fullmatch(pattern, owner) for pattern in saved):
            reading.tensors[match[0]] = tensor
        else:
            found[f"{owner}.bias".lstrip(".")] = tensor
    return found
