"""Pool the states of a model into one vector per row, and find which of them are padding."""

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
    """Return the default pooling of a model.

    What its class says as `pools`; else 'last' if attention is causal, so that only the last token has seen the whole
    text; 'cls' if a class token comes first, as in text encoders; 'mean' for others: feature maps, audio, users' own
    modules.
    """
    says = getattr(backbone.model, "pools", None)
    if isinstance(says, str):
        return says
    text = getattr(backbone.model, "main_input_name", None) == "input_ids"
    if text and (backbone.is_decoder or takes_decoder_inputs(backbone.model)):
        return "last"
    encoder_of_pair = getattr(getattr(backbone.model, "config", None), "is_encoder_decoder", False)
    return "cls" if has_class_token(backbone) or (text and not encoder_of_pair) else "mean"


def has_class_token(backbone: Backbone) -> bool:
    """Return whether the model itself prepends a learned token to its input."""
    return any(name.rpartition(".")[2] in CLASS_TOKENS for name in backbone.base_parameters)


def is_convolutional(backbone: Backbone) -> bool:
    """Return whether a model has convolutions but no attention: its states are (batch, channels, height, width)."""
    roles = {site.role for site in backbone.sites}
    return "conv" in roles and not roles & {"q", "k", "qkv"}


def takes_decoder_inputs(model: nn.Module) -> bool:
    """Return whether a model is an encoder-decoder."""
    return "decoder_input_ids" in parameters_of(model)


def pool(states: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Pool states (batch, length, width) to (batch, width), in their dtype; mask is 1 on real tokens."""
    if mask is None:
        mask = states.new_ones(states.shape[:2])
    rows = torch.arange(len(states), device=states.device)
    if pooling == "cls":
        return states[rows, mask.long().argmax(dim=1)]  # after the padding, if it is on the left
    if pooling == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        return states[rows, (positions * mask.long()).argmax(dim=1)]
    weights = mask.to(states.dtype)
    return (states * weights.unsqueeze(-1)).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)


def mask_of_states(module: Any, states: Tensor, given: dict[str, Any]) -> Tensor | None:
    """Return the mask of the states (batch, length, width) of a model, from the inputs that it was called with.

    It is (batch, length), with 1 on real states; None if nothing was masked. A mask of audio samples is converted to
    frames by the model's own method. Raises `UserError` if a mask cannot be converted to the length of the states:
    guessing would let padding into the result.
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
            "count as text; rename the argument to attention_mask (1 on real tokens, 0 on padding)."
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
        f"head(): the attention_mask has shape {list(mask.shape)}, but {type(module).__name__} returns "
        f"{states.shape[1]} states per row and no rule to convert the mask, so padding would count as input. Leave "
        "the mask out if all rows have the same length, or pass one of the states' length."
    )


def shifted(ids: Tensor, config: Any) -> Tensor:
    """Shift token ids (batch, length) one place to the right, after the token that a decoder starts with."""
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "pad_token_id", None) if start is None else start
    return torch.cat([torch.full_like(ids[:, :1], start or 0), ids[:, :-1]], dim=1)


def named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names in `forward`."""
    if not args:
        return kwargs
    bound = signature_of(module).bind_partial(*args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def maps_to_features(states: Tensor, output: Any) -> Tensor:
    """Pool feature maps (batch, channels, height, width) to (batch, channels): the model's own pooled output, which is
    their mean after its norm, if any, or the plain mean.
    """
    own = None if isinstance(output, Tensor) or len(output) < 2 else output[1]
    if isinstance(own, Tensor) and (own.dim() == 2 or own.shape[:2] == states.shape[:2]):
        return own.flatten(1).float()
    return states.float().flatten(2).mean(dim=-1)
