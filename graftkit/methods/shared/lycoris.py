"""PEFT's format for LoHa and LoKr."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.methods.base import PeftForm, exactly
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.methods.shared.updates import SizedMethod, by_site, peft_targets
from graftkit.recipe.catalogue import entry_name


def write(
    method: SizedMethod, backbone: Backbone, graft: str, prefix: str, more: Mapping[str, Any]
) -> PeftForm | None:
    """Return an equivalent PEFT adapter; None if PEFT has none.

    PEFT supports `nn.Linear` and one- and two-dimensional convolutions with zero padding. `prefix` is prepended to the
    names of parameters; `more` is the rest of the configuration.
    """
    tensors: dict[str, Tensor] = {}
    modules, ranks, alphas = [], {}, {}
    sizes = method.sizes(backbone)
    alpha = method.alpha_at(method.rank)
    for name, (site, weight) in method.named(backbone).items():
        plain = weight.kind == "linear" or (weight.kind == "conv" and len(weight.shape) < 5)
        if not plain or not site.name or getattr(site.module, "padding_mode", "zeros") != "zeros":
            return None
        modules.append(site.name)
        for parameter_name, parameter in method.update_at(weight, graft).named_parameters():
            tensors[f"base_model.model.{site.name}.{prefix}{parameter_name}"] = parameter
        if sizes[name][0] != method.rank:
            ranks[f"^{re.escape(site.name)}"] = sizes[name][0]
        if sizes[name][1] != alpha:
            alphas[f"^{re.escape(site.name)}"] = sizes[name][1]
    config: dict[str, Any] = {
        "peft_type": method.peft_types[0],
        "r": method.rank,
        "alpha": alpha,
        "target_modules": peft_targets(backbone, modules),
    }
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return PeftForm(config | {k: v for k, v in patterns.items() if v} | dict(more), tensors)


def read(reading: PeftReading, kind: type, pattern: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options and parameters of a method; `pattern` matches the ends of its keys and captures parameter names.

    Dropout on parts of an update (`rank_dropout`, `module_dropout`) acts only in training and is ignored.
    """
    rank = reading.field("r", 8, int)
    alpha = reading.field("alpha", 8, (int, float))
    if rank < 1 or alpha <= 0:
        raise reading.error(f"r is {rank} and alpha is {alpha}; both must be above 0.")
    reading.ignore("init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout")
    found = reading.take(rf"(.+)\.{pattern}")
    modules = list(dict.fromkeys(match[1] for match in found))
    keys = {module: [module] for module in modules}
    options = {
        "rank": rank,
        "sites": exactly(modules),
        "alpha": float(alpha),
        "rank_pattern": by_site(reading, "rank_pattern", keys),
        "alpha_pattern": by_site(reading, "alpha_pattern", keys),
        "use_effective_conv2d": reading.field("use_effective_conv2d", False, bool),
    }
    tensors = {
        f"{match[1]}.{entry_name(kind.__module__)}_default.{match[2]}": tensor
        for match, tensor in found.items()
    }
    return options, tensors
