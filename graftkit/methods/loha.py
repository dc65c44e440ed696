"""LoHa: the elementwise product of two low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftkit.backbone import Backbone
from graftkit.backbone.weights import Weight, add_product, input_of, multiply, without_autocast
from graftkit.methods.base import PeftForm
from graftkit.methods.shared import lycoris
from graftkit.methods.shared.mixtures import FactorMixture
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.methods.shared.updates import MAPS, SizedMethod, Update
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class LoHa(SizedMethod):
    """Add the elementwise product of two low-rank matrices: dW = s (w1_a w1_b) * (w2_a w2_b), with s = alpha / rank.

    Hyeon-Woo et al. 2022, 'FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning',
    proposition 1; used for adaptation in LyCORIS, Yeh et al. 2024. The rank of dW is up to rank * rank. w2_b is zero at
    first, so training starts exactly at the base model. The weight of a convolution is treated as a matrix
    (out, in / groups * kernel); with `use_effective_conv2d` each of the two factors has a core (rank, rank, *kernel)
    between w_a and w_b, proposition 3.

    When: the update should have a higher rank than lora's for as few parameters. A step costs as much as a lora of rank
    rank * rank, or at most as much as forming dW in each pass.
    Parameters: 2 * rank * (in + out) for each weight; with `use_effective_conv2d`
    2 * rank * (in / groups + out + rank * kernel) for a convolution whose kernel is not 1.
    """

    peft_types = ("LOHA",)

    rank: int = option(8, "rank of each of the two factors", at_least=1)
    use_effective_conv2d: bool = option(
        False, "use cores instead of flattened kernels for convolutions", formerly="effective_conv"
    )

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> Hadamard:
        return Hadamard(weight, rank, scale, self.use_effective_conv2d)

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        more = {"use_effective_conv2d": True} if self.use_effective_conv2d else {}
        return lycoris.write(self, backbone, graft, "hada_", more)

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return lycoris.read(reading, cls, r"hada_(w[12]_[ab]|t[12])")


class Hadamard(Update):
    """w1_a, w2_a (out, rank) and w1_b, w2_b (rank, in), all fp32; for experts, with a leading dimension of experts.

    With cores: t1, t2 (rank, rank, *kernel), w1_a, w2_a (rank, out) and w1_b, w2_b (rank, in / groups); a
    one-dimensional kernel is (kernel, 1), as in PEFT.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor
    t2: Tensor

    def __init__(self, weight: Weight, rank: int, scale: float, use_effective_conv2d: bool) -> None:
        super().__init__(weight)
        self.scale = scale
        kernel = weight.shape[2:] if weight.kind == "conv" else ()
        left: tuple[int, ...]
        right: tuple[int, ...]
        self.with_cores = use_effective_conv2d and math.prod(kernel) > 1
        if self.with_cores:
            shape = (rank, rank, *kernel, 1) if len(kernel) == 1 else (rank, rank, *kernel)
            left, right = (rank, weight.shape[0]), (rank, weight.shape[1])
        else:
            experts = weight.shape[:1] if weight.kind == "experts" else ()
            outputs, *inputs = weight.shape[len(experts) :]
            left, right = (*experts, outputs, rank), (*experts, rank, math.prod(inputs))
        for i in "12":
            self.register_parameter(f"w{i}_a", nn.Parameter(torch.empty(left)))
            self.register_parameter(f"w{i}_b", nn.Parameter(torch.empty(right)))
            if self.with_cores:
                self.register_parameter(f"t{i}", nn.Parameter(torch.empty(shape)))
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        nn.init.zeros_(self.w2_b)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return factors (out, rank * rank) and (rank * rank, in) of dW: all products of a column, or row, of each."""
        left = (self.w1_a * self.scale).unsqueeze(-1) * self.w2_a.unsqueeze(-2)
        return left.flatten(-2), (self.w1_b.unsqueeze(-2) * self.w2_b.unsqueeze(-3)).flatten(-3, -2)

    @property
    def is_low(self) -> bool:
        """Return whether multiplying by the factors of `pair` is cheaper than by dW."""
        if self.kind not in MAPS:
            return False
        outputs, rank = self.w1_a.shape
        inputs = self.w1_b.shape[1]
        return rank * rank * (inputs + outputs) < inputs * outputs

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.is_low:
            return super().after(site, args, kwargs, output)
        left, right = self.pair()
        return add_product(output, multiply(input_of(args, kwargs), right), left)

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        if not all(member.is_low for member in members):
            return super().mix(members, weights, site)
        return FactorMixture(members[0].of(site), [member.pair() for member in members], weights)

    def delta(self, weight: Weight) -> Tensor:
        first = [self.w1_a * self.scale, self.w1_b]
        second = [self.w2_a, self.w2_b]
        if self.with_cores:
            first, second = [*first, self.t1], [*second, self.t2]
        return Product.apply(*first, *second).view(weight.shape)


def matrix(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """Return a b, or with a core (rank, rank, *kernel) the tensor (out, in, *kernel)."""
    return a @ b if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a)


class Product(torch.autograd.Function):
    """matrix(first half) * matrix(second half), recomputed in the backward pass instead of being saved."""

    @staticmethod
    def forward(ctx: Any, *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        with without_autocast(factors[0]):
            half = len(factors) // 2
            return matrix(*factors[:half]).mul_(matrix(*factors[half:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        half = len(ctx.saved_tensors) // 2
        first, second = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        with without_autocast(gradient):
            return (
                *gradients(first, gradient * matrix(*second)),
                *gradients(second, gradient * matrix(*first)),
            )


def gradients(factors: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the factors of a matrix, given the gradient of the matrix."""
    with torch.enable_grad():
        own = [factor.detach().requires_grad_() for factor in factors]
        return torch.autograd.grad(matrix(*own), own, gradient)
