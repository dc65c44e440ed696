"""Prompt tuning: trained embeddings in front of the text."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.prompts import Entrance, find_entrance, insert
from graftkit.backbone.tokens import VirtualTokens
from graftkit.errors import UserError, listing
from graftkit.methods.base import Method, PeftForm, labels_of, new_parameter, place
from graftkit.methods.shared.advice import general
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class Prompt(Method):
    """Prepend `tokens` trained embeddings P to the text: the model reads [P; X] instead of X.

    Lester, Al-Rfou and Constant 2021, 'The Power of Scale for Parameter-Efficient Prompt Tuning', section 2. With an
    encoder and a decoder, the encoder reads them. Image and audio models read them after their patches or frames
    (Jia et al. 2022, 'Visual Prompt Tuning', VPT-shallow). They use up `tokens` of the positions available to the text.
    The model's outputs for the virtual tokens are cut off, so a head pools the text only. The architecture's own head
    pools as it does in PEFT: a head on the first token sees the first virtual token; a head on the last token sees the
    last token of the text (in PEFT the last position, even if it is padding). PEFT itself cuts nothing off: the hidden
    states of this graft in PEFT begin with those of the virtual tokens.
    `init`: 'random' draws from a normal distribution with the standard deviation of the embedding table, 'vocabulary'
    takes random rows of the table, 'text' the rows of the tokens of `init_text`, repeated or cut to `tokens`.
    When: the model is large and the graft must be tiny; on small models other methods reach more.
    Parameters: tokens * width.
    """

    peft_types = ("PROMPT_TUNING", "P_TUNING")
    stage: ClassVar[int] = 4

    tokens: int = option(20, "number of virtual tokens", at_least=1)
    init: str = option(
        "random",
        "initial values of the virtual tokens",
        choices=("random", "vocabulary", "text"),
        formerly="start",
    )
    init_text: str | None = option(None, "the text to start from, with init='text'", formerly="text")
    lr: float | None = option(None, "learning rate; null means 0.03", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        if (self.init == "text") != (self.init_text is not None) or not (
            self.init_text is None or self.init_text.strip()
        ):
            raise UserError(
                "prompt() needs init='text' and a non-empty init_text together: prompt(init='text', "
                "init_text='Classify the question')."
            )
        entrance = find_entrance(backbone, self.name)
        name = f"prompt_{graft}"
        added = TrainedTokens(self._first(backbone, entrance))
        place(backbone.model, name, added)
        insert(backbone, entrance, added, self.name)
        group = Group("added", self.lr or 3e-2, self.name, self.lr is not None)
        return labels_of(backbone, name, group)

    def _first(self, backbone: Backbone, entrance: Entrance) -> Tensor:
        """Return the initial values, (tokens, width), in fp32."""
        table = entrance.table
        if self.init == "random":
            known = table is not None and not table.weight.is_meta
            spread = float(table.weight.detach().float().std()) if table is not None and known else 0.02
            return new_parameter(self.tokens, entrance.width, std=spread).detach()
        if table is None:
            raise UserError(
                f"prompt(init={self.init!r}) needs a vocabulary, and {backbone.source} has none; use init='random'."
            )
        if self.init == "vocabulary":
            rows = torch.randint(table.num_embeddings, (self.tokens,), device=table.weight.device)
        else:
            ids = self._ids(backbone)
            if max(ids) >= table.num_embeddings:
                beyond = sorted({number for number in ids if number >= table.num_embeddings})
                tokens = getattr(backbone.processor, "tokenizer", backbone.processor).convert_ids_to_tokens(
                    beyond
                )
                raise UserError(
                    f"prompt(init='text') starts from rows of the embedding, and {listing(map(repr, tokens), 4)} of its text "
                    "has none there; write the text without it."
                )
            rows = torch.tensor(ids, device=table.weight.device)
        return table.weight.detach()[rows].float()

    def _ids(self, backbone: Backbone) -> list[int]:
        tokenizer = getattr(backbone.processor, "tokenizer", backbone.processor)
        if not callable(tokenizer):
            raise UserError(
                f"prompt(init='text') needs the tokenizer of {backbone.source}, which was passed without one: pass "
                "Backbone(model, tokenizer) instead of the model alone, or use init='vocabulary'."
            )
        ids = list(tokenizer(self.init_text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError(f"prompt(): the tokenizer finds no tokens in the text {self.init_text!r}.")
        return (ids * math.ceil(self.tokens / len(ids)))[: self.tokens]

    def stored(self) -> Prompt:
        return dataclasses.replace(self, init="random", init_text=None) if self.init == "text" else self

    def never_folds(self) -> str:
        return (
            "prompt() cannot be folded: virtual tokens make the input longer, which no weight of the plain architecture "
            f"can do. Keep the graft folder and load it with graftkit.load, or use {general()} if folding matters."
        )

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        entrance = find_entrance(backbone, self.name)
        if entrance.table is None:
            return None
        added = getattr(backbone.model, f"prompt_{graft}")
        config: dict[str, Any] = {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.tokens,
            "token_dim": entrance.width,
            "num_transformer_submodules": 1,
            "num_attention_heads": 1,  # PEFT requires these two but does not use them
            "num_layers": len(backbone.blocks),
        }
        return PeftForm(config, {"prompt_embeddings": added.values})

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read a prompt, or the result of P-tuning: PEFT saves only the encoder's output, which is a trained prompt."""
        reading.ignore(
            "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
            "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
            "num_attention_heads", "num_layers",
        )  # fmt: skip
        tokens = reading.field("num_virtual_tokens", None, int)
        width = reading.field("token_dim", None, int)
        halves = reading.field("num_transformer_submodules") or 1
        found = reading.take("prompt_embeddings")
        if len(found) != 1:
            raise reading.error("prompt_embeddings are not in adapter_model.safetensors.")
        (values,) = found.values()
        if tokens < 1 or halves not in (1, 2) or tuple(values.shape) != (tokens * halves, width):
            raise reading.error(
                f"num_virtual_tokens={tokens}, num_transformer_submodules={halves} and token_dim={width} do not fit "
                f"prompt_embeddings of shape {tuple(values.shape)}."
            )
        # with prompts for an encoder and a decoder, PEFT uses only the encoder's
        return {"tokens": tokens}, {"prompt_default.values": values[:tokens].float().contiguous()}


class TrainedTokens(VirtualTokens):
    """`values` (tokens, width), fp32."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.tokens = len(values)
        self.values = nn.Parameter(values.clone())

    def embeddings(self) -> Tensor:
        return self.values
