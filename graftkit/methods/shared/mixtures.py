"""Compute several grafts at one site at once: in a batch whose rows use different grafts, or as a weighted sum.

The matrices of all grafts are concatenated when a mixture is made, so a forward pass has no loop over grafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.weights import Weight, add_product, convolve, input_of, look_up, mix_channels, multiply
from graftkit.errors import UserError


class Mixture:
    """Replaces an addition of one graft inside `graftkit.using`. It has no gradients.

    `weights` (rows or 1, grafts): weight of each graft for each row of a batch; a single row applies to all rows.
    `where`: name of the site, for messages.
    """

    where = ""
    shares = False  # whether the input may have a single row for all, such as position ids

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        return None

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        return output

    def spread(self, values: Tensor, x: Tensor, dim: int = -1) -> Tensor:
        """Return values (rows or 1, width), broadcastable to x (rows, ...) along its dimension `dim`, in x's dtype.

        Raises `UserError` if x has another number of rows.
        """
        self.check(x, x.dim() + dim if dim < 0 else dim)
        shape = [len(values), *[1] * (x.dim() - 1)]
        shape[dim] = values.shape[1]
        return values.to(x.dtype).view(shape)

    def check(self, x: Tensor, width_at: int = 1) -> None:
        """Raise `UserError` unless the first dimension of x counts the rows."""
        rows = len(self.weights)
        if self.shares and x.dim() > 1 and len(x) == 1:
            return
        if rows > 1 and (x.dim() < 2 or width_at == 0 or len(x) != rows):
            raise UserError(
                f"{self.where!r} got an input of shape {tuple(x.shape)}, whose first dimension does not match the {rows} "
                f"rows in graftkit.using(model, rows=[...]). Pass a batch of {rows} rows; if the model itself splits or "
                "joins rows at this module, run the rows of each graft separately."
            )


class FactorMixture(Mixture):
    """Compute output + sum of w g (B A x) over grafts, and with `gains` also + w (g - 1) W x.

    `factors`: (B, A) of each graft, with the scale in B: A (rank, in), B (out, rank), at a convolution
    A (rank, in, *kernel) and B (out, rank / groups, 1, ...). Ranks may differ. `biases` (out) are added, `gains` (out)
    multiply the outputs of the updated layer; there is one for each graft, or none at all. `down` computes A x, for
    methods that do so in their own way.
    """

    def __init__(
        self, weight: Weight, factors: Sequence[tuple[Tensor, Tensor]], weights: Tensor,
        biases: Sequence[Tensor] = (), gains: Sequence[Tensor] = (), down: Callable | None = None,
    ) -> None:  # fmt: skip
        super().__init__(weights)
        self.down = down or self._down
        self.kind = weight.kind
        self.shares = self.kind == "embedding"
        self.groups = int(getattr(weight.module, "groups", 1)) if self.kind == "conv" else 1
        # each group of a convolution's outputs reads its own part of every graft's A x
        low = [A.unflatten(0, (self.groups, -1)) for _, A in factors]
        self.A = torch.cat(low, dim=1).flatten(0, 1)
        left = [B for B, _ in factors]
        if gains:
            left = [B * _column(gain, B) for B, gain in zip(left, gains)]
            self.gains = weights @ (torch.stack(list(gains)) - 1)
        self.B = torch.cat(left, dim=1)
        sizes = torch.tensor([part.shape[1] for part in low], device=weights.device)
        self.gates = weights.repeat_interleave(sizes, dim=1).repeat(1, self.groups)
        self.biases = weights @ torch.stack(list(biases)) if biases else None
        self.has_gains = bool(gains)
        self.channels = -1 if self.kind != "conv" else 1 - self.A.dim()  # where x has its channels

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = input_of(args, kwargs)
        self.check(x)
        low = self.down(site, x, self.A)
        low = low * self.spread(self.gates, low, self.channels)
        output = output.expand(len(low), *output.shape[1:])
        if self.has_gains:
            own = output if getattr(site, "bias", None) is None else output - self._across(site.bias)
            output = output + own * self.spread(self.gains, output, self.channels)
        if self.kind == "conv":
            output = output + mix_channels(low, self.B, self.groups).to(output.dtype)
        else:
            output = add_product(output, low, self.B)
        return output if self.biases is None else output + self.spread(self.biases, output, self.channels)

    def _down(self, site: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        if self.kind == "embedding":
            return look_up(site, x, A.T)
        return convolve(site, x, A, groups=1) if self.kind == "conv" else multiply(x, A)

    def _across(self, bias: Any) -> Tensor:
        return bias.view(-1, *[1] * (-1 - self.channels))


class MatrixMixture(Mixture):
    """Multiply each row by its own dW; for updates known only as a whole matrix.

    `matrices`: dW of each graft in the layout of W.
    """

    def __init__(self, weight: Weight, matrices: Sequence[Tensor], weights: Tensor) -> None:
        super().__init__(weights)
        self.kind = weight.kind
        self.shares = self.kind == "embedding"
        self.stack = torch.stack([matrix.float() for matrix in matrices])

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = input_of(args, kwargs)
        self.check(x)
        return output + self.product(site, x).to(output.dtype)

    def product(self, site: Any, x: Tensor) -> Tensor:
        """Return dW x (rows, ...) with the dW of each row."""
        rows = len(self.weights)
        if self.kind == "embedding":  # the rows of all grafts for a token, concatenated
            tables = self.stack.permute(2, 0, 1).flatten(1)
            found = look_up(site, x, tables).unflatten(-1, (len(self.stack), -1))
            return (found * self.spread(self.weights, found, -2)).sum(-2)
        own = (self.weights @ self.stack.flatten(1)).view(rows, *self.stack.shape[1:])
        if x.dtype != own.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(own.dtype)
        if self.kind == "conv":
            together = x.reshape(1, -1, *x.shape[2:])
            found = convolve(site, together, own.flatten(0, 1), groups=rows * site.groups)
            return found.view(rows, -1, *found.shape[2:])
        found = torch.bmm(x.reshape(rows, -1, x.shape[-1]), own.mT)
        return found.view(*x.shape[:-1], -1)


def _column(values: Tensor, matrix: Tensor) -> Tensor:
    """Return one value for each row of a matrix or kernel, in a shape that broadcasts."""
    return values.view(-1, *[1] * (matrix.dim() - 1))
