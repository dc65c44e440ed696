"""PiSSA: LoRA that starts from the principal part of a weight."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.weights import Weight, groups_of
from graftkit.errors import UserError
from graftkit.methods.base import PeftForm
from graftkit.methods.shared import peft_lora
from graftkit.methods.shared.advice import general
from graftkit.methods.shared.low_rank import LowRank, LowRankMethod
from graftkit.optim.labels import Group
from graftkit.recipe.catalogue import option

OVERSAMPLED = 10  # columns beyond the rank in the randomised SVD (Halko et al. 2011, section 4.2)


@dataclass(frozen=True)
class PiSSA(LowRankMethod):
    """Add a low-rank update that starts from the largest singular triplets of each weight: W x + s (B A - B0 A0) x.

    Meng et al. 2024, 'PiSSA: Principal Singular Values and Singular Vectors Adaptation', equations 2 to 4, where
    s B0 A0 is the best approximation of W of that rank, B0 = U sqrt(S / s), A0 = sqrt(S / s) V', s = alpha / rank. The
    paper replaces W by W - s B0 A0; here W is unchanged, and A0 and B0 are stored and saved beside A and B. The update
    is computed as s ((B - B0) A + B0 (A - A0)), so training starts exactly at the base model.

    When: lora learns slowly at first, and the time to decompose each weight beforehand does not matter.
    Parameters: those of lora(), and as many frozen ones.
    """

    starts_from_values: ClassVar[bool] = True

    rank: int = option(8, "number of singular triplets", at_least=1)
    alpha: float | None = option(None, "scale times rank; null means the rank, a scale of 1", above=0)
    lr: float | None = option(None, "learning rate; null means 0.0002", above=0)
    iterations: int = option(8, "power iterations of the randomised SVD; 0 for the exact one", at_least=0)

    default_lr = 2e-4
    default_scale = 1.0

    def group(self) -> Group:
        # weight decay would pull the principal part of each weight, and so the model, to zero
        return dataclasses.replace(super().group(), weight_decay=0.0)

    @property
    def wanted(self) -> str:
        return (
            f"weights that {self.name}() can update, neither stored as integers nor of a grouped convolution; "
            f"use {general()} there"
        )

    def accepts(self, weight: Weight) -> bool:
        return weight.kind in self.kinds and groups_of(weight) == 1 and not weight.is_quantized

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> LowRank:
        least = (
            min(weight.shape[-2:])
            if weight.kind != "conv"
            else min(weight.shape[0], math.prod(weight.shape[1:]))
        )
        if rank > least:
            raise UserError(
                f"{self.name}(): the rank at {name!r} is {rank}, but this {type(weight.module).__name__} has only "
                f"{least} singular values. Lower the rank there with rank_pattern, or use {general()}."
            )
        return Principal(weight, rank, scale, self.dropout, self.iterations)

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        return peft_lora.write(self, backbone, graft)

    def peft_size(self, rank: int, alpha: float) -> tuple[int, float]:
        """Return rank and alpha of a LoRA of twice the rank with the same scale."""
        return 2 * rank, alpha * math.sqrt(2) if self.use_rslora else 2 * alpha


class Principal(LowRank):
    """The factors A and B, with their initial values A0 and B0 as buffers."""

    A0: Tensor
    B0: Tensor

    def __init__(
        self, weight: Weight, rank: int, scale: float, dropout: float = 0.0, iterations: int = 0
    ) -> None:
        super().__init__(weight, rank, scale, dropout)
        W = weight.stored(weight.value.detach()).float()
        B, A = principal(W.flatten(1) if weight.kind == "conv" else W, rank, scale, iterations)
        B = B.permute(1, 2, 0) if weight.kind == "experts" else B
        self.A = nn.Parameter(A.reshape(self.A.shape).contiguous())
        self.B = nn.Parameter(B.reshape(self.B.shape).contiguous())
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def used(self) -> tuple[Tensor, Tensor]:
        """Return factors of twice the rank whose product is B A - B0 A0, without cancellation of large terms."""
        A, A0 = (factor.unflatten(0, (self.count, -1)) for factor in (self.A, self.A0))
        B, B0 = (factor.unflatten(1, (-1, self.count)) for factor in (self.B, self.B0))
        return torch.cat([A, A - A0], dim=1).flatten(0, 1), torch.cat([B - B0, B0], dim=1).flatten(1, 2)


def principal(W: Tensor, rank: int, scale: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return U sqrt(S / s), (..., out, rank), and sqrt(S / s) V', (..., rank, in), for the largest singular values of W."""
    if W.is_meta:
        return W.new_empty(*W.shape[:-1], rank), W.new_empty(*W.shape[:-2], rank, W.shape[-1])
    if iterations and rank + OVERSAMPLED < min(W.shape[-2:]):
        U, S, V = torch.svd_lowrank(W, rank + OVERSAMPLED, iterations)
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        V = Vh.mT
    root = (S[..., :rank] / scale).sqrt()
    return U[..., :rank] * root[..., None, :], root[..., None] * V[..., :rank].mT
