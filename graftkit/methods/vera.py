"""VeRA: two trained vectors around random matrices that all layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added
from graftkit.backbone.weights import Weight, input_of, multiply
from graftkit.methods.base import PeftForm, exactly, place
from graftkit.methods.shared.mixtures import FactorMixture
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.methods.shared.updates import MAPS, Update, UpdateMethod, peft_targets, refuse_rank
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class VeRA(UpdateMethod):
    """Train vectors b and d around frozen random matrices A and B that all layers share: W x + b * (B (d * (A x))).

    Kopiczko et al. 2024, 'VeRA: Vector-based Random Matrix Adaptation', equation 2. A (rank, widest input) and
    B (widest output, rank) are drawn once from `seed`, Kaiming uniform; a smaller layer uses their first columns and
    rows. b is zero at first, so training starts exactly at the base model. The weight of a convolution is treated as a
    matrix (out, in / groups * kernel).

    When: many grafts of one backbone are stored, and each must be small; with `save_projection: false` a graft's
    folder contains only the vectors.
    Parameters: rank + out for each weight, times the number of experts.
    """

    peft_types = ("VERA",)

    rank: int = option(256, "rank of the update, higher than that of lora", at_least=1)
    sites: str = option("all-linear", "layers to adapt, as a selection")
    d_initial: float = option(0.1, "initial value of each element of d")
    dropout: float = option(0.0, "dropout on the input of A", at_least=0, below=1)
    seed: int = option(0, "seed of the random matrices", at_least=0)
    save_projection: bool = option(
        True, "save the random matrices with the graft; false draws them again from seed"
    )
    lr: float | None = option(None, "learning rate; null means 0.02", above=0)

    def group(self) -> Group:
        return Group("added", self.lr or 2e-2, self.name, self.lr is not None)

    def make(self, weight: Weight, name: str) -> Vectors:
        return Vectors(weight, self.rank, self.d_initial, self.dropout)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        name, (_, widest) = max(self.named(backbone).items(), key=lambda item: min(flat_shape(item[1][1])))
        refuse_rank(self, self.rank, widest, name)
        labels = super().attach(backbone, graft)
        weights = [weight for _, weight in self.targets(backbone)]
        outputs, inputs = (max(sizes) for sizes in zip(*(flat_shape(weight) for weight in weights)))
        projections = Projections(self.rank, inputs, outputs, self.seed, self.save_projection)
        place(backbone.model, self.projections_name(graft), projections)
        for weight in weights:
            self.update_at(weight, graft).__dict__["projections"] = projections
        return labels

    def projections_name(self, graft: str) -> str:
        return f"{self.name}_projections_{graft}"

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        """Return PEFT's form, which exists for linear layers only."""
        targets = self.targets(backbone)
        if any(weight.kind not in MAPS or not site.name for site, weight in targets):
            return None
        tensors: dict[str, Tensor] = {}
        for site, weight in targets:
            added: Any = self.update_at(weight, graft)
            tensors[f"base_model.model.{site.name}.vera_lambda_b"] = added.b
            tensors[f"base_model.model.{site.name}.vera_lambda_d"] = added.d
        if self.save_projection:
            shared: Any = getattr(backbone.model, self.projections_name(graft))
            tensors |= {"base_model.vera_A": shared.A, "base_model.vera_B": shared.B}
        config: dict[str, Any] = {
            "peft_type": "VERA",
            "r": self.rank,
            "target_modules": peft_targets(backbone, [site.name for site, _ in targets]),
            "projection_prng_key": self.seed,
            "save_projection": self.save_projection,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "fan_in_fan_out": any(weight.kind == "transposed" for _, weight in targets),
            "bias": "none",
        }
        return PeftForm(config, tensors)

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rank = reading.field("r", 256, int)
        if rank < 1:
            raise reading.error(f"r is {rank}; it must be at least 1.")
        reading.ignore("fan_in_fan_out", "init_weights")
        saved = reading.field("save_projection", True, bool)
        names = {"b": "b", "d": "d"}
        tensors = {
            f"{key[1]}.vera_default.{names[key[2]]}": tensor
            for key, tensor in reading.take(r"(.+)\.vera_lambda_([bd])").items()
        }
        sites = exactly(name.partition(".vera_default")[0] for name in tensors)
        shared = {f"vera_projections_default.{key[1]}": t for key, t in reading.take(r"vera_([AB])").items()}
        if saved and len(shared) != 2:
            raise reading.error("save_projection is true, but vera_A or vera_B is missing from the tensors.")
        options = {
            "rank": rank,
            "sites": sites,
            "d_initial": float(reading.field("d_initial", 0.1, (int, float))),
            "dropout": float(reading.field("vera_dropout", 0.0, (int, float))),
            "seed": reading.field("projection_prng_key", 0, int),
            "save_projection": bool(shared),
        }
        return options, {**tensors, **shared}


def flat_shape(weight: Weight) -> tuple[int, int]:
    """Return (out, in) of one matrix: a convolution's kernel counts as input, experts count one by one."""
    shape = weight.shape[1:] if weight.kind == "experts" else weight.shape
    return shape[0], math.prod(shape[1:])


class Projections(Added):
    """A (rank, in) and B (out, rank) for all layers: random, frozen and fp32."""

    changes_outputs = False
    A: Tensor
    B: Tensor

    def __init__(self, rank: int, inputs: int, outputs: int, seed: int, kept: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            bound = math.sqrt(6 / shape[1])  # Kaiming's: variance 2 / columns
            values = torch.empty(shape)
            if not values.is_meta:
                values.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, values, persistent=kept)

    def forward(self, x: Any) -> Any:
        """Return x: a model that calls its children one after the other calls this one too."""
        return x


class Vectors(Update):
    """b (out) and d (rank), both fp32; (experts, out) and (experts, rank) if one parameter holds several matrices."""

    projections: Projections  # not a child: it belongs to the model

    def __init__(self, weight: Weight, rank: int, d_initial: float, dropout: float) -> None:
        super().__init__(weight)
        leading = weight.shape[:1] if weight.kind == "experts" else ()
        outputs, self.inputs = flat_shape(weight)
        self.b = nn.Parameter(torch.zeros(*leading, outputs))
        self.d = nn.Parameter(torch.full((*leading, rank), float(d_initial)))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return the parts of A (rank, in) and B (out, rank) that this layer uses."""
        return self.projections.A[:, : self.inputs], self.projections.B[: self.b.shape[-1]]

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        weight = members[0].of(site)
        if weight.kind not in ("linear", "transposed"):
            return super().mix(members, weights, site)
        pairs = [member.matrices() for member in members]
        factors = [(m.b.unsqueeze(1) * B * m.d, A) for m, (A, B) in zip(members, pairs)]
        return FactorMixture(weight, factors, weights)

    def delta(self, weight: Weight) -> Tensor:
        A, B = self.matrices()
        product = self.b.unsqueeze(-1) * (B @ (self.d.unsqueeze(-1) * A))
        return product.view(weight.shape)

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.kind not in MAPS:
            return super().after(site, args, kwargs, output)
        A, B = self.matrices()
        low = multiply(self.dropout(input_of(args, kwargs)), A) * self.d
        return output + (multiply(low, B) * self.b).to(output.dtype)
