"""From the states that a model gives to one vector a row, and which of them are padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.backbone import Backbone
from graftkit.backbone.calls import parameters_of, signature_of
from graftkit.errors import UserError
from graftkit.libraries import method_of

CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def default_pooling(backbone: Backbone) -> str:
    """How the states of a model become one vector where nothing says so.

    'last' where attention is causal, so that only the last token has seen the whole; 'cls' where a class token stands
    in front, as in encoders of text; 'mean' for the others: feature maps, sound, users' own modules.
    """
    text = getattr(backbone.model, "main_input_name", None) == "input_ids"
    if text and (backbone.is_decoder or takes_decoder_inputs(backbone.model)):
        return "last"
    encoder_of_pair = getattr(getattr(backbone.model, "config", None), "is_encoder_decoder", False)
    return "cls" if has_class_token(backbone) or (text and not encoder_of_pair) else "mean"


def has_class_token(backbone: Backbone) -> bool:
    """Whether the model itself puts a learned token in front of its input."""
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name in backbone.base_parameters)


def is_convolutional(backbone: Backbone) -> bool:
    """Whether a model has convolutions and no attention, so that its states are maps (batch, channels, height, width)."""
    roles = {site.role for site in backbone.sites}
    return "conv" in roles and not roles & {"q", "k", "qkv"}


def takes_decoder_inputs(model: nn.Module) -> bool:
    """Whether a model is an encoder with a decoder."""
    return "decoder_input_ids" in parameters_of(model)


def pool(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """(batch, width) of states (batch, length, width), in their type; mask is 1 on real tokens."""
    if mask is None:
        mask = states.new_ones(states.shape[:2])
    rows = torch.arange(len(states), device=states.device)
    if pooling == "cls":
        return states[rows, mask.long().argmax(dim=1)]  # past the padding, where it is on the left
    if pooling == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        return states[rows, (positions * mask.long()).argmax(dim=1)]
    weights = mask.to(states.dtype)
    return (states * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)


def mask_of_states(module: Any, states: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Which of the states (batch, length, width) of a model are real, from the inputs that it was called with.

    1 on real ones, (batch, length); None where nothing was masked. A mask of samples is translated to frames by the
    model's own arithmetic. Raises `UserError` where a mask cannot be brought to the length of the states: guessing
    would let padding into the result.
    """
    mask = given.get("attention_mask")
    if given.get("decoder_input_ids") is not None or given.get("decoder_inputs_embeds") is not None:
        mask = given.get("decoder_attention_mask")
    foreign = [
        name for name, value in given.items()
        if name.endswith("mask") and isinstance(value, Tensor) and value.shape == states.shape[:2]
        and name not in ("attention_mask", "decoder_attention_mask")
    ]  # fmt: skip
    if mask is None and foreign and not hasattr(module, "config"):
        raise UserError(
            f"head() does not know what {foreign[0]!r} of {type(module).__name__}.forward means, so padding would "
            "count as text; call the argument attention_mask (1 on real tokens, 0 on padding)."
        )
    if mask is None or mask.shape == states.shape[:2]:
        return mask
    if mask.dim() == 2:
        if (frames := method_of(module, "_get_feature_vector_attention_mask")) is not None:
            return frames(states.shape[1], mask)
        prefix = mask.long().sum(dim=1)
        is_prefix = bool((mask.long().cumsum(dim=1).argmax(dim=1) + 1 == prefix).all())
        counts = method_of(module, "_get_feat_extract_output_lengths")
        if counts is not None and is_prefix:
            lengths = counts(prefix)
            return (torch.arange(states.shape[1], device=states.device) < lengths[:, None]).to(mask.dtype)
    raise UserError(
        f"head(): the attention_mask is {list(mask.shape)}, but {type(module).__name__} gives "
        f"{states.shape[1]} states a row and has no rule from one to the other, so padding would count as input. Leave "
        "the mask out where rows have one length, or hand over one of the states' length."
    )


def shifted(ids: Tensor, config: Any) -> Tensor:
    """Token ids (batch, length) one place to the right, behind the token that a decoder starts with."""
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "pad_token_id", None) if start is None else start
    return torch.cat([torch.full_like(ids[:, :1], start or 0), ids[:, :-1]], dim=1)


def named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that `forward` gives them."""
    if not args:
        return kwargs
    bound = signature_of(module).bind_partial(*args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def maps_to_features(states: Tensor, output: Any) -> Tensor:
    """(batch, channels) of feature maps (batch, channels, height, width): the model's own pooled output, which is their
    mean behind whatever norm belongs to it, or the mean itself.
    """
    own = None if isinstance(output, Tensor) or len(output) < 2 else output[1]
    if isinstance(own, Tensor) and (own.dim() == 2 or own.shape[:2] == states.shape[:2]):
        return own.flatten(1).float()
    return states.float().flatten(2).mean(dim=-1)
