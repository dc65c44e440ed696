"""P-tuning v2: trained keys and values in every layer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added
from graftkit.backbone.attention import AddedKeysValues, adopt, attention_modules
from graftkit.catalogue import option
from graftkit.errors import NotFoldable, UserError
from graftkit.methods.base import Group, Labels, Method, PeftForm, labels_of, new_parameter, place

PLAIN_ROTATIONS = ("default", "linear", "llama3")  # same for every text length, and rotations only


@dataclass(frozen=True)
class Prefix(Method):
    """`tokens` trained keys and values in front of those of every attention layer.

    Liu et al. 2021, 'P-Tuning v2'; Li and Liang 2021, 'Prefix-Tuning', for the reparameterisation: with
    `hidden`, keys and values are W2 tanh(W1 E + b1) + b2 of an embedding E (tokens, width).
    Parameters: 2 * blocks * tokens * kv width; with `hidden`
    tokens * width + hidden * (width + 1) + (hidden + 1) * 2 * blocks * kv width.
    """

    tokens: int = option(16, "number of trained positions in each layer", at_least=1)
    hidden: int = option(0, "width of the reparameterisation's hidden layer; 0 for none", at_least=0)
    lr: float | None = option(None, "learning rate; null means 0.01", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        modules = attention_modules(backbone)
        if not modules:
            raise UserError(f"prefix() found no attention in {backbone.source}; use lora() instead.")
        adopt(backbone)
        group = Group("added", self.lr or 1e-2, self.name, self.lr is not None)
        name = f"prefix_{graft}"
        labels: Labels = {}
        shapes = [kv_shape(backbone, module) for _, _, module in modules]
        encoder, start = None, 0
        if self.hidden:
            width = sum(2 * heads * size for heads, size in shapes)
            encoder = PrefixEncoder(self.tokens, backbone.hidden_size, self.hidden, width)
            place(backbone.model, name, encoder)
            labels |= labels_of(backbone, name, group)
        for (_, path, module), (heads, size) in zip(modules, shapes):
            slot = PrefixSlot(self.tokens, heads, size, encoder, start)
            place(module, name, slot)
            start += 2 * heads * size
            labels |= labels_of(backbone, f"{path}.{name}", group)
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        raise NotFoldable(
            "prefix() cannot be folded: added keys and values have no equal in the plain architecture. "
            "Keep the graft folder and load it with graftkit.load, or use lora() where folding matters."
        )

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        """PEFT keeps all layers in one matrix (tokens, layers * 2 * kv width), ordered k0, v0, k1, v1 ...

        It does not keep the reparameterisation: what is written is its result. PEFT puts the prefix at positions
        0 ... and the text behind it, where here the text keeps its own. With rotary positions only distances
        count, so that keys turned by `tokens` positions mean the same; other models cannot be expressed.
        """
        modules = attention_modules(backbone)
        rotary = next((m for m in backbone.model.modules() if hasattr(m, "inv_freq")), None)
        turn = getattr(sys.modules[type(modules[0][2]).__module__], "apply_rotary_pos_emb", None)
        if turn is None or getattr(rotary, "rope_type", None) not in PLAIN_ROTATIONS:
            return None
        assert rotary is not None
        name = f"prefix_{graft}"
        columns = []
        for _, _, module in modules:
            key, value = getattr(module, name).keys_values()
            _, turned = turn(
                key[None], key[None], *rotary(key, torch.tensor([[self.tokens]], device=key.device))
            )
            columns += [part.transpose(0, 1).reshape(self.tokens, -1) for part in (turned[0], value)]
        heads, size = kv_shape(backbone, modules[0][2])
        config: dict[str, Any] = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.tokens,
            "token_dim": heads * size,
            "num_transformer_submodules": 1,
            "num_attention_heads": heads,
            "num_layers": len(modules),
            "encoder_hidden_size": heads * size,
            "prefix_projection": False,
        }
        return PeftForm(config, {"prompt_embeddings": torch.cat(columns, dim=1)})


def kv_shape(backbone: Backbone, module: nn.Module) -> tuple[int, int]:
    """(kv heads, head width) of an attention module."""
    config: Any = getattr(module, "config", None) or backbone.model.config
    heads = config.num_attention_heads
    size: Any = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    size = size or backbone.hidden_size // heads
    return int(getattr(config, "num_key_value_heads", None) or heads), int(size)


class PrefixSlot(AddedKeysValues):
    """Keys and values of one layer, (kv heads, tokens, head width): stored here, or columns of the encoder's output."""

    encoder: PrefixEncoder | None

    def __init__(
        self, tokens: int, heads: int, size: int, encoder: PrefixEncoder | None = None, start: int = 0
    ) -> None:
        super().__init__()
        self.shape = (tokens, heads, size)
        self.start = start
        self.__dict__["encoder"] = encoder  # not a child: it belongs to the model
        if encoder is None:
            self.keys = new_parameter(tokens, heads * size, std=0.02)
            self.values = new_parameter(tokens, heads * size, std=0.02)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        tokens, heads, size = self.shape
        if self.encoder is None:
            parts: tuple[Tensor, ...] = (self.keys, self.values)
        else:
            parts = self.encoder.columns(self.start, 2 * heads * size).split(heads * size, dim=1)
        keys, values = (part.view(tokens, heads, size).transpose(0, 1) for part in parts)
        return keys, values


class PrefixEncoder(Added):
    """The reparameterisation of all layers: W2 tanh(W1 E + b1) + b2."""

    def __init__(self, tokens: int, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.embedding = new_parameter(tokens, width, std=0.02)
        self.trunk = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, outputs)

    def columns(self, start: int, count: int) -> Tensor:
        """Columns of the output (tokens, outputs), from `start`. Nothing is kept from one layer to the next."""
        hidden = torch.tanh(self.trunk(self.embedding))
        rows = slice(start, start + count)
        return nn.functional.linear(hidden, self.out.weight[rows], self.out.bias[rows])
