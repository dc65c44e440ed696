"""Low-rank spaces of gradients: singular vectors, exact or randomized, and random matrices from a seed.

A matrix (m, n) is projected on its shorter side: G (m, n) with m >= n becomes R = G P with P (n, r), otherwise R = P' G
with P (m, r). R has the longer side and r.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graftkit.errors import Note

RANDOMIZED = "randomized"
OVERSAMPLING = 8  # columns beyond the rank of a random sketch (Halko et al. 2011, section 4.2: 5 or 10)


class ProjectionFallback(Note):
    """The singular vectors of a gradient could not be computed, and something else is used."""


def is_tall(shape: Sequence[int]) -> bool:
    return shape[0] >= shape[1]


def project(gradient: Tensor, space: Tensor) -> Tensor:
    """Return the coordinates of a gradient (m, n) in a space (min(m, n), r): (m, r) or (r, n), fp32."""
    gradient = gradient.to(space.dtype)
    return (gradient @ space if is_tall(gradient.shape) else space.T @ gradient).float()


def back(low: Tensor, space: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the matrix of a shape (m, n) with these coordinates in a space, in the dtype of the space."""
    low = low.to(space.dtype)
    return low @ space.T if is_tall(shape) else space @ low


def singular_space(
    gradient: Tensor, rank: int, svd: str, power: int, seed: int, before: Tensor | None = None
) -> Tensor:
    """Return the first singular vectors on the shorter side of a gradient (m, n): (min(m, n), rank), fp32.

    `svd`: 'full', or 'randomized' with `power` iterations and a sketch drawn from `seed`. If neither gives finite vectors,
    because the decomposition does not converge or the gradient is not finite, the space is `before`, else a random one
    with orthonormal columns, and `ProjectionFallback` is warned of.
    """
    gradient = gradient.detach().float()
    short = min(gradient.shape)
    ways: list[Callable[[], Tensor]] = [
        lambda: _full(gradient, rank),
        lambda: _randomized(gradient, rank, power, seed),
    ]
    if svd == RANDOMIZED and rank + OVERSAMPLING < short:
        ways.reverse()
    reason = "the gradient is not finite"
    if torch.isfinite(gradient).all():  # this waits for the device, as a decomposition does
        for way in ways:
            try:
                found = way()
            except torch.linalg.LinAlgError as error:
                reason = f"its singular value decomposition does not converge ({str(error).splitlines()[0]})"
                continue
            if torch.isfinite(found).all():
                return found.contiguous()
            reason = "its singular vectors are not finite"
    kept = before is not None and before.shape == (short, rank)
    warnings.warn(
        f"the low-rank space of a gradient of shape {tuple(gradient.shape)} could not be computed: {reason}; "
        f"{'the space before is kept' if kept else 'a random space is used'}.",
        ProjectionFallback,
        stacklevel=2,
    )
    return before.float() if before is not None and kept else _random_orthonormal(gradient, rank, seed)


def random_space(gradient: Tensor, rank: int, seed: int) -> Tensor:
    """Return a random matrix (min(m, n), rank) with elements from N(0, 1 / rank), which keeps norms on average."""
    generator = torch.Generator(device=gradient.device).manual_seed(seed)
    shape = (min(gradient.shape), rank)
    return torch.randn(shape, generator=generator, device=gradient.device) / rank**0.5


def _full(gradient: Tensor, rank: int) -> Tensor:
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return right[:rank].T if is_tall(gradient.shape) else left[:, :rank]


def _randomized(gradient: Tensor, rank: int, power: int, seed: int) -> Tensor:
    """Halko et al. 2011, 'Finding Structure with Randomness', algorithms 4.4 and 5.1."""
    matrix = gradient.T if is_tall(gradient.shape) else gradient  # (short, long): its left vectors are wanted
    width = min(rank + OVERSAMPLING, len(matrix))
    generator = torch.Generator(device=matrix.device).manual_seed(seed)
    sketch = torch.randn((matrix.shape[1], width), generator=generator, device=matrix.device)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(power):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small = torch.linalg.qr(matrix.T @ basis).R  # matrix' basis = Q small, so basis' matrix = small' Q'
    return basis @ torch.linalg.svd(small.T).U[:, :rank]


def _random_orthonormal(gradient: Tensor, rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(random_space(gradient, rank, seed)).Q
