"""Load a model and its processor into a `Backbone`.

Weights must be safetensors, no remote code runs, and nothing is downloaded unless a hub id is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftkit.backbone import quantized
from graftkit.backbone.anatomy import is_map
from graftkit.backbone.backbone import Backbone
from graftkit.backbone.fit import refuse_misfit_tokenizer
from graftkit.backbone.folder import CONFIG, PREPROCESSOR_FILE, PROCESSOR_FILES, weights_files
from graftkit.backbone.memory import is_out_of_memory
from graftkit.backbone.own import load_weights
from graftkit.backbone.parts import find_sites
from graftkit.backbone.sizes import allowance_for
from graftkit.backbone.source import Source, pooling_of
from graftkit.errors import UserError, listing
from graftkit.files import read_json, read_shapes
from graftkit.libraries import image_processors


def load_backbone(
    source: Source,
    native: str | None = None,
    *,
    labels: Sequence[str] | None = None,
    complete: bool = False,
    meta: bool = False,
    seed: int = 0,
) -> Backbone:
    """Load the model and its processor.

    `native`: the auto class of transformers that builds the architecture with its own head (see `auto_class`);
    without it, the bare encoder or decoder is loaded. `labels`: outputs of that head. `complete`: the folder must
    contain the trained head. `meta`: shapes only, no weights are read; for the plan and for `inspect`.
    """
    if source.made is not None:
        if source.weights is not None:
            load_weights(source.made.model, source.weights, source.name, meta=meta)
        source.made.model.eval()
        return source.made
    assert source.folder is not None
    config, processor = _described(source)
    known = [name for _, name in sorted(config.id2label.items())] if labels is not None else []
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    tokenizer = processor if hasattr(processor, "pad_token_id") else None
    if tokenizer is not None:
        _agree_on_padding(tokenizer, config)
    model, missing = _built(source, native or "AutoModel", config, labels is not None, meta, seed)
    model.eval()
    length = _max_length(source.folder, model, tokenizer) if tokenizer is not None else None
    backbone = Backbone(model, processor, source.name, pooling_of(source.folder), length, missing=missing)
    if labels is not None and not meta:
        _reorder_head(backbone, known, labels)
    if tokenizer is not None:
        refuse_misfit_tokenizer(backbone, tokenizer, config, pools="SequenceClassification" in (native or ""))
    _refuse_holes(backbone, complete)
    return backbone


def _described(source: Source) -> tuple[Any, Any]:
    """Return the configuration and the processor in a model's folder."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    assert source.folder is not None
    folder = source.folder
    config = _read(str(folder / CONFIG), lambda: transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    ))  # fmt: skip
    files = [name for name in PROCESSOR_FILES if (folder / name).exists()]
    return config, _read(f"the processor in {folder} ({listing(files)})", lambda: _processor(folder))


def _read(what: str, read: Callable[[], Any]) -> Any:
    """Return what transformers reads from a folder. Raises `UserError` if it cannot, whatever error it raises."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what} cannot be read: {_why(error)}") from None


def _why(error: Exception) -> str:
    """Return the message of an error in one line, with its class if that says more."""
    text = " ".join(str(error).split())
    text = f"{text[:300]} ..." if len(text) > 300 else text
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"


def _built(
    source: Source, kind: str, config: Any, new_head: bool, meta: bool, seed: int
) -> tuple[Any, tuple[str, ...]]:
    """Return the model of an auto class, and the names of the parameters that its folder lacks."""
    import transformers

    assert source.folder is not None
    auto, more = getattr(transformers, kind), {}
    try:
        if source.quantize is not None:
            kept = _never_quantized(auto, source.folder, config)
            more = quantized.loading(source.quantize, source.name, kept)
        if not meta:
            with allowance_for(source.folder):
                return _read_model(auto, source.folder, config, seed, new_head, more)
        with torch.device("meta"), allowance_for(source.folder):
            model = auto.from_config(config)
        missing = _missing(model, source.folder)
        if source.quantize is not None:
            quantized.with_shapes(model, source.quantize, kept)
        return model, missing
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"model {source.name!r} cannot be loaded as its {CONFIG} describes it: {_why(error)}"
        ) from None


def _never_quantized(auto: Any, folder: Path, config: Any) -> tuple[str, ...]:
    """Return the names of the head's layers, and of layers that are new or have another size in the weights."""
    with torch.device("meta"), allowance_for(folder):
        model = auto.from_config(config)
    heads = [site.name for site in find_sites(model)[0] if site.role == "head"]
    return tuple(dict.fromkeys([*heads, *(name.rpartition(".")[0] for name in _missing(model, folder))]))


def _read_model(
    auto: Any, folder: Path, config: Any, seed: int, ignore_sizes: bool, more: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model, and the parameters that were randomly initialised because the weights lack them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = auto.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=ignore_sizes, output_loading_info=True, **more,
        )  # fmt: skip
    quantized.keep_gradients(model)
    quantized.keep_biases(model)
    misshapen = {entry[0] for entry in info["mismatched_keys"]}
    return model, tuple(sorted({*info["missing_keys"], *misshapen}))


def _reorder_head(backbone: Backbone, known: Sequence[str], labels: Sequence[str]) -> None:
    """Reorder the outputs of the trained head to the order of `labels`, if it has the same labels in another order."""
    if list(known) == list(labels) or sorted(known) != sorted(labels) or len(set(known)) != len(known):
        return
    maps = [site for site in backbone.sites if site.role == "head" and is_map(site.module)]
    order = torch.tensor([list(known).index(label) for label in labels])
    for site in maps[-1:]:
        for name, parameter in site.module.named_parameters(recurse=False):
            if len(parameter) == len(order) and f"{site.name}.{name}" not in backbone.missing:
                with torch.no_grad():
                    parameter.copy_(parameter[order])


def _processor(folder: Path) -> Any:
    """Return the tokenizer of a folder, or its image processor or feature extractor if it is not a text model."""
    import transformers

    path = folder / PREPROCESSOR_FILE
    says = read_json(path) if path.exists() else {}
    if "image_processor_type" in says:
        auto: Any = image_processors()
    elif says:
        auto = transformers.AutoFeatureExtractor
    else:
        auto = transformers.AutoTokenizer
    return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _agree_on_padding(tokenizer: Any, config: Any) -> None:
    """Give tokenizer and model one padding token: the tokenizer's, else the config's, else the end token."""
    if tokenizer.pad_token is None:
        named = getattr(config, "pad_token_id", None)
        known = isinstance(named, int) and 0 <= named < len(tokenizer)
        token = tokenizer.convert_ids_to_tokens(named) if known else None
        tokenizer.pad_token = token or tokenizer.eos_token
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id


def _missing(model: nn.Module, folder: Path) -> tuple[str, ...]:
    """Return the parameters of a model that are in no weights file, from the files' headers.

    Names in a file may lack the prefix of the bare model (`bert.`), or have it although the model does not.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: set[str] = set()
    for path in weights_files(folder):
        names.update(key.removeprefix(prefix) for key in read_shapes(path))
    tied = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.removeprefix(prefix) in names
    }
    lacking = (name for name, p in model.named_parameters() if id(p) not in tied)
    heads = {site.name for site in find_sites(model)[0] if site.role in ("head", "pooler")}
    return tuple(sorted(name for name in lacking if name.rpartition(".")[0] in heads))


def _refuse_holes(backbone: Backbone, complete: bool) -> None:
    """Raise `UserError` if the weights lack base parameters, which would be random and differ after each load."""
    if complete and backbone.missing:
        raise UserError(
            f"the weights of {backbone.source!r} contain no trained head ({listing(backbone.missing, 4)} are missing), so "
            "there is no head to stack another one on or to predict with. Name a model that has one, or replace "
            "head(pooling='stacked') by head(), which makes a new one."
        )
    roles = {site.name: site.role for site in backbone.sites}
    holes = [
        name for name in backbone.missing if roles.get(name.rpartition(".")[0]) not in ("head", "pooler")
    ]
    if holes:
        raise UserError(
            f"the weights of {backbone.source!r} lack {len(holes)} parameters of its architecture, or have them in other shapes "
            f"({listing(holes, 4)}); the file is incomplete or belongs to another config.json."
        )


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens have a position; models like RoBERTa start counting after the padding position."""
    for name, module in model.named_modules():
        table = module if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) else None
        if table is not None and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None  # XLNet says -1 for any number


def _max_length(folder: Path, model: nn.Module, tokenizer: Any) -> int:
    limits = [tokenizer.model_max_length, positions_of(model)]
    sentence = folder / "sentence_bert_config.json"
    if sentence.exists():
        length = read_json(sentence).get("max_seq_length")
        if length is not None and (not isinstance(length, int) or length < 1):
            raise UserError(f"{sentence}: max_seq_length is {length!r}, but must be a positive whole number.")
        limits.append(length)
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1_000_000]
    return min(known, default=512)
