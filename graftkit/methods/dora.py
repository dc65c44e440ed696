"""DoRA: train magnitude and direction of a weight separately."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.weights import Weight, apply, groups_of, input_of, scale_product, without_autocast
from graftkit.methods.base import Addition, PeftForm
from graftkit.methods.shared import peft_lora
from graftkit.methods.shared.advice import general
from graftkit.methods.shared.low_rank import LoraLikeMethod, LowRank
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.optim.labels import Labels

TINY = 1e-12  # length of a row of zeros, which has no direction


@dataclass(frozen=True)
class DoRA(LoraLikeMethod):
    """Add a low-rank update to the direction of each weight row and train its length m: m (W + s B A) / ||W + s B A||.

    Liu et al. 2024, 'DoRA: Weight-Decomposed Low-Rank Adaptation', equation 5, with the norm of each output's row and
    no gradient through it (section 4.3); s = alpha / rank. m starts as ||W|| and B as zero, so training starts exactly
    at the base model. The norm is computed row by row from ||W||^2 + 2 s <W A', B> + s^2 <B A A', B>, without forming
    W + s B A.

    When: lora falls short of full fine-tuning, especially at small ranks; a step takes longer than with lora.
    Parameters: those of lora(), plus out for each weight (for each expert, if there are experts).
    """

    peft_types = ("LORA",)
    stage: ClassVar[int] = 1

    @property
    def wanted(self) -> str:
        return (
            f"weights that {self.name}() can update, neither stored as integers nor of a grouped convolution; "
            f"use {general()} there"
        )

    def accepts(self, weight: Weight) -> bool:
        return weight.kind in self.kinds and groups_of(weight) == 1 and not weight.is_quantized

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> LowRank:
        return Direction(weight, rank, scale, self.dropout, peft_conv=self.peft_conv)

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        return peft_lora.write(self, backbone, graft, with_magnitudes=True)

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        return super().reads_peft(config) and peft_lora.has_magnitudes(config)

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return peft_lora.read(reading, cls, with_magnitudes=True)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        labels = super().attach(backbone, graft)
        for name, group in labels.items():
            if name.endswith(".m"):  # a length is not a matrix, whatever its shape: no weight decay
                labels[name] = dataclasses.replace(group, weight_decay=0.0)
        return labels


class Direction(LowRank):
    """The factors and the row lengths m: (out), for a convolution (1, out, 1, ...), for experts (experts, out)."""

    adds = False

    def __init__(self, weight: Weight, *size: Any, **more: Any) -> None:
        super().__init__(weight, *size, **more)
        norm = self.norm(weight)
        self.m = nn.Parameter(norm.view(1, *self.across(norm).shape) if weight.kind == "conv" else norm)

    def norm(self, weight: Weight) -> Tensor:
        """Return ||W + s B A|| of each row, in fp32, without a gradient."""
        W = weight.stored(weight.value.detach())
        W = W.flatten(1) if weight.kind == "conv" else W
        with torch.no_grad(), without_autocast(W):
            B, A = (factor.to(W.device) for factor in self.pair())
            mixed = (A.to(W.dtype) @ W.transpose(-2, -1)).transpose(-2, -1).to(B.dtype)
            mixed = 2 * self.scale * mixed + self.scale**2 * (B @ (A @ A.transpose(-2, -1)))
            exact = torch.promote_types(W.dtype, torch.float32)
            squares = torch.linalg.vector_norm(W, dim=-1, dtype=exact).float().square()
            return (squares + (mixed * B).sum(-1)).clamp_min(TINY**2).sqrt()

    def ratio(self, weight: Weight) -> Tensor:
        """Return m / ||W + s B A|| of each row."""
        norm = self.norm(weight)
        return self.m.view(norm.shape) / norm

    def gain(self, weight: Weight) -> Tensor:
        return self.ratio(weight)

    def updated(self, weight: Weight, value: Tensor | None = None) -> Tensor:
        value = weight.value if value is None else value
        ratio = self.ratio(weight)
        ratio = ratio.view(*ratio.shape, *(1 for _ in weight.shape[ratio.dim() :]))
        return weight.stored(ratio * (weight.stored(value.float()) + super().delta(weight))).to(value.dtype)

    def delta(self, weight: Weight) -> Tensor:
        return weight.stored(self.updated(weight)).float() - weight.stored(weight.value).float()

    def after(self, site: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.replaces:
            return output
        weight, x = self.of(site), input_of(args, kwargs)
        ratio = self.across(self.ratio(weight))
        if self.kind != "embedding" and self.training and isinstance(self.dropout, nn.Dropout):
            matrix = weight.stored(weight.value)
            if self.follows(site):  # changes by other additions are scaled as well, without dropout
                plain = apply(weight, site, x, matrix).to(output.dtype)
                bias = getattr(site, "bias", None)
                plain = plain if bias is None else plain + self.across(bias)
                output = output + ((ratio - 1) * (output - plain)).to(output.dtype)
            x = self.dropout(x)
            base = apply(weight, site, x, matrix)
            whole = self.plus(site, self.down(site, x, self.A), self.B, base)
            return (output + (ratio * whole - base)).to(output.dtype)
        low, bias = self.down(site, x, self.A), getattr(site, "bias", None)
        if self.kind != "conv":
            return scale_product(output, low, self.B, ratio, bias, self.scale)
        whole = self.plus(site, low, self.B, output)
        if bias is None:
            return (ratio * whole).to(output.dtype)
        bias = self.across(bias)
        return torch.addcmul(bias - ratio * bias, ratio, whole).to(output.dtype)

    def follows(self, site: nn.Module) -> bool:
        """Return whether other additions have already changed the output of the site."""
        children = list(site.children())
        earlier = children[: next(i for i, child in enumerate(children) if child is self)]
        return any(
            isinstance(child, Addition) and child.active and child.changes_outputs for child in earlier
        )

    def peft_tensors(self) -> dict[str, Tensor]:
        return super().peft_tensors() | {"lora_magnitude_vector": self.m}
