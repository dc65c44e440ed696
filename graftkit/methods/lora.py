"""LoRA: a low-rank update beside a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graftkit.backbone.weights import Weight
from graftkit.methods.shared import peft_lora
from graftkit.methods.shared.low_rank import LowRank, LowRankMethod
from graftkit.recipe.catalogue import option

if TYPE_CHECKING:
    from graftkit.methods.shared.peft_reading import PeftReading


@dataclass(frozen=True)
class LoRA(LowRankMethod):
    """Low-rank update s B A beside each chosen map: W x + s B (A x), with s = alpha / rank.

    Hu et al. 2021, 'LoRA: Low-Rank Adaptation of Large Language Models', equation 3. A is drawn as `nn.Linear` draws
    its weight, B is zero, so that training starts at the base model exactly (at an embedding A is zero and B is
    drawn). `stabilised`: s = alpha / sqrt(rank), Kalajdzievski 2023, 'A Rank Stabilization Scaling Factor',
    theorem 3.2. `b_rate`: Hayou et al. 2024, 'LoRA+', section 4.

    Beside linear maps it updates convolutions, embeddings, the packed maps of `nn.MultiheadAttention` and experts that
    are kept as one parameter; of the latter two the sum W + s B A stands in for W during a call.

    When: nothing speaks for another method: it comes near to full fine-tuning on most tasks, and folds.
    Parameters: rank * (in + out) for each map, as many times as there are experts; at an embedding in is the
    vocabulary; at a convolution rank * (in * kernel + out / groups), which `groups` has to divide the rank for. With
    b_bias out more for each map; bias frees those of the model.
    """

    peft_types = ("LORA",)

    rank: int = option(8, "rank of the update", at_least=1)
    sites: str = option("all-linear", "maps that are adapted, as a selection")
    alpha: float | None = option(
        None, "scale times rank; null means 2 * rank, a scale of 2, and 16 with stabilised", above=0
    )
    dropout: float = option(
        0.0,
        "dropout on the input of A; embeddings, packed attention and experts have none",
        at_least=0,
        below=1,
    )
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)
    stabilised: bool = option(False, "a scale of alpha / sqrt(rank), which suits large ranks")
    ranks: dict | None = option(
        None, "other ranks for some of the sites: {'blocks[-2:]': 16}; the last match counts"
    )
    alphas: dict | None = option(None, "other alphas for some of the sites, in the same way")
    b_rate: float = option(1.0, "factor on the learning rate of B (LoRA+ takes 2 to 16)", above=0)
    b_bias: bool = option(False, "a trained bias beside B, scaled as B is")
    bias: str = option(
        "none", "the model's own biases that are trained too", choices=("none", "all", "lora_only")
    )
    start: str = option("kaiming", "distribution that A is drawn from", choices=("kaiming", "gaussian"))
    plain_conv: bool = option(
        False, "A pads with zeros and is not dilated, whatever the site does, as in PEFT"
    )

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> LowRank:
        update = super().factors(weight, name, rank, scale)
        if self.start != "kaiming":  # which it has been drawn from already
            update.draw(self.start)
        return update

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return peft_lora.read(reading)
