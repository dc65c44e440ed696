"""An attention function for transformers models to which keys and values can be added.

Models of transformers 5 call an attention function by name. `adopt` gives a model ours, which is theirs
(`sdpa`) plus the keys and values of additions on the attention module. This is more robust than
passing prefixes as a cache: it works for encoders, grouped-query heads, rotary positions and generation.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone import packed
from graftkit.backbone.anatomy import Added, base_modules
from graftkit.backbone.backbone import Backbone
from graftkit.backbone.calls import parameters_of
from graftkit.backbone.tokens import by_name, position_tables
from graftkit.errors import UserError
from graftkit.libraries import set_attention

NAME = "graftkit_sdpa"


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over the added keys and values and the usual ones.

    query (batch, heads, length, d); key, value (batch, kv heads, kv length, d); mask None, boolean
    (True = attend) or additive, (batch, 1 or heads, length, kv length).
    """
    parts = packed.current()
    if parts is None or attention_mask is not None or kwargs.get("position_bias") is not None:
        return _attend(module, query, key, value, attention_mask, **kwargs)
    if not any(isinstance(child, AddedKeysValues) and child.active for child in module.children()):
        found = packed.at_once(query, key, value, parts, kwargs)
        if found is not None:
            return found, None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend(module, query, key, value, None, **kwargs)[0]

    return packed.one_by_one(query, key, value, parts, attend), None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for child in module.children():
        if isinstance(child, AddedKeysValues) and child.active:
            key, value, attention_mask = extend(module, child, query, key, value, attention_mask, kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


class AddedKeysValues(Added):
    """An addition on an attention module that provides keys and values, each (kv heads, tokens, d)."""

    def keys_values(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class ShiftedPositions(Added):
    """Shifts the positions of the text, except those of padding, by `positions`.

    It hooks tables of learned positions and rotary embeddings.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.positions = tokens

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.active:
            return None
        given = by_name(module, args, kwargs)
        name = "input" if isinstance(module, nn.Embedding) else "position_ids"
        positions: Tensor = given[name]
        given[name] = positions + self.positions
        if isinstance(module, nn.Embedding):
            padding = module.padding_idx
            room = module.num_embeddings - (0 if padding is None else padding + 1) - self.positions
            if positions.shape[-1] > room:
                raise UserError(
                    f"a text of {positions.shape[-1]} tokens does not fit after the {self.positions} of the prefix: cut "
                    f"texts to {room} tokens (data.max_length), use fewer prefix tokens, or set shift=False."
                )
            if padding is not None:
                given[name] = torch.where(positions == padding, positions, given[name])
        return (), given


def shift_positions(backbone: Backbone, tokens: int, name: str) -> None:
    """Add `ShiftedPositions` to a model. Raises `UserError` if its positions cannot be shifted."""
    model = backbone.model
    reads_text = "input_ids" in parameters_of(model.base_model)  # type: ignore[arg-type]
    places: list[nn.Module] = [table for table in position_tables(model) if type(table) is nn.Embedding]
    places += [
        module
        for _, module in base_modules(model)
        if "Rotary" in type(module).__name__ and "position_ids" in parameters_of(module)
    ]
    if not places or not reads_text:
        raise UserError(
            f"prefix(shift=True): {type(model).__name__} has no text positions that could be shifted; use "
            "prefix(shift=False), or lora()."
        )
    shifted = ShiftedPositions(tokens)
    model.add_module(name, shifted)
    shifted.__dict__["handles"] = [
        place.register_forward_pre_hook(shifted.before, with_kwargs=True) for place in places
    ]


def extend(
    module: nn.Module, added: AddedKeysValues, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Prepend the added keys and values; every query may attend to them."""
    batch, _, length, _ = query.shape
    new_key, new_value = added.keys_values()
    tokens = new_key.shape[1]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and length > 1:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=key.device)
        mask = mask.tril(key.shape[2] - length)[None, None]
    if mask is not None:
        front = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
        mask = torch.cat([front.expand(*mask.shape[:-1], tokens), mask], dim=-1)
    if kwargs.get("position_bias") is not None:  # T5: no bias towards added keys
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (tokens, 0))
    key = torch.cat([new_key.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([new_value.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    return key, value, mask


def adopt(backbone: Backbone) -> None:
    """Make a transformers model call `attention_forward`. Raises `UserError` if that is impossible."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    model = backbone.model
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise UserError(
            f"{type(model).__name__} does not call its attention through transformers' attention interface, so "
            "keys and values cannot be added to it. Use lora or adapter instead."
        )
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, packed.mask)
    try:
        set_attention(model, NAME)
    except ValueError as error:  # attention that sdpa does not support, such as soft-capped scores
        raise UserError(
            f"{type(model).__name__} cannot compute its attention as sdpa ({str(error).split('.')[0]}), so keys and "
            "values cannot be added to it. Use lora or adapter instead."
        ) from None


def keep_parts_apart(backbone: Backbone) -> bool:
    """Make a model that attends by sdpa attend within parts of packed rows; return whether it now does so."""
    if getattr(getattr(backbone.model, "config", None), "_attn_implementation", None) == "sdpa":
        with suppress(UserError):  # transformers' mask keeps them apart
            adopt(backbone)
    return getattr(getattr(backbone.model, "config", None), "_attn_implementation", None) == NAME


def release(model: nn.Module, implementation: str | None) -> None:
    """Restore a model's own attention, unless an addition still needs ours."""
    config = getattr(model, "config", None)
    if implementation is None or getattr(config, "_attn_implementation", None) != NAME:
        return
    if implementation != NAME and not any(isinstance(module, AddedKeysValues) for module in model.modules()):
        set_attention(model, implementation)


def attention_modules(backbone: Backbone) -> list[tuple[int, str, nn.Module]]:
    """Return (block, name, module) of the module in each block that calls the attention function: the parent of q."""
    found = []
    for site in backbone.sites:
        if site.block is not None and site.role in ("q", "qkv"):
            name = site.name.rpartition(".")[0]
            found.append((site.block, name, backbone.module(name)))
    return found
