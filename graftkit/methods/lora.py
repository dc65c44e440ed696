"""LoRA: a low-rank update beside a linear map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone, Site, select
from graftkit.backbone.anatomy import features, is_linear, is_transposed
from graftkit.catalogue import option
from graftkit.errors import NotFoldable
from graftkit.methods.base import (
    Addition,
    Group,
    Labels,
    Method,
    PeftForm,
    exactly,
    labels_of,
    multiply,
    new_parameter,
    place,
)

if TYPE_CHECKING:
    from graftkit.peft_files import PeftReading

# ways to start that rewrite the base's weights
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank update s B A beside each chosen linear map: W x + s B (A x), with s = alpha / rank.

    Hu et al. 2021, 'LoRA: Low-Rank Adaptation of Large Language Models', equation 3. A is drawn as
    `nn.Linear` draws its weight, B is zero, so that training starts at the base model exactly.
    Parameters: rank * (in + out) for each map.
    """

    peft_types = ("LORA",)

    rank: int = option(8, "rank of the update", at_least=1)
    sites: str = option("all-linear", "linear maps that are adapted, as a selection")
    alpha: float | None = option(None, "scale times rank; null means 2 * rank, a scale of 2", above=0)
    dropout: float = option(0.0, "dropout on the input of A", at_least=0, below=1)
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def targets(self, backbone: Backbone) -> list[Site]:
        return select(backbone, self.sites, lambda site: is_linear(site.module), "linear maps")

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        labels: Labels = {}
        group = Group("added", self.lr or 1e-3, self.name, self.lr is not None)
        for site in self.targets(backbone):
            inputs, outputs = features(site.module)
            name = f"lora_{graft}"
            place(site.module, name, LowRank(inputs, outputs, self.rank, self.scale, self.dropout))
            labels |= labels_of(backbone, f"{site.name}.{name}", group)
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        values = {}
        for site in self.targets(backbone):
            added = getattr(site.module, f"lora_{graft}")
            update = added.update()
            weight: Tensor = site.module.weight  # type: ignore[assignment]
            if not weight.dtype.is_floating_point:
                raise NotFoldable(
                    f"lora() cannot be folded into {site.name!r}, which is stored as {weight.dtype}. "
                    "Keep the graft folder, or fold it into the model before it is quantized."
                )
            update = update.T if is_transposed(site.module) else update
            values[f"{site.name}.weight"] = (weight.float() + update).to(weight.dtype)
        return values

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm:
        sites = self.targets(backbone)
        tensors = {}
        for site in sites:
            added = getattr(site.module, f"lora_{graft}")
            tensors[f"base_model.model.{site.name}.lora_A.weight"] = added.A
            tensors[f"base_model.model.{site.name}.lora_B.weight"] = added.B
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.scale * self.rank,
            "lora_dropout": self.dropout,
            "target_modules": [site.name for site in sites],
            "fan_in_fan_out": any(is_transposed(site.module) for site in sites),
            "bias": "none",
        }
        return PeftForm(config, tensors)

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rank = reading.field("r", 8, int)
        alpha = reading.field("lora_alpha", 8, (int, float))
        if rank < 1:
            raise reading.error(f"r is {rank}; it must be at least 1.")
        start = reading.field("init_lora_weights", True)
        if str(start).startswith(CHANGES_BASE):
            raise reading.error(
                f"init_lora_weights={start!r} rewrote the base's weights, which graftkit does not read."
            )
        reading.ignore("fan_in_fan_out")
        scale = alpha / (rank**0.5 if reading.field("use_rslora", False) else rank)
        tensors = {
            f"{key[1]}.lora_default.{key[2]}": tensor
            for key, tensor in reading.take(r"(.+)\.lora_([AB])\.weight").items()
        }
        options = {
            "rank": rank,
            "alpha": float(scale * rank),
            "sites": exactly(name.partition(".lora_default")[0] for name in tensors),
            "dropout": float(reading.field("lora_dropout", 0.0, (int, float))),
        }
        return options, tensors


class LowRank(Addition):
    """A (rank, in) and B (out, rank), both fp32."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.A = new_parameter(rank, inputs)
        self.B = new_parameter(outputs, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def update(self) -> Tensor:
        """s B A, (out, in)."""
        with torch.no_grad():
            return self.scale * (self.B.float() @ self.A.float())

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        low = multiply(self.dropout(args[0]), self.A)
        return output + (multiply(low, self.B) * self.scale).to(output.dtype)
