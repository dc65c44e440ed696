"""LoKr: an update that is the Kronecker product of two small matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.weights import Weight, input_of, multiply
from graftkit.methods.base import PeftForm
from graftkit.methods.shared import lycoris
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.methods.shared.updates import MAPS, SizedMethod, Update
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class LoKr(SizedMethod):
    """Add a Kronecker product whose larger factor has low rank: dW = s w1 ⊗ (w2_a w2_b), with s = alpha / rank.

    Yeh et al. 2024, 'Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation', section
    3.2; Edalati et al. 2022, 'KronA'. out = out1 * out2 and in = in1 * in2, with out1 <= out2 and in1 <= in2 as close
    to each other as possible, or out1 and in1 close to `factor`. w1 is (out1, in1), w2 (out2, in2); the kernel of a
    convolution, whose `in` is in / groups, belongs to w2. w2 is not decomposed if rank >= max(out2, in2) / 2; w1 is
    decomposed only with `decompose_both` and if rank < max(out1, in1) / 2. w1, or its left factor, is zero at first, so
    training starts exactly at the base model.

    When: updates must be much smaller than lora's, and as cheap to compute.
    Parameters: out1 * in1 for w1, or rank * (out1 + in1) for its factors; out2 * in2 * kernel for w2, or
    rank * (out2 + in2 * kernel) for its factors, or with `use_effective_conv2d` rank * (out2 + in2 + rank * kernel).
    """

    peft_types = ("LOKR",)

    rank: int = option(8, "rank of a decomposed factor", at_least=1)
    factor: int | None = option(
        None, "target size of w1; null means as close to that of w2 as possible", at_least=1
    )
    decompose_both: bool = option(False, "also decompose w1 if it is large")
    use_effective_conv2d: bool = option(
        False, "use a core instead of the flattened kernel for convolutions", formerly="effective_conv"
    )

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> Kronecker:
        return Kronecker(weight, rank, scale, self.factor, self.decompose_both, self.use_effective_conv2d)

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        """Return an equivalent PEFT adapter; None if PEFT has none.

        If w2 of a one-dimensional convolution is not decomposed, PEFT does not compute a Kronecker product.
        """
        more: dict[str, Any] = {} if self.factor is None else {"decompose_factor": self.factor}
        more |= {"decompose_both": True} if self.decompose_both else {}
        more |= {"use_effective_conv2d": True} if self.use_effective_conv2d else {}
        form = lycoris.write(self, backbone, graft, "lokr_", more)
        return None if form is None or any(is_torn(*item) for item in form.tensors.items()) else form

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        options, tensors = lycoris.read(reading, cls, r"lokr_(w[12](?:_[ab])?|t2)")
        torn = next((name for name, tensor in tensors.items() if is_torn(name, tensor)), None)
        if torn is not None:
            raise reading.error(
                f"{torn!r} is the undecomposed second factor of a one-dimensional convolution, which PEFT does not "
                "multiply as a Kronecker product. Merge this adapter with PEFT, or train it with a smaller r."
            )
        factor = reading.field("decompose_factor", -1, int)
        options["factor"] = None if factor == -1 else max(factor, 1)
        options["decompose_both"] = reading.field("decompose_both", False, bool)
        return options, tensors


def is_torn(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is the undecomposed w2 of a one-dimensional convolution."""
    return name.endswith("w2") and tensor.dim() == 3


def divisors(size: int, aim: int | None) -> tuple[int, int]:
    """Return first <= second with size = first * second, as close to each other as possible, or first close to `aim`.

    An `aim` that divides the size is used unchanged, even above its square root. As in LyCORIS and PEFT.
    """
    if aim is not None and size % aim == 0:
        return aim, size // aim
    best = 1
    for first in range(2, math.isqrt(size) + 1):
        if aim is not None and first > aim:
            break
        if size % first == 0:
            best = first
    return best, size // best


class Kronecker(Update):
    """w1 (out1, in1), or w1_a (out1, rank) and w1_b (rank, in1); w2 (out2, in2, *kernel), or w2_a (out2, rank) and
    w2_b (rank, in2 * kernel), or w2_a (rank, out2), w2_b (rank, in2) and t2 (rank, rank, *kernel). All fp32.

    Experts stand in front where there are some. The kernel of one dimension is (kernel, 1) in t2, as PEFT has it.
    """

    w1: Tensor
    w1_a: Tensor
    w1_b: Tensor
    w2: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t2: Tensor

    def __init__(
        self, weight: Weight, rank: int, scale: float, factor: int | None, decompose_both: bool, cores: bool
    ) -> None:
        super().__init__(weight)
        self.scale = scale
        experts = weight.shape[:1] if weight.kind == "experts" else ()
        outputs, inputs, *kernel = weight.shape[len(experts) :]
        (out1, out2), (in1, in2) = divisors(outputs, factor), divisors(inputs, factor)
        self.sizes = (out1, out2, in1, in2)
        if decompose_both and rank < max(out1, in1) / 2:
            self.add("w1_a", *experts, out1, rank)
            self.add("w1_b", *experts, rank, in1)
        else:
            self.add("w1", *experts, out1, in1)
        if rank >= max(out2, in2) / 2:
            self.add("w2", *experts, out2, in2, *kernel)
        elif cores and math.prod(kernel) > 1:
            self.add("w2_a", rank, out2)
            self.add("w2_b", rank, in2)
            self.add("t2", rank, rank, *kernel, *([1] if len(kernel) == 1 else []))
        else:
            self.add("w2_a", *experts, out2, rank)
            self.add("w2_b", *experts, rank, in2 * math.prod(kernel))
        nn.init.zeros_(self.w1 if hasattr(self, "w1") else self.w1_a)

    def add(self, name: str, *shape: int) -> None:
        parameter = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        self.register_parameter(name, parameter)

    def first(self) -> Tensor:
        """Return s w1, (out1, in1)."""
        return self.scale * (self.w1 if hasattr(self, "w1") else self.w1_a @ self.w1_b)

    def second(self) -> Tensor:
        """Return w2, (out2, in2 * kernel)."""
        if hasattr(self, "t2"):
            return torch.einsum("ij...,ip,jr->pr...", self.t2, self.w2_a, self.w2_b).flatten(1)
        if hasattr(self, "w2_a"):
            return self.w2_a @ self.w2_b
        return self.w2.flatten(1) if self.kind == "conv" else self.w2

    def delta(self, weight: Weight) -> Tensor:
        product = torch.einsum("...ac,...bd->...abcd", self.first(), self.second())
        return product.reshape(weight.shape)

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Add (w1 ⊗ w2) x = w1 X w2^T, where X (in1, in2) is x reshaped; the product itself is not formed."""
        if self.kind not in MAPS:
            return super().after(site, args, kwargs, output)
        _, _, in1, in2 = self.sizes
        low = input_of(args, kwargs).unflatten(-1, (in1, in2))
        low = multiply(low, self.w2_b if hasattr(self, "w2_b") else self.w2)
        low = multiply(low.mT, self.first()).mT
        if hasattr(self, "w2_a"):
            low = multiply(low, self.w2_a)
        return output + low.flatten(-2).to(output.dtype)
