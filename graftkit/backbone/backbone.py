"""The loaded model, its processor and its sites, as one value."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from graftkit.backbone.anatomy import Site, features, is_conv, is_linear, is_map, is_norm
from graftkit.backbone.parts import find_sites
from graftkit.backbone.quantized import shape_of
from graftkit.backbone.walk import parameters_of
from graftkit.errors import UserError
from graftkit.libraries import warn_of_untested

WIDTH_NAMES = ("hidden_size", "n_embd", "d_model", "dim", "num_features", "embed_dim")


@dataclass
class Backbone:
    """A pre-trained model with its processor and anatomy.

    `source`: the path, hub id or class name of the model, for messages.
    `pooling`: the sentence pooling that the folder specifies ('mean', 'cls', ...), if any.
    `missing`: names of parameters that the weights lacked, which are random: parts of a head.
    """

    model: nn.Module
    processor: Any = None
    source: str = ""
    pooling: str | None = None
    max_length: int | None = None
    missing: tuple[str, ...] = ()
    sites: tuple[Site, ...] = field(default=(), repr=False)
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        warn_of_untested()
        self.source = self.source or type(self.model).__name__
        if not self.sites:
            self.sites, self.blocks = find_sites(self.model)

    @cached_property
    def base_parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter that the model had before anything was grafted on it."""
        own = {site.name: site.module for site in self.sites}
        return {
            name: shape_of(own[name.rpartition(".")[0]], name.rpartition(".")[2], parameter)
            for name, parameter in parameters_of(self.model).items()
            if name.rpartition(".")[0] in own
        }

    @property
    def idle(self) -> set[str]:
        """Base parameters that do not affect the output: embeddings of masked audio if the config masks none, and in
        transformers models those of masked patches and words, used only in pre-training."""
        config = getattr(self.model, "config", None)
        masking = getattr(config, "apply_spec_augment", True) and getattr(config, "mask_time_prob", 1) > 0
        masks = set() if masking else {"masked_spec_embed"}
        if config is not None:
            masks |= {"mask_token", "mask_emb"}
        return {name for name in self.base_parameters if name.rpartition(".")[2] in masks}

    @property
    def fingerprint(self) -> str:
        """Digest of the names and shapes of the base's parameters, its head excluded.

        A graft is refused on a backbone with another fingerprint.
        """
        head = {site.name for site in self.sites if site.role == "head"}
        lines = (
            f"{name} {shape}"
            for name, shape in sorted(self.base_parameters.items())
            if name.rpartition(".")[0] not in head
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def hidden_size(self) -> int:
        """Width of the states that the model returns; for a convolutional one, channels.

        Raises `UserError` for a user's own module of unknown width.
        """
        pooled = getattr(getattr(self.model, "timm_model", None), "head_hidden_size", None)
        if isinstance(
            pooled, int
        ):  # some timm models have a layer between their feature maps and the classifier
            return pooled
        config = getattr(self.model, "config", None)
        sizes = getattr(config, "hidden_sizes", None)
        if isinstance(sizes, list | tuple) and sizes:
            return int(sizes[-1])
        for owner in (config, self.model):
            for name in WIDTH_NAMES:
                if isinstance(getattr(owner, name, None), int):
                    return getattr(owner, name)
        width = self._last_width()
        if width is None:
            raise UserError(
                f"the width of the states of {self.source} is unknown; give the module an attribute hidden_size."
            )
        return width

    def _last_width(self) -> int | None:
        """Return the input width of a module's own head, else the output width of its last part with a known one."""
        for site in self.sites:
            if site.role == "head" and is_map(site.module):
                return widths(site.module)[0]
        for site in reversed(self.sites):
            if isinstance(site.module, nn.Embedding):
                return site.module.embedding_dim
            if is_norm(site.module):
                return next(p.shape[-1] for p in site.module.parameters(recurse=False))
            if is_map(site.module):
                return widths(site.module)[1]
        return None

    @cached_property
    def heights(self) -> dict[str, int]:
        """For each base parameter, the index of its block, or of the block directly below it; -1 below all blocks.

        Parts between two blocks belong to the lower one. The order is that of definition.
        """
        height = -1
        found: dict[str, int] = {}
        for site in self.sites:
            height = height if site.block is None else site.block
            for name, _ in site.module.named_parameters(recurse=False):
                found.setdefault(f"{site.name}.{name}" if site.name else name, height)
        return found

    @property
    def is_decoder(self) -> bool:
        """Whether attention is causal, so that only the last token has seen the whole text."""
        model_type = getattr(getattr(self.model, "config", None), "model_type", "")
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )

        causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return causal and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES

    def module(self, name: str) -> nn.Module:
        """Return the module with this dotted name."""
        return self.model.get_submodule(name) if name else self.model


def widths(module: Any) -> tuple[int, int]:
    """Return (in, out): features of a linear layer, channels of a convolution, width of an attention."""
    if is_linear(module):
        return features(module)
    if is_conv(module):
        return module.in_channels, module.out_channels
    return module.embed_dim, module.embed_dim
