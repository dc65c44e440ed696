"""Sizes of models that are made new, by name: a configuration of transformers with a number of layers, a width and so on.

Sizes of BERT and GLM: Turc et al. 2019, "Well-Read Students Learn Better"; of GPT: minGPT's gpt-mini and GPT-2 (Radford et
al. 2019); of Llama: the models of 60 M and 130 M parameters of GaLore (Zhao et al. 2024, table 11); t5-small is that of T5
(Raffel et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftkit.errors import UserError, listing, nearest


@dataclass(frozen=True)
class Geometry:
    """The shape of a new model.

    `family`: the first part of its name. `positions`: the longest row. `vocabulary`: size of the tokenizer that is trained
    for it by default. `lr`: learning rate that pre-training of this size begins with by default.
    """

    name: str
    layers: int
    width: int
    heads: int
    hidden: int
    positions: int
    vocabulary: int
    lr: float

    @property
    def family(self) -> str:
        return self.name.partition("-")[0]

    def values(self) -> dict[str, Any]:
        """Return the arguments of the family's configuration class."""
        return FAMILIES[self.family].values(self)


@dataclass(frozen=True)
class Family:
    """How a family writes its sizes. `config`: the configuration class in transformers, or a function that returns it.
    `writes`: the models have a decoder beside an encoder, which begins with the padding token, as in T5."""

    config: str | Callable[[], Any]
    values: Callable[[Geometry], dict[str, Any]]
    writes: bool = False

    def config_class(self) -> Any:
        import transformers

        return getattr(transformers, self.config) if isinstance(self.config, str) else self.config()


def _bert(g: Geometry) -> dict[str, Any]:
    return {
        "num_hidden_layers": g.layers, "hidden_size": g.width, "num_attention_heads": g.heads,
        "intermediate_size": g.hidden, "max_position_embeddings": g.positions,
    }  # fmt: skip


def _gpt(g: Geometry) -> dict[str, Any]:
    return {
        "n_layer": g.layers,
        "n_embd": g.width,
        "n_head": g.heads,
        "n_inner": g.hidden,
        "n_positions": g.positions,
    }


def _t5(g: Geometry) -> dict[str, Any]:
    return {
        "num_layers": g.layers, "num_decoder_layers": g.layers, "d_model": g.width, "num_heads": g.heads,
        "d_kv": g.width // g.heads, "d_ff": g.hidden,
    }  # fmt: skip


def _glm() -> Any:
    from graftkit.backbone.glm import GraftKitGlmConfig  # which registers it with transformers

    return GraftKitGlmConfig


FAMILIES = {
    "bert": Family("BertConfig", _bert),
    "gpt": Family("GPT2Config", _gpt),
    "glm": Family(_glm, _bert),
    "llama": Family("LlamaConfig", _bert),  # writes its sizes as BERT does
    "t5": Family("T5Config", _t5, writes=True),
}
GEOMETRIES: dict[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        Geometry("bert-tiny", 2, 128, 2, 512, 128, 4096, 2e-3),
        Geometry("bert-mini", 4, 256, 4, 1024, 256, 8192, 1e-3),
        Geometry("bert-small", 4, 512, 8, 2048, 512, 16384, 5e-4),
        Geometry("bert-medium", 8, 512, 8, 2048, 512, 30522, 5e-4),
        Geometry("bert-base", 12, 768, 12, 3072, 512, 30522, 2e-4),
        Geometry("glm-tiny", 2, 128, 2, 512, 128, 4096, 2e-3),
        Geometry("glm-mini", 4, 256, 4, 1024, 256, 8192, 1e-3),
        Geometry("glm-small", 4, 512, 8, 2048, 512, 16384, 5e-4),
        Geometry("gpt-tiny", 4, 128, 4, 512, 128, 4096, 2e-3),
        Geometry("gpt-mini", 6, 192, 6, 768, 256, 8192, 1e-3),
        Geometry("gpt-small", 12, 768, 12, 3072, 1024, 50257, 6e-4),
        Geometry("llama-tiny", 2, 128, 2, 344, 128, 4096, 2e-3),
        Geometry("llama-mini", 4, 256, 4, 688, 256, 8192, 1e-3),
        Geometry("llama-small", 8, 512, 8, 1376, 1024, 32000, 1e-3),
        Geometry("llama-base", 12, 768, 12, 2048, 1024, 32000, 6e-4),
        Geometry("t5-tiny", 2, 128, 2, 512, 128, 4096, 2e-3),
        Geometry("t5-mini", 4, 256, 4, 1024, 256, 8192, 1e-3),
        Geometry("t5-small", 6, 512, 8, 2048, 512, 32000, 5e-4),
    )
}


def geometry_of(size: str, family: str) -> Geometry:
    """Return the geometry of a name such as `bert-mini`, or `mini` alone in the objective's own family.

    Raises `UserError` for an unknown one.
    """
    name = size if "-" in size else f"{family}-{size}"
    if name not in GEOMETRIES:
        raise UserError(
            f"size {size!r} is unknown (sizes: {listing(GEOMETRIES, 30)}).{nearest(name, GEOMETRIES)}"
        )
    return GEOMETRIES[name]


def configuration(geometry: Geometry, tokenizer: Any) -> Any:
    """Return the transformers configuration of a new model for a tokenizer."""
    named = {
        f"{name}_token_id": number
        for name in ("pad", "bos", "eos")
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    kind = FAMILIES[geometry.family].config_class()
    if FAMILIES[geometry.family].writes:
        named["decoder_start_token_id"] = named.get("pad_token_id", named.get("eos_token_id"))
    unnamed = {f"{name}_token_id": None for name in ("pad", "bos", "eos")}
    return kind(vocab_size=len(tokenizer), **geometry.values(), **unnamed | named)


def shaped(geometry: Geometry, vocabulary: int) -> Any:
    """Return the configuration of a model of this size and number of tokens, without special tokens."""
    return FAMILIES[geometry.family].config_class()(vocab_size=vocabulary, **geometry.values())


def write_new(
    geometry: Geometry, auto: Callable[[str], str | None], tokenizer: Any, folder: Path, seed: int
) -> None:
    """Write a model of a geometry, initialized at random from a seed, and its tokenizer to a folder.

    `auto`: the auto class of transformers for a model type, or None if the type has none. Raises `UserError` then.
    """
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = configuration(geometry, tokenizer)
    kind = auto(config.model_type)
    if kind is None:
        raise UserError(
            f"a model of size {geometry.name!r} has no head for this objective; choose another family."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind).from_config(config)
    tokenizer.model_max_length = geometry.positions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
