"""P-tuning v2: trained keys and values in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.attention import AddedKeysValues, adopt, attention_modules
from graftkit.catalogue import option
from graftkit.errors import NotFoldable, UserError
from graftkit.methods.base import Addition, Group, Labels, Method, PeftForm, labels_of, new_parameter, place


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
        if self.hidden:
            width = sum(2 * heads * size for heads, size in shapes)
            encoder = PrefixEncoder(self.tokens, backbone.hidden_size, self.hidden, width)
            place(backbone.model, name, encoder)
            labels |= labels_of(backbone, name, group)
        for (_, path, module), (heads, size) in zip(modules, shapes):
            slot = PrefixSlot(self.tokens, heads, size, stored=not self.hidden)
            place(module, name, slot)
            if self.hidden:
                encoder.slots.append(slot)
            labels |= labels_of(backbone, f"{path}.{name}", group)
        return labels

    def fold(self, backbone: Backbone, graft: str) -> dict[str, Tensor]:
        raise NotFoldable(
            "prefix() cannot be folded: added keys and values have no equal in the plain architecture. "
            "Keep the graft folder and load it with graftkit.load, or use lora() where folding matters."
        )

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm:
        """PEFT keeps all layers in one matrix (tokens, layers * 2 * kv width), ordered k0, v0, k1, v1 ...

        It does not keep the reparameterisation: what is written is its result.
        """
        name = f"prefix_{graft}"
        if self.hidden:
            getattr(backbone.model, name).fill()
        columns = []
        modules = attention_modules(backbone)
        for _, _, module in modules:
            key, value = getattr(module, name).keys_values()
            columns += [part.transpose(0, 1).reshape(self.tokens, -1) for part in (key, value)]
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
    config = getattr(module, "config", None) or backbone.model.config
    heads = config.num_attention_heads
    size = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    size = size or backbone.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, int(size)


class PrefixSlot(AddedKeysValues):
    """Keys and values of one layer, (kv heads, tokens, head width): stored here, or filled by the encoder."""

    def __init__(self, tokens: int, heads: int, size: int, stored: bool) -> None:
        super().__init__()
        self.shape = (tokens, heads, size)
        if stored:
            self.keys = new_parameter(tokens, heads * size, std=0.02)
            self.values = new_parameter(tokens, heads * size, std=0.02)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        tokens, heads, size = self.shape
        return (
            self.keys.view(tokens, heads, size).transpose(0, 1),
            self.values.view(tokens, heads, size).transpose(0, 1),
        )


class PrefixEncoder(Addition):
    """The reparameterisation: fills the slots of all layers before each forward pass of the model."""

    def __init__(self, tokens: int, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.embedding = new_parameter(tokens, width, std=0.02)
        self.trunk = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, outputs)
        self.__dict__["slots"] = []  # not children: they belong to their attention modules

    def fill(self) -> None:
        table = self.out(torch.tanh(self.trunk(self.embedding)))
        start = 0
        for slot in self.slots:
            _, heads, size = slot.shape
            step = heads * size
            slot.keys = table[:, start : start + step]
            slot.values = table[:, start + step : start + 2 * step]
            start += 2 * step

    def before(self, site: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self.fill()
        return None
