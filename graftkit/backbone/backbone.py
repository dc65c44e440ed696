"""The loaded model, its processor and its sites, as one value."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from graftkit.backbone.anatomy import Site
from graftkit.backbone.parts import find_sites


@dataclass
class Backbone:
    """A pre-trained model with its processor and anatomy.

    `source` is what messages call the model: the path, hub id or class name it came from.
    `pooling` is what the folder says of sentence pooling ('mean', 'cls', ...), if it says anything.
    `missing` names the parameters that the weights lacked, which are random: parts of a head.
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
        self.source = self.source or type(self.model).__name__
        if not self.sites:
            self.sites, self.blocks = find_sites(self.model)

    @cached_property
    def base_parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter that the model had before anything was grafted on it."""
        own = {site.name for site in self.sites}
        return {
            name: tuple(parameter.shape)
            for name, parameter in self.model.named_parameters()
            if name.rpartition(".")[0] in own
        }

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
        """Width of the hidden states."""
        config = getattr(self.model, "config", None)
        for name in ("hidden_size", "n_embd", "d_model", "dim"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
        embedding = next(site.module for site in self.sites if isinstance(site.module, nn.Embedding))
        return embedding.embedding_dim

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
        """The module of that dotted name."""
        return self.model.get_submodule(name) if name else self.model
