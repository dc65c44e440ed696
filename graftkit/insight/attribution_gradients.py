"""Attribution by gradients with respect to the input: of any model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graftkit.insight.attribution_inputs import RowInput


def gradient_x_input(row: RowInput) -> Tensor:
    """Return the gradient times the values themselves, (1, ...). Exact for a linear model: its terms."""
    return _gradient(row, row.values) * row.values


def integrated_gradients(row: RowInput, steps: int) -> Tensor:
    """Return the mean gradient on the straight line from the values without any part to those of the row, times their
    difference, (1, ...) (Sundararajan et al. 2017, equation 1). `steps`: points of the Gauss-Legendre quadrature.

    Their sum is the difference of the explained value at both ends (completeness), but for the error of the quadrature.
    """
    points, weights = np.polynomial.legendre.leggauss(steps)
    difference = row.values - row.absent
    total = torch.zeros_like(row.values)
    shape = [-1] + [1] * (row.values.dim() - 1)

    def summed(numbers: np.ndarray) -> Tensor:
        at, share = (
            torch.from_numpy(one[numbers] / 2 + offset).to(total).reshape(shape)
            for one, offset in ((points, 0.5), (weights, 0.0))
        )
        return (_gradient(row, row.absent + at * difference) * share).sum(0, keepdim=True)

    for _, part in row.each(summed, steps):
        total += part
    return total * difference


def _gradient(row: RowInput, values: Tensor) -> Tensor:
    """Return the gradient of the explained value at each of `values` (n, ...)."""
    with torch.enable_grad():
        values = values.detach().requires_grad_()
        return torch.autograd.grad(row(values).sum(), values)[0]
