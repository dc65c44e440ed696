"""From what a recipe names (folder, hub id, `package.module:function`) to a `Backbone`.

Weights are safetensors only, no remote code runs, and nothing is fetched unless a hub id is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from graftkit.backbone import quantized
from graftkit.backbone.anatomy import is_map
from graftkit.backbone.backbone import Backbone
from graftkit.backbone.own import call, load_weights
from graftkit.backbone.parts import find_sites
from graftkit.errors import UserError, first_line, listing, nearest
from graftkit.libraries import image_processors

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILES = (
    PREPROCESSOR_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from, checked before any weight is read.

    `folder`: in transformers format; or `made`: what a function of the user's made, with the file of its weights.
    `quantize`: how its frozen maps are to be stored, 'nf4' or 'int8'; None for as they are.
    """

    name: str
    folder: Path | None = None
    made: Backbone | None = None
    weights: Path | None = None
    quantize: str | None = None

    @property
    def location(self) -> str:
        return str(self.folder) if self.folder is not None else self.name


def find_source(name: str, weights: str | None = None, quantize: str | None = None) -> Source:
    """Find the model that a recipe names. Raises `UserError` where it cannot be had, and says why.

    `weights`: a safetensors file for the module that `package.module:function` makes.
    """
    if ":" in name and not Path(name).exists():
        made = call(name)
        if isinstance(made, Backbone):
            if quantize is not None:
                raise UserError(
                    f"quantize={quantize!r} is for models of transformers, and {name!r} makes a module of its own."
                )
            return Source(name, made=made, weights=None if weights is None else Path(weights).expanduser())
        source = _folder(name, made)
    else:
        source = _named(name)
    if weights is not None:
        raise UserError(
            f"weights {weights!r} go with a module that package.module:function makes, but model {name!r} is a folder "
            "with weights of its own; leave weights out."
        )
    return replace(source, quantize=quantize)


def _named(name: str) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        raise UserError(f"model {name!r} is a file; name the folder that holds config.json and the weights.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"model folder {name!r} does not exist.{nearest(path.name, siblings)}")
    return _hub(name)


def _folder(name: str, folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        hint = ""
        if (folder / "recipe.yaml").is_file():
            hint = " This is a run of graftkit: use `graftkit predict` or `graftkit evaluate` with it."
        elif (folder / "adapter_config.json").is_file():
            hint = " This is an adapter, not a model: name the model that it was trained on."
        raise UserError(f"model folder {name!r} has no config.json, so it is not a transformers model.{hint}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: {error}.") from None
    if not any(folder.glob("*.safetensors")):
        pickles = [pickle for pickle in PICKLES if (folder / pickle).exists()]
        if pickles:
            raise UserError(
                f"model folder {name!r} has its weights as a pickle ({pickles[0]}), which can run any code when "
                "it is opened, so graftkit does not open it. Convert it once where you trust it: "
                "AutoModel.from_pretrained(folder).save_pretrained(folder) writes model.safetensors."
            )
        raise UserError(f"model folder {name!r} has no weights (*.safetensors).")
    if not any((folder / file).exists() for file in PROCESSOR_FILES):
        raise UserError(
            f"model folder {name!r} has no tokenizer (tokenizer.json) and no {PREPROCESSOR_FILE}. Save the model's "
            "tokenizer there: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
        )
    return Source(name, folder=folder)


def _hub(name: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return _folder(name, Path(snapshot_download(name, allow_patterns=patterns)))
    except RepositoryNotFoundError:
        raise UserError(f"model {name!r} is neither a folder here nor a public model of the hub.") from None
    except UserError:
        raise
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({type(error).__name__})"
        raise UserError(
            f"model {name!r} is not a folder here and not in the local cache, and {why}. "
            "Name a local model folder, or download the model while online."
        ) from None


def pooling_of(folder: Path | None) -> str | None:
    """What a sentence-transformers folder says about pooling: 'mean', 'cls', 'last', or None."""
    path = folder / "1_Pooling" / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    names = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last",
    }
    return next((mode for key, mode in names.items() if config.get(key)), None)


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

    `native`: the auto class of transformers that builds the architecture with a head of its own (see `auto_class`);
    without it the bare encoder or decoder. `labels`: that head is made for these outputs. `complete`: it must be in
    the folder as it is. `meta`: shapes only, no weights are read; for the plan and for `inspect`.
    """
    if source.made is not None:
        if source.weights is not None:
            load_weights(source.made.model, source.weights, source.name, meta=meta)
        source.made.model.eval()
        return source.made
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    assert source.folder is not None
    try:
        config = transformers.AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
        processor = _processor(source.folder)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(f"model {source.name!r} cannot be read: {first_line(error)}") from None
    known = [name for _, name in sorted(config.id2label.items())] if labels is not None else []
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    tokenizer = processor if hasattr(processor, "pad_token_id") else None
    if tokenizer is not None:
        _agree_on_padding(tokenizer, config)
    auto = getattr(transformers, native or "AutoModel")
    more: dict[str, Any] = {}
    try:
        if source.quantize is not None:
            kept = _never_quantized(auto, source.folder, config)
            more = quantized.loading(source.quantize, source.name, kept)
        if meta:
            with torch.device("meta"):
                model = auto.from_config(config)
            missing = _missing(model, source.folder)
            if source.quantize is not None:
                quantized.with_shapes(model, source.quantize, kept)
        else:
            model, missing = _read_model(auto, source.folder, config, seed, labels is not None, more)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model {source.name!r} cannot be loaded: {first_line(error)}") from None
    model.eval()
    length = _max_length(source.folder, model, tokenizer) if tokenizer is not None else None
    backbone = Backbone(model, processor, source.name, pooling_of(source.folder), length, missing=missing)
    if labels is not None and not meta:
        _reorder_head(backbone, known, labels)
    pools = native is not None and "SequenceClassification" in native
    if pools and tokenizer is not None and tokenizer.pad_token_id is None and backbone.is_decoder:
        raise UserError(
            f"the tokenizer of {source.name!r} has no padding token and no end token, and the model's own head needs "
            "one to find the end of a row; use head(pooling='mean'), or 'last'."
        )
    end = getattr(config, "eos_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
    if pools and tokenizer is not None and isinstance(end, int) and end not in tokenizer("a")["input_ids"]:
        raise UserError(
            f"the tokenizer of {source.name!r} puts no end token behind a text, and the model's own head reads the state "
            "there; use head(pooling='mean'), or save the tokenizer with one."
        )
    _refuse_holes(backbone, complete)
    return backbone


def _never_quantized(auto: Any, folder: Path, config: Any) -> tuple[str, ...]:
    """Names of the head's maps, and of those that the weights lack: they are new, or of another size."""
    with torch.device("meta"):
        model = auto.from_config(config)
    heads = [site.name for site in find_sites(model)[0] if site.role == "head"]
    return tuple(dict.fromkeys([*heads, *(name.rpartition(".")[0] for name in _missing(model, folder))]))


def _read_model(
    auto: Any, folder: Path, config: Any, seed: int, ignore_sizes: bool, more: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and the parameters that were drawn at random because the weights lack them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = auto.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            ignore_mismatched_sizes=ignore_sizes, output_loading_info=True, **more,
        )  # fmt: skip
    quantized.keep_gradients(model)
    misshapen = {entry[0] for entry in info["mismatched_keys"]}
    return model, tuple(sorted({*info["missing_keys"], *misshapen}))


def _reorder_head(backbone: Backbone, known: Sequence[str], labels: Sequence[str]) -> None:
    """Where the trained head knows the same labels in another order, put its outputs into the order of `labels`."""
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
    """The tokenizer of a folder, or its image processor or feature extractor where it is no text model's."""
    import transformers

    path = folder / PREPROCESSOR_FILE
    says = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
    """Parameters of a model that no weights file names, read from the files' headers alone.

    Names in a file may lack the prefix of the bare model (`bert.`), or have it where the model has none.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(key.removeprefix(prefix) for key in file.keys())  # noqa: SIM118
    tied = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.removeprefix(prefix) in names
    }
    lacking = (name for name, p in model.named_parameters() if id(p) not in tied)
    heads = {site.name for site in find_sites(model)[0] if site.role in ("head", "pooler")}
    return tuple(sorted(name for name in lacking if name.rpartition(".")[0] in heads))


def _refuse_holes(backbone: Backbone, complete: bool) -> None:
    """A base parameter that the weights lack would be random, and another one after each load."""
    if complete and backbone.missing:
        raise UserError(
            f"the weights of {backbone.source!r} hold no trained head ({listing(backbone.missing, 4)} are missing), so "
            "there is nothing to stack a head on or to ask for answers. Name a model that has one; where "
            "head(pooling='stacked') was asked for, head() makes a new one."
        )
    roles = {site.name: site.role for site in backbone.sites}
    holes = [
        name for name in backbone.missing if roles.get(name.rpartition(".")[0]) not in ("head", "pooler")
    ]
    if holes:
        raise UserError(
            f"the weights of {backbone.source!r} lack {len(holes)} parameters of its architecture, or have them in another shape "
            f"({listing(holes, 4)}); the file is incomplete or belongs to another config.json."
        )


CLASSES = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
AUTO_CLASSES = {
    "SEQUENCE_CLASSIFICATION": "AutoModelForSequenceClassification",
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "AUDIO_CLASSIFICATION": "AutoModelForAudioClassification",
    "TOKEN_CLASSIFICATION": "AutoModelForTokenClassification",
    "QUESTION_ANSWERING": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "MASKED_LM": "AutoModelForMaskedLM",
}


def auto_class(source: Source, families: Sequence[str] = CLASSES) -> str | None:
    """The auto class of transformers that builds this architecture with a head of one of these families, if it has one."""
    if source.folder is None:
        return None
    from transformers.models.auto import modeling_auto

    kind = _config(source.folder).get("model_type")
    for family in families:
        if kind in getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING_NAMES"):
            return AUTO_CLASSES[family]
    return None


def has_two_towers(source: Source) -> bool:
    """Whether the bare architecture reads images and texts together, as CLIP and SigLIP do."""
    return source.folder is not None and {"text_config", "vision_config"} <= _config(source.folder).keys()


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def positions_of(model: nn.Module) -> int | None:
    """How many tokens have a position; models in the manner of RoBERTa begin to count behind the padding's."""
    for name, module in model.named_modules():
        table = module if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) else None
        if table is not None and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    known = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None  # XLNet says -1 for any number


def _max_length(folder: Path, model: nn.Module, tokenizer: Any) -> int:
    limits = [tokenizer.model_max_length, positions_of(model)]
    sentence = folder / "sentence_bert_config.json"
    if sentence.is_file():
        limits.append(json.loads(sentence.read_text(encoding="utf-8")).get("max_seq_length"))
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1_000_000]
    return min(known, default=512)
