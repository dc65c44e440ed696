"""Virtual tokens after the embedded input of a model: an image's patches, a recording's frames, a user's own tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftkit.backbone.anatomy import Added, base_modules
from graftkit.backbone.calls import parameters_of
from graftkit.libraries import cache_names

POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")


class VirtualTokens(Added):
    """`tokens` trained positions of a model's input; a child of the model, whose hooks `insert` registers.

    `positions`: how many of the model's positions they take from the text.
    """

    tokens: int
    positions = 0

    def embeddings(self) -> Tensor:
        """Return the embeddings that the model reads, (tokens, width)."""
        raise NotImplementedError


def position_tables(model: nn.Module) -> list[nn.Embedding]:
    """Return the tables of learned positions, which a model looks up by number."""
    return [
        module
        for name, module in base_modules(model)
        if name.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding)
    ]


class BehindPatches:
    """Virtual tokens after the patches of an image or the frames of a recording, from the first block to the last.

    They enter at the first block that runs, which may vary if the model drops layers, and are cut off after the last.
    """

    def __init__(self, added: VirtualTokens) -> None:
        self.added = added
        self.length: int | None = None  # of the model's original input

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.length = None

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.added.active:
            return None
        given = by_name(module, args, kwargs)
        states, mask, tokens = given["hidden_states"], given.get("attention_mask"), self.added.tokens
        self.length = states.shape[1] if self.length is None else self.length
        if states.shape[1] == self.length:  # also if a block is recomputed for its gradients
            behind = self.added.embeddings().to(states.dtype).expand(len(states), -1, -1)
            given["hidden_states"] = torch.cat([states, behind], dim=1)
        if mask is not None and mask.shape[-1] == self.length:  # (rows, 1, length, length), with equal rows
            mask = nn.functional.pad(mask, (0, tokens), value=mask.dtype == torch.bool)
            if mask.shape[2] == self.length:
                mask = torch.cat([mask, mask[:, :, :1].expand(-1, -1, tokens, -1)], dim=2)
            given["attention_mask"] = mask
        names = list(given)[
            : len(args)
        ]  # positional arguments stay positional: transformers expects them there
        return tuple(given.pop(name) for name in names), given

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.length is None:
            return output
        return shorten(output, slice(self.length), self.length + self.added.tokens)


class BehindTokens:
    """Virtual tokens after the input tokens of an `nn.TransformerEncoder`.

    All tokens attend to them. If there is an attention mask, which may be causal, they attend only to themselves, so
    that no information about the text passes through them.
    """

    def __init__(self, added: VirtualTokens) -> None:
        self.added = added
        self.axis: int | None = None  # dimension of the positions in a batch

    def enter(
        self, module: nn.TransformerEncoder, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict] | None:
        self.axis = None
        if not self.added.active:
            return None
        given = by_name(module, args, kwargs)
        source, tokens = given["src"], self.added.tokens
        behind = self.added.embeddings().to(source.dtype)
        if source.dim() == 3:
            rows = 1 if module.layers[0].self_attn.batch_first else 0  # type: ignore[union-attr]
            self.axis = rows
            behind = behind.unsqueeze(1 - rows)
            behind = behind.expand(*(source.shape[i] if i != rows else tokens for i in (0, 1)), -1)
        else:
            self.axis = 0
        given["src"] = torch.cat([source, behind], dim=self.axis)
        padding, mask = given.get("src_key_padding_mask"), given.get("mask")
        if padding is not None:
            given["src_key_padding_mask"] = nn.functional.pad(padding, (0, tokens))
        if mask is not None:
            length = mask.shape[-1]
            mask = nn.functional.pad(mask, (0, tokens, 0, tokens))
            mask[..., length:, :length] = True if mask.dtype == torch.bool else float("-inf")
            given |= {"mask": mask, "is_causal": False}
        return (), given

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self.axis is None:
            return output
        return output.narrow(self.axis, 0, output.shape[self.axis] - self.added.tokens)


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by the parameter names of `forward`."""
    if not args:
        return dict(kwargs)
    return dict(zip(parameters_of(module), args)) | kwargs


def shorten(output: Any, kept: slice, length: int, start: str = "") -> Any:
    """Return the output with all states (rows, length, width) in it cut to the positions `kept`.

    `start`: prefix of the names of entries to cut.
    """
    if isinstance(output, Tensor):
        return output[:, kept] if output.dim() == 3 and output.shape[1] == length else output
    if isinstance(output, dict):
        for name, value in output.items():
            if name == "router_logits" and value is not None:  # (rows * length, experts)
                output[name] = tuple(
                    part.view(-1, length, part.shape[-1])[:, kept].flatten(0, 1) for part in value
                )
            elif name.startswith(start) and name != "attentions" and name not in cache_names():
                output[name] = shorten(value, kept, length)
        return output
    if type(output) in (tuple, list):
        return type(output)(shorten(value, kept, length) for value in output)
    return output
