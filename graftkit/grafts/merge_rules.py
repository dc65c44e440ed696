"""Rules that combine low-rank updates into one: the arithmetic of `graftkit merge`, as in PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftkit.errors import UserError, listing, nearest


@dataclass(frozen=True)
class Factors:
    """One update s B A, with `rank` columns in B for each expert, and a bias s b if there is one.

    A (rank, in, *kernel), B (out, rank, ...); for n experts A is (n rank, in) and B (out, rank n), as in PEFT.
    """

    A: Tensor
    B: Tensor
    scale: float
    rank: int
    b: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of matrices: that of experts, or 1."""
        return len(self.A) // self.rank

    @property
    def is_grouped(self) -> bool:
        """Whether B is of a convolution with groups, each of which reads a part of A x."""
        return self.A.dim() > 2 and self.B.shape[1] != self.rank

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (n, rank, in) and B (n, out, rank), in fp32 and without the scale."""
        A = self.A.float().flatten(1).unflatten(0, (self.count, self.rank))
        B = self.B.float().flatten(1).unflatten(1, (self.rank, self.count)).permute(2, 0, 1)
        return A, B


@dataclass(frozen=True)
class Rule:
    """How updates are combined.

    `whole`: combine the products B A and reduce the rank by SVD; otherwise combine A and B separately, or concatenate
    them. `keeps`: which elements are kept: the 'largest', or 'random' ones, rescaled. `elects`: drop elements whose sign
    differs from that of the majority.
    """

    whole: bool = False
    keeps: str | None = None
    elects: bool = False


RULES = {
    "cat": Rule(),
    "svd": Rule(whole=True),
    "linear": Rule(),
    "ties": Rule(keeps="largest", elects=True),
    "ties-svd": Rule(True, "largest", True),
    "dare-linear": Rule(keeps="random"),
    "dare-linear-svd": Rule(True, "random"),
    "dare-ties": Rule(keeps="random", elects=True),
    "dare-ties-svd": Rule(True, "random", True),
    "magnitude": Rule(keeps="largest"),
    "magnitude-svd": Rule(True, "largest"),
}
OTHER_NAMES = {"dare": "dare-linear", "magnitude-prune": "magnitude", "magnitude-prune-svd": "magnitude-svd"}
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """A rule and its options. Raises `UserError` for options that do not fit the rule.

    `how`: one of `RULES`. `density`: share of elements to keep, for ties, dare and magnitude. `rank`: rank of the
    result, for svd. `sign`: elect the sign of an element by sum ('total') or by count ('frequency').
    """

    how: str = "cat"
    density: float | None = None
    rank: int | None = None
    sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        name = self.how.lower().replace("_", "-")
        object.__setattr__(self, "how", OTHER_NAMES.get(name, name))
        if self.how not in RULES:
            raise UserError(f"how is {self.how!r}; choose one of {listing(RULES)}.{nearest(self.how, RULES)}")
        if self.rule.keeps is None and self.density is not None:
            raise UserError(f"{self.how} keeps every element, so density has no effect; leave it out.")
        if self.rule.keeps is not None and (self.density is None or not 0 < self.density <= 1):
            raise UserError(
                f"{self.how} keeps a share of the elements of each update, but density is {self.density}; set it above 0 "
                "and at most 1, for example 0.2 for ties and 0.5 for dare."
            )
        if not self.rule.whole and self.rank is not None:
            raise UserError(f"how={self.how!r} determines the rank of the result; set rank only with svd.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}, but must be at least 1.")
        if self.sign not in SIGNS:
            raise UserError(f"sign is {self.sign!r}; choose one of {listing(SIGNS)}.")

    @property
    def rule(self) -> Rule:
        return RULES[self.how]

    def of(self, name: str, updates: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
        """Combine several updates of the weight `name`; `rank`: rank of an SVD. The scale of the result is 1.

        cat is the exact weighted sum, whose rank is the sum of ranks; svd its best approximation of the given rank. The
        others follow PEFT: A and B are each weighted by sqrt(|w s|), with the sign of w in A, which does not give the
        weighted sum of the products.
        """
        biases = [w * u.scale * u.b.float() for u, w in zip(updates, weights) if u.b is not None]
        b = torch.stack(biases).sum(0) if biases else None
        # a mask depends only on the seed and the name of its weight
        generator = torch.Generator().manual_seed(seed_of(self.seed, name))
        grouped = [update for update in updates if update.is_grouped]
        if grouped and (self.how == "cat" or self.rule.whole):
            raise UserError(
                f"{name!r} is a convolution with groups, whose updates can only be merged by linear, ties or dare."
            )
        if self.how == "cat":
            return _side_by_side(updates, weights, b)
        if self.rule.whole:
            products = [u.scale * (B @ A) for u in updates for A, B in (u.matrices(),)]
            return _of_rank(self._combined(products, list(weights), generator), updates[0], rank, b)
        ranks = {update.rank for update in updates}
        if len(ranks) > 1:
            raise UserError(
                f"{self.how} adds factors of the same rank, but those of {name!r} have {listing(map(str, sorted(ranks)))}. "
                f"Use cat{', svd' if self.how == 'linear' else f' or {self.how}-svd'}."
            )
        roots = [math.sqrt(abs(w * u.scale)) for u, w in zip(updates, weights)]
        signed = [math.copysign(root, w * u.scale) for root, u, w in zip(roots, updates, weights)]
        A = self._combined([u.A.float() for u in updates], signed, generator)
        B = self._combined([u.B.float() for u in updates], roots, generator)
        return Factors(A, B, 1.0, updates[0].rank, b)

    def _combined(self, tensors: list[Tensor], weights: list[float], generator: torch.Generator) -> Tensor:
        parts = torch.stack([self._kept(tensor, generator) for tensor in tensors])
        factors = torch.tensor(weights).view(-1, *[1] * (parts.dim() - 1))
        if not self.rule.elects:
            return (parts * factors).sum(0)
        signs = parts.sign()
        majority = torch.where((parts if self.sign == "total" else signs).sum(0) >= 0, 1, -1)
        agreeing = signs == majority
        return (parts * factors * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)

    def _kept(self, tensor: Tensor, generator: torch.Generator) -> Tensor:
        """Drop elements: Yadav et al. 2023, 'TIES-Merging', section 3, or Yu et al. 2024, 'DARE', equation 3."""
        if self.density is None or self.density == 1:
            return tensor
        if self.rule.keeps == "random":
            probability = torch.full_like(tensor, self.density)
            return tensor * torch.bernoulli(probability, generator=generator) / self.density
        mask = torch.zeros(tensor.numel())
        mask[tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices] = 1
        return tensor * mask.view_as(tensor)


def seed_of(seed: int, name: str) -> int:
    """Return the seed of the random masks for one weight."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def _side_by_side(updates: Sequence[Factors], weights: Sequence[float], b: Tensor | None) -> Factors:
    pairs = [update.matrices() for update in updates]
    A = torch.cat([w * u.scale * A for (A, _), u, w in zip(pairs, updates, weights)], dim=1)
    B = torch.cat([B for _, B in pairs], dim=2)
    return _stored(A, B, updates[0], b)


def _of_rank(products: Tensor, like: Factors, rank: int, b: Tensor | None) -> Factors:
    U, S, Vh = torch.linalg.svd(products, full_matrices=False)
    rank = min(rank, S.shape[-1])
    return _stored(Vh[:, :rank], U[..., :rank] * S[:, None, :rank], like, b)


def _stored(A: Tensor, B: Tensor, like: Factors, b: Tensor | None) -> Factors:
    """Return matrices A (n, rank, in) and B (n, out, rank) in the shapes in which they are stored."""
    rank = A.shape[1]
    kept_A = A.flatten(0, 1).view(-1, *like.A.shape[1:])
    kept_B = B.permute(1, 2, 0).flatten(1).view(len(like.B), -1, *like.B.shape[2:])
    return Factors(kept_A.contiguous(), kept_B.contiguous(), 1.0, rank, b)
