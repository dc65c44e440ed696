"""LoRA: a low-rank update beside a linear map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.weights import Weight
from graftkit.catalogue import option
from graftkit.methods.base import Group, PeftForm, exactly, multiply, new_parameter
from graftkit.methods.updates import Update, UpdateMethod

if TYPE_CHECKING:
    from graftkit.peft_files import PeftReading

# ways to start that rewrite the base's weights
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRA(UpdateMethod):
    """Low-rank update s B A beside each chosen linear map: W x + s B (A x), with s = alpha / rank.

    Hu et al. 2021, 'LoRA: Low-Rank Adaptation of Large Language Models', equation 3. A is drawn as
    `nn.Linear` draws its weight, B is zero, so that training starts at the base model exactly.
    Parameters: rank * (in + out) for each map.
    """

    peft_types = ("LORA",)
    kinds = ("linear", "transposed")

    rank: int = option(8, "rank of the update", at_least=1)
    sites: str = option("all-linear", "linear maps that are adapted, as a selection")
    alpha: float | None = option(None, "scale times rank; null means 2 * rank, a scale of 2", above=0)
    dropout: float = option(0.0, "dropout on the input of A", at_least=0, below=1)
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def group(self) -> Group:
        return Group("added", self.lr or 1e-3, self.name, self.lr is not None)

    def make(self, weight: Weight, name: str) -> LowRank:
        return LowRank(weight, self.rank, self.scale, self.dropout)

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm:
        sites = [site for site, _ in self.targets(backbone)]
        tensors = {}
        for site, weight in self.targets(backbone):
            added: Any = self.update_at(weight, graft)
            tensors[f"base_model.model.{site.name}.lora_A.weight"] = added.A
            tensors[f"base_model.model.{site.name}.lora_B.weight"] = added.B
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.scale * self.rank,
            "lora_dropout": self.dropout,
            "target_modules": [site.name for site in sites],
            "fan_in_fan_out": any(weight.kind == "transposed" for _, weight in self.targets(backbone)),
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


class LowRank(Update):
    """A (rank, in) and B (out, rank), both fp32."""

    def __init__(self, weight: Weight, rank: int, scale: float, dropout: float) -> None:
        super().__init__(weight)
        outputs, inputs = weight.shape
        self.A = new_parameter(rank, inputs)
        self.B = new_parameter(outputs, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def delta(self, weight: Weight) -> Tensor:
        return self.scale * (self.B.float() @ self.A.float())

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        low = multiply(self.dropout(args[0]), self.A)
        return output + (multiply(low, self.B) * self.scale).to(output.dtype)
