"""Base classes of LoRA and its variants: two factors beside a weight of any kind, and PEFT's form of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.weights import (
    Weight,
    add_product,
    convolve,
    correlate,
    groups_of,
    has_geometry,
    input_of,
    look_up,
    mix_channels,
    multiply,
)
from graftkit.errors import NotFoldable, UserError
from graftkit.methods.base import new_parameter
from graftkit.methods.shared.advice import selecting
from graftkit.methods.shared.mixtures import FactorMixture
from graftkit.methods.shared.updates import SizedMethod, Update
from graftkit.optim.labels import Labels
from graftkit.recipe.catalogue import option

STABLE_ALPHA = 16.0  # Kalajdzievski 2023: the same for every rank


@dataclass(frozen=True)
class LowRankMethod(SizedMethod):
    """A method that places two factors, A and B, at each weight."""

    alpha: float | None = option(
        None, "scale times rank; null means 2 * rank, a scale of 2, and 16 with use_rslora", above=0
    )
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)
    dropout: float = option(
        0.0, "dropout on the input of A; not applied at embeddings, packed attention and experts",
        at_least=0, below=1,
    )  # fmt: skip
    use_rslora: bool = option(
        False, "use the scale alpha / sqrt(rank), which suits large ranks", formerly="stabilised"
    )

    default_lr = 1e-3
    default_scale = 2.0
    # options of some subclasses
    loraplus_lr_ratio = 1.0
    lora_bias = False
    bias = "none"
    peft_conv = False
    frees_base: ClassVar[dict[str, tuple]] = {"bias": ("all", "lora_only")}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "yields", int(self.bias != "none"))  # a head has its own biases

    @property
    def wanted(self) -> str:
        return (
            f"weights that {self.name}(rank={self.rank}) can update; use {selecting()} there, or for a grouped "
            "convolution a rank that is a multiple of its groups"
        )

    def accepts(self, weight: Weight) -> bool:
        ranks = (self.rank, *(self.rank_pattern or {}).values())
        return weight.kind in self.kinds and any(rank % groups_of(weight) == 0 for rank in ranks)

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> LowRank:
        """Return the update of the weight with this dotted name."""
        return LowRank(weight, rank, scale, self.dropout, self.lora_bias, self.peft_conv)

    def maker(self, backbone: Backbone) -> Callable[[Weight, str], Update]:
        sizes = self.sizes(backbone)

        def make(weight: Weight, name: str) -> Update:
            rank, alpha = sizes[name]
            if self.lora_bias and weight.kind not in ("linear", "transposed", "conv"):
                raise UserError(
                    f"{self.name}(lora_bias=True) cannot update {name!r} ({type(weight.module).__name__}), whose output is "
                    "not that of a single weight; leave lora_bias out, or narrow sites."
                )
            if rank % groups_of(weight):
                raise UserError(
                    f"{self.name}(): the rank at {name!r} is {rank}, but must be a multiple of the "
                    f"{groups_of(weight)} groups of this {type(weight.module).__name__}. Set one with rank_pattern, "
                    f"leave it out of sites, or use {selecting()} there."
                )
            scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
            return self.factors(weight, name, rank, scale)

        return make

    def alpha_at(self, rank: int) -> float:
        return STABLE_ALPHA if self.use_rslora and self.alpha is None else super().alpha_at(rank)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        labels = super().attach(backbone, graft)
        for name, group in labels.items():
            if name.endswith(".B"):
                labels[name] = dataclasses.replace(group, lr_scale=self.loraplus_lr_ratio)
        biases = dict.fromkeys(self.biases(backbone), dataclasses.replace(self.group(), role="base"))
        return labels | biases

    def biases(self, backbone: Backbone) -> list[str]:
        """Return the names of the base's own biases that `bias` trains."""
        if self.bias == "all":
            return [name for name in backbone.base_parameters if name.rpartition(".")[2] == "bias"]
        if self.bias == "none":
            return []
        named = {name.rpartition(".")[0] + ".bias" for name in self.named(backbone)}
        return [name for name in backbone.base_parameters if name in named or f".{name}" in named]

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        for name, (_, weight) in self.named(backbone).items():
            kind = type(weight.module).__name__
            if groups_of(weight) > 1:
                raise NotFoldable(
                    f"{self.name}() cannot be folded into {name!r}, a {kind} with groups: A reads all of its "
                    "channels, but each of its groups does not. Keep the graft folder."
                )
            if self.peft_conv and has_geometry(weight):
                raise NotFoldable(
                    f"{self.name}(peft_conv=True) cannot be folded into {name!r}, a {kind} with dilation or "
                    f"non-zero padding ({self.name}() can). Keep the graft folder."
                )
        values = super().fold(backbone, graft)
        for name, (_, weight) in self.named(backbone).items() if self.lora_bias else ():
            bias = getattr(weight.module, "bias", None)
            if bias is None:
                raise NotFoldable(
                    f"{self.name}(lora_bias=True) cannot be folded into {name!r}, a {type(weight.module).__name__} that has "
                    "no bias to add that of B to. Keep the graft folder."
                )
            update: Any = self.update_at(weight, graft)
            values[name.removesuffix("weight") + "bias"] = (
                (bias + update.scale * update.b).detach().to(bias.dtype)
            )
        return values

    def peft_size(self, rank: int, alpha: float) -> tuple[int, float]:
        """Return rank and alpha of the LoRA in PEFT that is equivalent to an update of this rank and alpha."""
        return rank, alpha


@dataclass(frozen=True)
class LoraLikeMethod(LowRankMethod):
    """A method with one random factor and one of zeros at first, as in LoRA."""

    loraplus_lr_ratio: float = option(
        1.0, "factor on the learning rate of B (LoRA+ uses 2 to 16)", above=0, formerly="b_rate"
    )
    bias: str = option("none", "biases of the model to train as well", choices=("none", "all", "lora_only"))
    peft_conv: bool = option(
        False,
        "use zero padding and no dilation in A, whatever the convolution uses, as in PEFT",
        formerly="plain_conv",
    )


class LowRank(Update):
    """s B A with A (rank, in) and B (out, rank), both fp32, and with `lora_bias` a bias b (out) beside B.

    At a convolution A is (rank, in, *kernel) and B (out, rank / groups, 1, ...), and A has the stride, padding and
    dilation of the site (with `peft_conv`, zero padding and no dilation). At n experts A is (n rank, in), one
    expert after the other, and B (out, rank n), with the experts of each column adjacent. These are PEFT's layouts.
    `dropout` acts on the input of A, if the weight has its own input that is not a list of ids.
    """

    def __init__(
        self,
        weight: Weight,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        lora_bias: bool = False,
        peft_conv: bool = False,
    ) -> None:
        super().__init__(weight)
        self.rank, self.scale, self.peft_conv = rank, scale, peft_conv
        self.count = weight.shape[0] if weight.kind == "experts" else 1
        if weight.kind == "conv":
            module: Any = weight.module
            outputs, _, *kernel = weight.shape
            self.A = new_parameter(rank, module.in_channels, *kernel)
            self.B = new_parameter(outputs, rank // module.groups, *(1 for _ in kernel))
        else:
            outputs, inputs = weight.shape[-2:]
            self.A = new_parameter(self.count * rank, inputs)
            self.B = new_parameter(outputs, rank * self.count)
        self.b = new_parameter(outputs) if lora_bias else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.draw("kaiming")

    def draw(self, how: str) -> None:
        """Draw one factor and leave the other zero: A, or B at an embedding, where a batch uses few columns of A."""
        if self.kind == "embedding":
            nn.init.normal_(self.B)
        elif how == "gaussian":
            nn.init.normal_(self.A, std=1 / self.rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def joinable(self) -> bool:
        """Whether it is s B A alone: no dropout or bias, and no other form in a subclass."""
        kind = type(self)
        plain = all(
            getattr(kind, name) is getattr(LowRank, name) for name in ("used", "after", "plus", "down")
        )
        return plain and self.kind == "linear" and self.b is None and isinstance(self.dropout, nn.Identity)

    def used(self) -> tuple[Tensor, Tensor]:
        """Return the A and B that the update is computed from."""
        return self.A, self.B

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return (B, A) as matrices (out, rank) and (rank, in * kernel), or as stacks of them, one for each expert."""
        A, B = self.used()
        if self.kind != "experts":
            return B.flatten(1), A.flatten(1)
        return B.unflatten(1, (-1, self.count)).permute(2, 0, 1), A.unflatten(0, (self.count, -1))

    def delta(self, weight: Weight) -> Tensor:
        B, A = self.pair()
        return (self.scale * (B @ A)).view(weight.shape)

    def updated(self, weight: Weight, value: Tensor | None = None) -> Tensor:
        value = weight.value if value is None else value
        if not self.replaces or value.dtype != self.A.dtype:
            return super().updated(weight, value)
        left, right = self.pair()
        if weight.is_transposed:
            left, right = right.transpose(-2, -1), left.transpose(-2, -1)
        return (torch.baddbmm if value.dim() == 3 else torch.addmm)(value, left, right, alpha=self.scale)

    def after(self, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.replaces:
            return output
        A, B = self.used()
        x = input_of(args, kwargs)
        low = self.down(site, x if self.kind == "embedding" else self.dropout(x), A)
        output = self.plus(site, low, B, output)
        return output if self.b is None else output + (self.scale * self.across(self.b)).to(output.dtype)

    @property
    def alike(self) -> Any:
        return self.peft_conv, self.b is None

    @classmethod
    def mix(cls, members: Sequence[Any], weights: Tensor, site: nn.Module) -> Any:
        weight = members[0].of(site)
        if weight.replaced:
            return super().mix(members, weights, site)
        factors = [(member.scale * B, A) for member in members for A, B in (member.used(),)]
        biases = [member.scale * member.b for member in members if member.b is not None]
        gains = [gain for member in members if (gain := member.gain(weight)) is not None]
        return FactorMixture(weight, factors, weights, biases, gains, members[0].down)

    def gain(self, weight: Weight) -> Tensor | None:
        """Return the factor on each output of the updated weight, (out), or None."""
        return None

    def down(self, site: Any, x: Tensor, A: Tensor) -> Tensor:
        """Return A x, where A is the first of the two factors."""
        if self.kind == "embedding":
            return look_up(site, x, A.T)
        if self.kind != "conv":
            return multiply(x, A)
        if self.peft_conv:
            return correlate(x, A, site.stride, site.padding)
        return convolve(site, x, A, groups=1)

    def plus(self, site: Any, low: Tensor, B: Tensor, output: Tensor) -> Tensor:
        """Return output + s B low."""
        if self.kind == "conv":
            return output + (mix_channels(low, B, site.groups) * self.scale).to(output.dtype)
        return add_product(output, low, B, self.scale)

    def across(self, values: Tensor) -> Tensor:
        """Return one value for each output, in a shape that broadcasts to the outputs of the site."""
        return values.view(-1, *(1 for _ in self.A.shape[2:])) if self.kind == "conv" else values

    def peft_tensors(self) -> dict[str, Tensor]:
        """Return the tensors by PEFT's keys below a module."""
        A, B = self.used()
        if self.kind == "embedding":
            return {"lora_embedding_A": A, "lora_embedding_B": B}
        tensors: dict[str, Tensor] = {"lora_A.weight": A, "lora_B.weight": B}
        return tensors if self.b is None else tensors | {"lora_B.bias": self.b}
