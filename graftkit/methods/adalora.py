"""AdaLoRA: low-rank updates in the form of a singular value decomposition, with a rank budget for all weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.weights import Weight, input_of, multiply
from graftkit.errors import UserError
from graftkit.methods.base import PeftForm, exactly, new_parameter
from graftkit.methods.shared.mixtures import FactorMixture
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.methods.shared.updates import MAPS, Update, UpdateMethod, peft_targets, refuse_rank
from graftkit.optim.labels import Group
from graftkit.recipe.catalogue import option

DIVISOR = 1e-5  # the authors' code and PEFT add this to the rank before dividing by it


@dataclass(frozen=True)
class AdaLoRA(UpdateMethod):
    """Add a low-rank update W x + s B (E * (A x)) and prune its least important triplets in training; s = alpha / rank.

    Zhang et al. 2023, 'Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning', equations 3 to 12. A triplet is
    a row of A, its singular value in E and its column of B. The importance of a parameter is |parameter * gradient|
    smoothed over steps, times its smoothed uncertainty; that of a triplet is the importance of the singular value plus
    the mean importances of row and column. Each weight starts with `rank` triplets. Between step `warmup_steps` and
    `final_steps` before the end, their number falls to `target_rank` on average, with the cube of the remaining time;
    the singular values of pruned triplets are set to zero. A and B are kept close to orthogonal: the loss grows by
    `orthogonality` times the mean of ||A A' - 1|| and ||B' B - 1|| (Frobenius norms, as in the authors' code; equation
    4 has their squares). E is zero at first, so training starts exactly at the base model. The weight of a convolution
    is treated as a matrix (out, in / groups * kernel).

    In your own training loop, add `graft.extra_loss()` to the loss and call `graft.after_step(step, steps)` after each
    optimizer step; otherwise the ranks do not change. If the best weights of a run are those of an earlier evaluation,
    they have the ranks of that step.

    When: it is not clear which weights need how much rank, and the run is long enough to find out.
    Parameters: rank * (in + out + 1) for each weight, times the number of experts.
    """

    peft_types = ("ADALORA",)

    rank: int = option(12, "initial rank of each update", at_least=1)
    target_rank: int = option(8, "mean rank at the end", at_least=1)
    sites: str = option("all-linear", "layers to adapt, as a selection")
    alpha: float | None = option(None, "scale times rank; null means 2 * rank, a scale of 2", above=0)
    dropout: float = option(0.0, "dropout on the input of A", at_least=0, below=1)
    warmup_steps: int | None = option(
        None, "steps before the first pruning; null means a tenth of all steps", at_least=0
    )
    final_steps: int | None = option(
        None, "steps after the last pruning; null means three tenths of all steps", at_least=0
    )
    every: int = option(1, "steps from one pruning to the next", at_least=1)
    beta1: float = option(0.85, "smoothing of the importance", above=0, below=1)
    beta2: float = option(0.85, "smoothing of its uncertainty", above=0, below=1)
    orthogonality: float = option(0.5, "weight of the loss that keeps A and B orthogonal", at_least=0)
    lr: float | None = option(None, "learning rate; null means 0.005", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank > self.rank:
            raise UserError(
                f"adalora(): target_rank is {self.target_rank}, but must be at most rank ({self.rank}), the initial "
                "rank."
            )

    def group(self) -> Group:
        return Group("added", self.lr or 5e-3, self.name, self.lr is not None)

    @property
    def scale(self) -> float:
        return (2.0 * self.rank if self.alpha is None else self.alpha) / (self.rank + DIVISOR)

    def make(self, weight: Weight, name: str) -> Triplets:
        refuse_rank(self, self.rank, weight, name)
        return Triplets(weight, self.rank, self.scale, self.dropout)

    def updates(self, backbone: Backbone, graft: str) -> list[Triplets]:
        """Return the updates of all weights."""
        found = [self.update_at(weight, graft) for _, weight in self.targets(backbone)]
        return [update for update in found if isinstance(update, Triplets)]

    def span(self, steps: int) -> tuple[int, int]:
        """Return the number of the last step before the first pruning, and that of the last pruning."""
        first = steps // 10 if self.warmup_steps is None else self.warmup_steps
        final = steps * 3 // 10 if self.final_steps is None else self.final_steps
        if first + final >= steps:
            raise UserError(
                f"adalora(): warmup_steps ({first}) and final_steps ({final}) leave none of {steps} steps for pruning; "
                "lower them, or train longer."
            )
        return first, steps - final

    def check_steps(self, steps: int) -> None:
        self.span(steps)

    def budget(self, step: int, steps: int, matrices: int) -> int:
        """Return how many triplets all matrices have in total after a step, counted from 1: equation 12."""
        first, last = self.span(steps)
        left = 1 - min(max((step - first) / (last - first), 0.0), 1.0)
        return int((self.rank - self.target_rank) * matrices * left**3 + self.target_rank * matrices)

    def extra_loss(self, backbone: Backbone, graft: str) -> Tensor | None:
        if not self.orthogonality:
            return None
        norms = torch.cat([update.orthogonality_errors() for update in self.updates(backbone, graft)])
        return self.orthogonality * norms.mean()

    @torch.no_grad()
    def after_step(self, backbone: Backbone, graft: str, step: int, steps: int) -> None:
        first, last = self.span(steps)
        updates = self.updates(backbone, graft)
        if step < last:
            for update in updates:
                update.measure(self.beta1, self.beta2)
        if step == last or (first < step < last and step % self.every == 0):
            scores = [update.scores() for update in updates]
            flat = torch.cat([score.flatten() for score in scores])
            cut = flat.numel() - self.budget(step, steps, flat.numel() // self.rank)
            kept = torch.ones_like(flat, dtype=torch.bool)
            kept[flat.argsort(stable=True)[:cut]] = False
            for update, part in zip(updates, kept.split([score.numel() for score in scores])):
                update.kept.copy_(part.view_as(update.kept))
                update.E.mul_(update.kept)
        elif step > last:
            for update in updates:
                update.E.mul_(update.kept)

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        """Return PEFT's form, which exists for linear layers and two-dimensional convolutions with one group.

        Matrices are written with all of their `rank` triplets, pruned ones with a singular value of zero. PEFT's
        `rank_pattern` would omit these from the file and keep the scale, so the outputs are the same.
        """
        targets = self.targets(backbone)
        tensors = {}
        for site, weight in targets:
            if not site.name or not (weight.kind in MAPS or is_plain(weight)):
                return None
            added: Any = self.update_at(weight, graft)
            for name in "ABE":
                tensors[f"base_model.model.{site.name}.lora_{name}"] = getattr(added, name)
        first, final = self.warmup_steps or 0, self.final_steps or 0
        config: dict[str, Any] = {
            "peft_type": "ADALORA",
            "init_r": self.rank,
            "target_r": self.target_rank,
            "lora_alpha": 2.0 * self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "tinit": first,
            "tfinal": final,
            "deltaT": self.every,
            "total_step": first + final + 1,  # PEFT requires one; a graft does not know that of its run
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orthogonality,
            "target_modules": peft_targets(backbone, [site.name for site, _ in targets]),
            "fan_in_fan_out": any(weight.kind == "transposed" for _, weight in targets),
            "bias": "none",
        }
        return PeftForm(config, tensors)

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rank = reading.field("init_r", 12, int)
        if rank < 1:
            raise reading.error(f"init_r is {rank}; it must be at least 1.")
        target = reading.field("target_r", 8, int)
        alpha = reading.field("lora_alpha", 8, (int, float))
        reading.ignore(
            "r", "total_step", "fan_in_fan_out", "init_lora_weights", "use_rslora", "alpha_pattern"
        )
        kept = reading.field("rank_pattern", None, (dict, type(None))) or {}
        tensors = {}
        for key, tensor in reading.take(r"(.+)\.lora_([ABE])").items():
            pattern = kept.get(f"{key[1]}.lora_E", kept.get(f"base_model.model.{key[1]}.lora_E"))
            if pattern is not None:
                tensor = _with_cut(reading, key[0], tensor, pattern, rank, 1 if key[2] == "B" else 0)
            tensors[f"{key[1]}.adalora_default.{key[2]}"] = tensor
        options = {
            "rank": rank,
            "target_rank": max(1, min(target, rank)),
            "sites": exactly(name.partition(".adalora_default")[0] for name in tensors),
            "alpha": float(alpha) if alpha > 0 else float(rank),
            "dropout": float(reading.field("lora_dropout", 0.0, (int, float))),
            "warmup_steps": reading.field("tinit", 0, int),
            "final_steps": reading.field("tfinal", 0, int),
            "every": reading.field("deltaT", 1, int),
            "beta1": reading.field("beta1", 0.85, float),
            "beta2": reading.field("beta2", 0.85, float),
            "orthogonality": reading.field("orth_reg_weight", 0.5, (int, float)),
        }
        return options, tensors


def is_plain(weight: Weight) -> bool:
    """Return whether a weight is of a convolution that PEFT supports: two-dimensional, one group, zero padding."""
    module: Any = weight.module
    two = weight.kind == "conv" and len(weight.shape) == 4
    return two and module.groups == 1 and module.padding_mode == "zeros"


def _with_cut(
    reading: PeftReading, key: str, tensor: Tensor, pattern: Any, rank: int, dimension: int
) -> Tensor:
    """Return a tensor that PEFT wrote without the pruned triplets, with zeros in their places."""
    if not isinstance(pattern, list) or len(pattern) != rank:
        raise reading.error(f"rank_pattern of {key!r} is not a list of {rank} booleans.")
    places = torch.tensor(pattern, dtype=torch.bool).nonzero().flatten()
    if tensor.shape[dimension] != len(places):
        raise reading.error(
            f"{key!r} has shape {tuple(tensor.shape)}, but rank_pattern keeps {len(places)} triplets of it."
        )
    shape = list(tensor.shape)
    shape[dimension] = rank
    return tensor.new_zeros(shape).index_copy(dimension, places, tensor)


class Triplets(Update):
    """A (rank, in), E (rank, 1) and B (out, rank), all fp32; for experts, with a leading dimension of experts.

    Buffers hold what only training needs: for each parameter the smoothed importance and its smoothed uncertainty,
    and a mask of the triplets that the last pruning kept.
    """

    kept: Tensor

    def __init__(self, weight: Weight, rank: int, scale: float, dropout: float) -> None:
        super().__init__(weight)
        experts = weight.shape[:1] if weight.kind == "experts" else ()
        outputs, *inputs = weight.shape[len(experts) :]
        self.A = new_parameter(*experts, rank, math.prod(inputs), std=0.02)
        self.E = new_parameter(*experts, rank, 1)
        self.B = new_parameter(*experts, outputs, rank, std=0.02)
        for name in "AEB":
            for moment in ("importance", "deviation"):
                zeros = torch.zeros_like(getattr(self, name), requires_grad=False)
                self.register_buffer(f"{name}_{moment}", zeros, persistent=False)
        self.register_buffer("kept", torch.ones(*experts, rank, 1, dtype=torch.bool), persistent=False)
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        if members[0].kind not in MAPS:
            return super().mix(members, weights, site)
        factors = [(m.scale * m.B, m.A * m.E) for m in members]
        return FactorMixture(members[0].of(site), factors, weights)

    def delta(self, weight: Weight) -> Tensor:
        return (self.scale * (self.B @ (self.A * self.E))).view(weight.shape)

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.kind not in MAPS:
            return super().after(site, args, kwargs, output)
        low = multiply(self.dropout(input_of(args, kwargs)), self.A * self.E)
        return output + (multiply(low, self.B) * self.scale).to(output.dtype)

    def orthogonality_errors(self) -> Tensor:
        """Return ||A A' - 1|| and ||B' B - 1|| of each matrix."""
        one = torch.eye(self.E.shape[-2], device=self.E.device)
        products = torch.stack([self.A @ self.A.mT, self.B.mT @ self.B])
        return torch.linalg.vector_norm(products - one, dim=(-2, -1)).flatten()

    def measure(self, beta1: float, beta2: float) -> None:
        """Update the smoothed importance |parameter * gradient| and its uncertainty: equations 8 to 10."""
        for name, parameter in self.named_parameters():
            if parameter.grad is not None:
                now = (parameter * parameter.grad).abs()
                mean, uncertainty = (
                    getattr(self, f"{name}_{moment}") for moment in ("importance", "deviation")
                )
                mean.mul_(beta1).add_((1 - beta1) * now)
                uncertainty.mul_(beta2).add_((1 - beta2) * (now - mean).abs())

    def scores(self) -> Tensor:
        """Return the importance of each triplet, (rank), or (experts, rank): equation 7."""
        score = {
            name: getattr(self, f"{name}_importance") * getattr(self, f"{name}_deviation") for name in "AEB"
        }
        return score["E"].squeeze(-1) + (score["A"].mean(-1) + score["B"].mean(-2))
