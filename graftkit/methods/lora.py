"""LoRA: a low-rank update beside a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graftkit.backbone import Backbone
from graftkit.backbone.weights import Weight
from graftkit.methods.base import PeftForm
from graftkit.methods.shared import peft_lora
from graftkit.methods.shared.low_rank import LoraLikeMethod, LowRank
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class LoRA(LoraLikeMethod):
    """Add a trained low-rank update s B A to each chosen weight W: W x + s B (A x), with s = alpha / rank.

    Hu et al. 2021, 'LoRA: Low-Rank Adaptation of Large Language Models', equation 3. A is initialised like the weight
    of `nn.Linear` and B with zeros, so training starts exactly at the base model (for an embedding, A is zero and B is
    random). `use_rslora`: s = alpha / sqrt(rank), Kalajdzievski 2023, 'A Rank Stabilization Scaling Factor',
    theorem 3.2. `loraplus_lr_ratio`: Hayou et al. 2024, 'LoRA+', section 4.

    Works for linear layers, convolutions, embeddings, the packed projections of `nn.MultiheadAttention` and experts
    stored as one parameter; for the last two, W + s B A replaces W during a call.

    When: there is no reason to choose another method: it comes close to full fine-tuning on most tasks, and can be
    folded.
    Parameters: rank * (in + out) for each weight, times the number of experts; for an embedding, `in` is the
    vocabulary size; for a convolution rank * (in * kernel + out / groups), where `groups` must divide the rank.
    `lora_bias` adds out for each weight; `bias` also trains biases of the model.
    """

    peft_types = ("LORA",)
    is_product: ClassVar[bool] = True
    is_general: ClassVar[bool] = True

    lora_bias: bool = option(False, "train a bias beside B, with the same scale", formerly="b_bias")
    init: str = option(
        "kaiming", "distribution that A is drawn from", choices=("kaiming", "gaussian"), formerly="start"
    )

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> LowRank:
        update = super().factors(weight, name, rank, scale)
        if self.init != "kaiming":  # the default, which is already applied
            update.draw(self.init)
        return update

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return peft_lora.read(reading, cls)

    @classmethod
    def reads_peft(cls, config: Mapping[str, Any]) -> bool:
        return super().reads_peft(config) and not peft_lora.has_magnitudes(config)

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        return peft_lora.write(self, backbone, graft)
