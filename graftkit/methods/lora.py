"""LoRA: a low-rank update beside a linear map."""

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
    """Low-rank update s B A beside each chosen map: W x + s B (A x), with s = alpha / rank.

    Hu et al. 2021, 'LoRA: Low-Rank Adaptation of Large Language Models', equation 3. A is drawn as `nn.Linear` draws
    its weight, B is zero, so that training starts at the base model exactly (at an embedding A is zero and B is
    drawn). `use_rslora`: s = alpha / sqrt(rank), Kalajdzievski 2023, 'A Rank Stabilization Scaling Factor',
    theorem 3.2. `loraplus_lr_ratio`: Hayou et al. 2024, 'LoRA+', section 4.

    Beside linear maps it updates convolutions, embeddings, the packed maps of `nn.MultiheadAttention` and experts that
    are kept as one parameter; of the latter two the sum W + s B A stands in for W during a call.

    When: nothing speaks for another method: it comes near to full fine-tuning on most tasks, and folds.
    Parameters: rank * (in + out) for each map, as many times as there are experts; at an embedding in is the
    vocabulary; at a convolution rank * (in * kernel + out / groups), which `groups` has to divide the rank for. With
    lora_bias out more for each map; bias frees those of the model.
    """

    peft_types = ("LORA",)
    is_product: ClassVar[bool] = True
    is_general: ClassVar[bool] = True

    lora_bias: bool = option(False, "a trained bias beside B, scaled as B is", formerly="b_bias")
    init: str = option(
        "kaiming", "distribution that A is drawn from", choices=("kaiming", "gaussian"), formerly="start"
    )

    def factors(self, weight: Weight, name: str, rank: int, scale: float) -> LowRank:
        update = super().factors(weight, name, rank, scale)
        if self.init != "kaiming":  # which it has been drawn from already
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
