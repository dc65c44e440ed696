"""P-tuning v2: trained keys and values in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.anatomy import Added
from graftkit.backbone.attention import AddedKeysValues, adopt, attention_modules, shift_positions
from graftkit.backbone.prompts import refuse_crowd
from graftkit.errors import UserError
from graftkit.libraries import rotary_of, takes_cache
from graftkit.methods.base import Method, PeftForm, labels_of, new_parameter, place
from graftkit.methods.shared.advice import general, recommended
from graftkit.methods.shared.peft_reading import PeftReading
from graftkit.optim.labels import Group, Labels
from graftkit.recipe.catalogue import option

PACKED = "prefix_default.prompt_embeddings"  # keys and values of all layers, as PEFT stores them
PLAIN_ROTATIONS = ("default", "linear", "llama3")  # pure rotations, the same for every text length


@dataclass(frozen=True)
class Prefix(Method):
    """Prepend `tokens` trained keys and values to those of every attention layer.

    Liu et al. 2021, 'P-Tuning v2'; Li and Liang 2021, 'Prefix-Tuning', equation 2, and for the reparameterisation
    section 4.3: with `hidden`, keys and values are W2 tanh(W1 E + b1) + b2 of an embedding E (tokens, width).
    With `shift`, the positions of the text start after the prefix, as in PEFT and in the code of both papers, where the
    prefix is a cache; without it, the text keeps the positions that the model was trained with.
    When: the model's weights must not change, and a few more positions in each attention layer cost little.
    Parameters, for L attention layers: 2 * L * tokens * kv width; with `hidden`
    tokens * width + hidden * (width + 1) + (hidden + 1) * 2 * L * kv width.
    """

    peft_types = ("PREFIX_TUNING",)
    stage: ClassVar[int] = 4

    tokens: int = option(16, "number of trained positions in each layer", at_least=1)
    hidden: int = option(0, "width of the reparameterisation's hidden layer; 0 for none", at_least=0)
    shift: bool = option(False, "start the positions of the text after the prefix, as in PEFT")
    lr: float | None = option(None, "learning rate; null means 0.01", above=0)

    def attach(self, backbone: Backbone, graft: str) -> Labels:
        modules = attention_modules(backbone)
        if not modules:
            raise UserError(
                f"prefix() found no attention in {backbone.source}; use {recommended('is_general', 'composes')} instead."
            )
        adopt(backbone)
        group = Group("added", self.lr or 1e-2, self.name, self.lr is not None)
        name = f"prefix_{graft}"
        labels: Labels = {}
        shapes = [kv_shape(backbone, module) for _, _, module in modules]
        encoder, start = None, 0
        if self.shift:
            refuse_crowd(backbone, self.tokens, self.name)
            shift_positions(backbone, self.tokens, f"positions_{graft}")
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

    def never_folds(self) -> str:
        return (
            "prefix() cannot be folded: added keys and values have no equivalent in the plain architecture. "
            f"Keep the graft folder and load it with graftkit.load, or use {general()} if folding matters."
        )

    def to_peft(self, backbone: Backbone, graft: str) -> PeftForm | None:
        """Return all layers in one matrix (tokens, layers * 2 * kv width), ordered k0, v0, k1, v1, ...

        PEFT does not save the reparameterisation, so its result is written. PEFT puts the prefix at positions 0, 1, ...
        and the text after it, as `shift` does here. Without `shift` the text keeps its own positions; with rotary
        embeddings, where only distances matter, rotating the keys by `tokens` positions gives the same result. Other
        models, and those without a key-value cache, cannot be expressed.
        """
        modules = attention_modules(backbone)
        shapes = {kv_shape(backbone, module) for _, _, module in modules}
        bare = backbone.model.base_model
        turn = None if self.shift else _rotation(backbone, self.tokens)
        if len(shapes) != 1 or not takes_cache(bare) or hasattr(bare, "decoder") or not (self.shift or turn):
            return None
        columns = []
        for _, _, module in modules:
            key, value = getattr(module, f"prefix_{graft}").keys_values()
            key = turn(key) if turn else key
            columns += [part.transpose(0, 1).reshape(self.tokens, -1) for part in (key, value)]
        heads, size = shapes.pop()
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

    @classmethod
    def from_peft(cls, reading: PeftReading) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read a prefix. `prefix_projection` says how it was trained: PEFT saves only the result."""
        reading.ignore("prefix_projection", "encoder_hidden_size", "init_weights")
        tokens, layers, width, heads = (
            reading.field(name, None, int)
            for name in ("num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads")
        )
        if (parts := reading.field("num_transformer_submodules") or 1) != 1:
            raise reading.error(
                f"num_transformer_submodules={parts} is a prefix for both an encoder and a decoder, which graftkit "
                "does not read."
            )
        found = list(reading.take("prompt_embeddings").values())
        shape = tuple(found[0].shape) if found else None
        if tokens < 1 or heads < 1 or width % heads or shape != (tokens, 2 * layers * width):
            raise reading.error(
                f"num_virtual_tokens={tokens}, num_layers={layers}, token_dim={width} and num_attention_heads={heads} do "
                f"not fit prompt_embeddings of shape {shape}."
            )
        return {"tokens": tokens, "shift": True}, {PACKED: found[0]}

    def unpack(self, backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = tensors.pop(PACKED, None)
        if packed is None:
            return tensors
        modules = attention_modules(backbone)
        widths = [heads * size for heads, size in (kv_shape(backbone, module) for _, _, module in modules)]
        if packed.shape[1] != 2 * sum(widths):
            raise UserError(
                f"prompt_embeddings have {packed.shape[1]} columns, and keys and values of the {len(modules)} layers of "
                f"{backbone.source} are {2 * sum(widths)} wide: the prefix belongs to another model."
            )
        parts = iter(packed.float().split([width for width in widths for _ in range(2)], dim=1))
        for _, path, _ in modules:
            tensors |= {f"{path}.prefix_default.{name}": next(parts) for name in ("keys", "values")}
        return tensors


def _rotation(backbone: Backbone, tokens: int) -> Callable[[Tensor], Tensor] | None:
    """Return a function that rotates keys (kv heads, tokens, d) by `tokens` positions; None without plain rotations."""
    attention = attention_modules(backbone)[0][2]
    rotary = rotary_of(backbone.model, attention)
    if rotary is None or rotary.kind not in PLAIN_ROTATIONS:
        return None

    def turned(key: Tensor) -> Tensor:
        angles = rotary.angles(key, torch.tensor([[tokens]], device=key.device))
        width = angles[0].shape[-1]  # some models rotate only the first part of each head
        part = key[None, ..., :width]
        return torch.cat([rotary.turn(part, part, *angles)[1][0], key[..., width:]], dim=-1)

    return turned


def kv_shape(backbone: Backbone, module: nn.Module) -> tuple[int, int]:
    """Return (kv heads, head width) of an attention module."""
    config: Any = getattr(module, "config", None) or backbone.model.config

    def known(*names: str) -> int | None:
        values = (getattr(owner, name, None) for name in names for owner in (module, config))
        return next((value for value in values if isinstance(value, int)), None)

    heads = known("num_attention_heads", "n_heads")
    if heads is None:
        raise UserError(
            f"prefix() cannot find the number of heads of {type(module).__name__} in {backbone.source}; use "
            f"{recommended('is_general', 'composes')} instead."
        )
    size = known("head_dim", "attention_head_size", "key_value_proj_dim") or backbone.hidden_size // heads
    return known("num_key_value_heads") or heads, size


class PrefixSlot(AddedKeysValues):
    """Keys and values of one layer, (kv heads, tokens, head width): parameters, or columns of the encoder's output."""

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
        """Return `count` columns of the output (tokens, outputs) from `start`. Each layer computes its own."""
        hidden = torch.tanh(self.trunk(self.embedding))
        rows = slice(start, start + count)
        return nn.functional.linear(hidden, self.out.weight[rows], self.out.bias[rows])
