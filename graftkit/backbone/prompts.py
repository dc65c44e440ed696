"""Virtual tokens: trained positions that a transformers model reads beside its input.

They are placed before the embeddings of a text, or after those of an image's patches or a recording's frames. Hooks
lengthen the model's input and cut its output to the original length, so that heads, losses and pooling see only the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.anatomy import Added, base_modules
from graftkit.backbone.backbone import Backbone
from graftkit.backbone.blocks import find_blocks
from graftkit.backbone.calls import parameters_of
from graftkit.backbone.load import positions_of
from graftkit.backbone.tokens import (
    BehindPatches,
    BehindTokens,
    VirtualTokens,
    by_name,
    position_tables,
    shorten,
)
from graftkit.backbone.walk import modules_of
from graftkit.errors import UserError
from graftkit.libraries import tokens_seen

# models of patches or frames whose blocks use no order and no grid, so that they accept more tokens
PATCHED = (
    "audio-spectrogram-transformer",
    "deit",
    "dinov2",
    "hubert",
    "vit",
    "vit_mae",
    "wav2vec2",
    "whisper",
)


@dataclass(frozen=True)
class Entrance:
    """Where virtual tokens enter a model.

    `module` reads them; `bare` is the model without its head. `table`: the embeddings of the vocabulary, None for
    patches or frames. `cut`: whether the output of `module` is cut to the length of its original input.
    """

    module: nn.Module
    bare: nn.Module
    width: int
    table: nn.Embedding | None = None
    cut: bool = True


def find_entrance(backbone: Backbone, method: str) -> Entrance:
    """Return where virtual tokens enter a model. Raises `UserError`, naming the method, if it takes none."""
    from transformers import PreTrainedModel

    model = backbone.model
    if isinstance(model, PreTrainedModel):
        bare = model.base_model
        decoder = getattr(bare, "decoder", None)
        encoder = getattr(bare, "encoder", None) if decoder is not None else None
        reader = encoder if encoder is not None else _reader(backbone)
        if encoder is None and isinstance(decoder, PreTrainedModel):  # OPT's head calls this one itself
            reader = decoder
        if {"input_ids", "inputs_embeds"} <= set(parameters_of(reader)):
            table = reader.get_input_embeddings()  # type: ignore[operator]
            if isinstance(table, nn.Embedding):
                return Entrance(reader, bare, table.embedding_dim, table, cut=encoder is None)
        if model.config.model_type in PATCHED:
            root = bare if encoder is None else encoder
            block = find_blocks(root)[0][0]
            stack = root.get_submodule(".".join(block.split(".")[:-2]))
            return Entrance(stack, bare, backbone.hidden_size)
    encoders = [module for _, module in base_modules(model) if isinstance(module, nn.TransformerEncoder)]
    attention = getattr(encoders[0].layers[0], "self_attn", None) if len(encoders) == 1 else None
    if isinstance(attention, nn.MultiheadAttention):
        return Entrance(encoders[0], model, attention.embed_dim)
    raise UserError(
        f"{method}() adds trained tokens to those that a model reads, but {type(model).__name__} has no place for them: "
        "it takes no token embeddings (inputs_embeds), and is not known to have blocks that read any number of "
        "tokens. Use lora() or adapter() instead."
    )


def _reader(backbone: Backbone) -> nn.Module:
    """Return the bare model, or an encoder with its classification head, as that pools on the first position.

    The heads of decoders pool on a row's last token, which they find in the ids of the original text.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES,
    )

    model: Any = backbone.model
    headed = type(model).__name__ in CLASSES.values()
    return model if headed and not backbone.is_decoder else model.base_model


def insert(backbone: Backbone, entrance: Entrance, added: VirtualTokens, method: str) -> None:
    """Let the model read the virtual tokens, which are already its child. Their handles remove all hooks."""
    hooks: list[tuple[nn.Module, Callable | None, Callable | None]]
    if isinstance(entrance.module, nn.TransformerEncoder):
        behind = BehindTokens(added)
        hooks = [(entrance.module, behind.enter, behind.leave)]
    elif entrance.table is None:
        patches = BehindPatches(added)
        hooks = [(entrance.module, patches.start, patches.leave)]
        hooks += [(block, patches.enter, None) for _, block in find_blocks(entrance.module)]
        if entrance.bare is not entrance.module:
            hooks.append((entrance.bare, None, patches.leave))
    else:
        refuse_crowd(backbone, added.tokens, method)
        added.positions = added.tokens
        front = InFront(added, backbone, entrance.cut)
        hooks = [(entrance.module, front.enter, front.leave)]
        if not entrance.cut:
            hooks.append((entrance.bare, front.widen, front.narrow))
    handles = added.__dict__.setdefault("handles", [])
    for module, before, after in hooks:
        if before is not None:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:  # first of all, so that a head sees what is left
            handles.append(module.register_forward_hook(after, with_kwargs=True, prepend=True))


def refuse_crowd(backbone: Backbone, tokens: int, method: str) -> None:
    """Raise `UserError` if the virtual tokens leave none of the model's positions for a text."""
    limit = positions_of(backbone.model)
    if limit is not None and tokens + positions_taken(backbone.model) >= limit:
        raise UserError(
            f"{method}(tokens={tokens}) leaves no room for a text: {backbone.source} has {limit} positions. "
            "Use fewer tokens."
        )


def positions_taken(model: nn.Module) -> int:
    """Return how many of a model's positions its grafts take from the text."""
    return sum(
        getattr(module, "positions", 0) for module in modules_of(model).values() if isinstance(module, Added)
    )


class InFront:
    """Virtual tokens in front of a text.

    The attention mask is extended by ones, token types by zeros; positions passed by the caller are those of the text. With
    a cache, the tokens are read only in the first pass and are then part of the cache. The output (last and all hidden
    states, router logits) is cut to the text; attentions and pooled outputs are unchanged.
    """

    def __init__(self, added: VirtualTokens, backbone: Backbone, cut: bool) -> None:
        self.added = added
        self.source = backbone.source
        self.cut = cut
        self.given: dict[str, Any] | None = None  # the caller's arguments, while the model runs
        self.length = 0  # of the model's input, including virtual tokens
        tables = position_tables(backbone.model)
        self.limit = positions_of(backbone.model) if tables else None
        padding = tables[0].padding_idx if tables else None
        self.first = 0 if padding is None else padding + 1  # RoBERTa counts from after its padding

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self.given = None
        given = by_name(module, args, kwargs)
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        if not self.added.active or (ids is None and embeddings is None):
            return None
        seen = tokens_seen(given)
        if seen is None:
            return None
        rows, length = given["input_ids" if embeddings is None else "inputs_embeds"].shape[:2]
        new = dict(given)
        if given.get("attention_mask") is not None:
            new["attention_mask"] = self._mask(given["attention_mask"], length, seen)
        tokens, positions = self.added.tokens, given.get("position_ids")
        if positions is not None:
            new["position_ids"] = positions + tokens
        if seen:
            return (), new
        if self.limit is not None and length + tokens > self.limit:
            raise UserError(
                f"a text of {length} tokens and {tokens} virtual tokens do not fit into the {self.limit} positions of "
                f"{self.source}. Cut texts to {self.limit - tokens} tokens (data.max_length), or use fewer virtual tokens."
            )
        if positions is not None:
            first = torch.arange(self.first, self.first + tokens, device=positions.device)
            first = first.to(positions.dtype).expand(*positions.shape[:-1], -1)
            new["position_ids"] = torch.cat([first, new["position_ids"]], dim=-1)
        if embeddings is None:
            embeddings = module.get_input_embeddings()(ids)  # type: ignore[operator]
        front = self.added.embeddings().to(embeddings.dtype).expand(rows, -1, -1)
        new |= {"input_ids": None, "inputs_embeds": torch.cat([front, embeddings], dim=1)}
        types = given.get("token_type_ids")
        if types is not None:
            new["token_type_ids"] = torch.cat([types.new_zeros(rows, tokens), types], dim=1)
        self.length = length + tokens
        self.given = given if self.cut else None
        return (), new

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.given is None:
            return output
        kwargs.clear()  # all hooks get this dictionary: later ones see the caller's mask again
        kwargs.update(self.given)
        self.given = None
        return shorten(output, slice(self.added.tokens, None), self.length)

    def widen(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Extend the mask of an encoder-decoder, so that cross-attention sees the virtual tokens too."""
        given = by_name(module, args, kwargs)
        mask, encoded = given.get("attention_mask"), given.get("encoder_outputs")
        if not self.added.active or mask is None:
            return None
        if encoded is not None and encoded[0].shape[1] != mask.shape[1] + self.added.tokens:
            return None
        return (), {**given, "attention_mask": _ones_before(mask, self.added.tokens)}

    def narrow(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Cut the encoder's outputs in those of an encoder-decoder to the text."""
        if not self.added.active or not isinstance(output, dict):
            return output
        return shorten(output, slice(self.added.tokens, None), self.length, "encoder_")

    def _mask(self, mask: Any, length: int, seen: int) -> Tensor:
        """Return the mask with ones for the virtual tokens, if it lacks them."""
        tokens = self.added.tokens
        whole = seen + length if seen else tokens + length
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] + tokens == whole:
            return _ones_before(mask, tokens)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == whole:
            return mask
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(
            f"with {tokens} virtual tokens, {self.source} needs an attention_mask of (rows, {whole - tokens}), not "
            f"{shape}. Leave cache_implementation out, and do not use a cache that was made without the virtual tokens."
        )


def _ones_before(mask: Tensor, tokens: int) -> Tensor:
    return torch.cat([mask.new_ones(len(mask), tokens), mask], dim=1)
