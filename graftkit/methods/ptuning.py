"""P-tuning: virtual tokens computed by a trained encoder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.prompts import find_entrance, insert
from graftkit.backbone.tokens import VirtualTokens
from graftkit.backbone.weights import without_autocast
from graftkit.methods.base import Method, PeftForm, labels_of, new_parameter, place
from graftkit.methods.shared.advice import general
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option


@dataclass(frozen=True)
class PTuning(Method):
    """Prepend `tokens` virtual tokens to the text, computed from trained embeddings E by an encoder that links them.

    Liu et al. 2021, 'GPT Understands, Too' (P-tuning), section 3.2 of the first version: h = MLP(BiLSTM(E)); or
    h = MLP(E). The MLP uses ReLU; after the LSTM it has one hidden layer of width 2 * hidden, without the LSTM `layers`
    hidden layers of width `hidden`. Virtual tokens are placed, and their outputs cut off, as in `prompt`.
    When: training with prompt() is unstable.
    Parameters, w the width and h hidden: tokens * w, plus
    for 'mlp' (w + 1) * h + (layers - 1) * (h + 1) * h + (h + 1) * w;
    for 'lstm' 8 * h * (w + h + 2) + (layers - 1) * 8 * h * (3 * h + 2) + (2 * h + 1) * (2 * h + w).
    """

    stage: ClassVar[int] = 4

    tokens: int = option(20, "number of virtual tokens", at_least=1)
    encoder: str = option("mlp", "network that computes the virtual tokens", choices=("mlp", "lstm"))
    hidden: int | None = option(
        None, "width of the encoder; null means the embeddings' width, half of it for an LSTM", at_least=1
    )
    layers: int = option(2, "layers of the LSTM; hidden layers of the MLP", at_least=1, at_most=64)
    lr: float | None = option(None, "learning rate; null means 0.001", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        entrance = find_entrance(backbone, self.name)
        width = entrance.width
        name = f"ptuning_{graft}"
        added = EncodedTokens(self.tokens, width, self.encoder, self._hidden(width), self.layers)
        place(backbone.model, name, added)
        insert(backbone, entrance, added, self.name)
        group = Group("added", self.lr or 1e-3, self.name, self.lr is not None)
        return labels_of(backbone, name, group)

    def _hidden(self, width: int) -> int:
        half = self.encoder == "lstm"  # it is bidirectional: both halves together have the full width
        return self.hidden or (max(1, width // 2) if half else width)

    def never_folds(self) -> str:
        return (
            "ptuning() cannot be folded: virtual tokens make the input longer, which no weight of the plain architecture "
            f"can do. Keep the graft folder and load it with graftkit.load, or use {general()} if folding matters."
        )

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        """Return the encoder's output as PEFT's virtual tokens: PEFT saves no encoder, so training cannot continue."""
        entrance = find_entrance(backbone, self.name)
        if entrance.table is None:
            return None
        added = getattr(backbone.model, f"ptuning_{graft}")
        config: dict[str, Any] = {
            "peft_type": "P_TUNING",
            "num_virtual_tokens": self.tokens,
            "token_dim": entrance.width,
            "num_transformer_submodules": 1,
            "num_attention_heads": 1,  # PEFT requires these two but does not use them
            "num_layers": len(backbone.blocks),
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self._hidden(entrance.width),
            "encoder_num_layers": self.layers,
        }
        return PeftForm(config, {"prompt_embeddings": added.embeddings().detach().clone()})


class EncodedTokens(VirtualTokens):
    """E (tokens, width) and the encoder that turns it into virtual tokens, all fp32."""

    def __init__(self, tokens: int, width: int, encoder: str, hidden: int, layers: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.embedding = new_parameter(tokens, width, std=1.0)
        self.lstm = nn.LSTM(width, hidden, layers, bidirectional=True) if encoder == "lstm" else None
        widths = [2 * hidden] * 2 if encoder == "lstm" else [width] + [hidden] * layers
        layers_before: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers_before += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.mlp = nn.Sequential(*layers_before, nn.Linear(widths[-1], width))

    def embeddings(self) -> Tensor:
        with without_autocast(self.embedding):
            states = self.embedding
            if self.lstm is not None:
                states, _ = self.lstm(states)
            return self.mlp(states)
