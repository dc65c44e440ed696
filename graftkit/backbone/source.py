"""Find the model that a recipe names: a folder, a hub id or `package.module:function`, and classes that can build it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftkit.backbone.backbone import Backbone
from graftkit.backbone.folder import (
    CONFIG,
    PROCESSOR_FILES,
    config_of,
    processor_kind,
    refuse_faults,
    refuse_lost_parts,
    refuse_strange_files,
)
from graftkit.backbone.own import call
from graftkit.backbone.sizes import refuse_impossible, refuse_impossible_inputs
from graftkit.errors import UserError, nearest
from graftkit.files import PERMIT, read_json, refuse_irregular

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")


@dataclass(frozen=True)
class Source:
    """Where a model comes from, checked before any weight is read.

    `folder`: in transformers format; or `made`: the model that a user's function returned, with its weights file.
    `quantize`: format of its frozen linear layers, 'nf4' or 'int8'; None to leave them unchanged.
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
    """Find the model that a recipe names. Raises `UserError`, with the reason, if it is not available.

    `weights`: a safetensors file for the module that `package.module:function` returns.
    """
    try:
        return replace(_found(name, weights, quantize), quantize=quantize)
    except PermissionError as error:
        raise UserError(f"model {name!r}: {error.filename} may not be read by this user; {PERMIT}.") from None


def _found(name: str, weights: str | None, quantize: str | None) -> Source:
    if ":" in name and not Path(name).exists():
        made = call(name)
        if isinstance(made, Backbone):
            if quantize is not None:
                raise UserError(
                    f"quantize={quantize!r} is for transformers models, but {name!r} returns a custom module."
                )
            return Source(name, made=made, weights=None if weights is None else Path(weights).expanduser())
        source = _folder(name, made)
    else:
        source = _named(name)
    if weights is not None:
        raise UserError(
            f"weights {weights!r} are for a module that package.module:function returns, but model {name!r} is a folder "
            "with its own weights; leave weights out."
        )
    return source


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
    refuse_irregular(folder / CONFIG)
    if not (folder / CONFIG).is_file():
        hint = ""
        if (folder / "recipe.yaml").is_file():
            hint = " This is a run of graftkit: use `graftkit predict` or `graftkit evaluate` with it."
            if (folder / "model" / CONFIG).is_file():
                hint = f" This is a pre-training run of graftkit: its model is {str(folder / 'model')!r}."
        elif (folder / "adapter_config.json").is_file():
            hint = " This is an adapter, not a model: name the model it was trained on."
        raise UserError(f"model folder {name!r} has no config.json, so it is not a transformers model.{hint}")
    config = config_of(folder)
    register_own(config.get("model_type"))
    refuse_strange_files(folder)
    if not any(folder.glob("*.safetensors")):
        pickles = [pickle for pickle in PICKLES if (folder / pickle).exists()]
        if pickles:
            raise UserError(
                f"model folder {name!r} has its weights as a pickle ({pickles[0]}), which can run any code when "
                "it is opened, so graftkit does not open it. If you trust it, convert it once: "
                "AutoModel.from_pretrained(folder).save_pretrained(folder) writes model.safetensors."
            )
        raise UserError(f"model folder {name!r} has no weights (*.safetensors).")
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    refuse_faults(folder, [*weights, *(file for file in PROCESSOR_FILES if (folder / file).exists())])
    refuse_lost_parts(folder, weights)
    if not any((folder / file).exists() for file in PROCESSOR_FILES):
        what, kind = processor_kind(folder)
        raise UserError(
            f"model folder {name!r} has no {what}. Save the model's own there: "
            f"{kind}.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
        )
    refuse_impossible(folder, config)
    refuse_impossible_inputs(folder)
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
    """Return the pooling that a sentence-transformers folder specifies: 'mean', 'cls', 'last', or None."""
    path = folder / "1_Pooling" / CONFIG if folder is not None else None
    if path is None or not path.exists():
        return None
    config = read_json(path)
    names = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last",
    }
    for key in names:
        if not isinstance(config.get(key, False), bool):
            raise UserError(f"{path}: {key} is {config[key]!r}, but must be true or false.")
    return next((mode for key, mode in names.items() if config.get(key)), None)


OWN = "graftkit_"  # in front of the model types of GraftKit's own architectures
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
    "PRETRAINING": "AutoModelForPreTraining",
}


def auto_class(source: Source, families: Sequence[str] = CLASSES) -> str | None:
    """Return the auto class of transformers that builds this architecture with a head of one of these families, or None."""
    return None if source.folder is None else class_of(config_of(source.folder).get("model_type"), families)


def class_of(kind: str | None, families: Sequence[str]) -> str | None:
    """Return the auto class that builds models of this type with a head of one of these families, or None.

    The type is one of transformers, or one that other code registered with it.
    """
    from transformers.models.auto import configuration_auto, modeling_auto

    added = configuration_auto.CONFIG_MAPPING
    for family in families:
        if kind in getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING_NAMES"):
            return AUTO_CLASSES[family]
        if (
            kind is not None
            and kind in added
            and added[kind] in getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING")
        ):
            return AUTO_CLASSES[family]
    return None


def register_own(kind: Any) -> None:
    """Register an architecture of GraftKit's own with transformers: type `graftkit_NAME` is in `graftkit/backbone/NAME.py`."""
    name = kind.removeprefix(OWN) if isinstance(kind, str) and kind.startswith(OWN) else ""
    if name.isidentifier() and (Path(__file__).parent / f"{name}.py").is_file():
        importlib.import_module(f"graftkit.backbone.{name}")


def has_two_towers(source: Source) -> bool:
    """Return whether the bare architecture reads images and texts together, as CLIP and SigLIP do."""
    return source.folder is not None and {"text_config", "vision_config"} <= config_of(source.folder).keys()


def modality_of(source: Source) -> str | None:
    """Return what a model reads: 'text', 'image' or 'audio'; None if only trying it tells, as of a user's own module."""
    if source.folder is None or has_two_towers(source):
        return None
    for family, modality in (("AUDIO_CLASSIFICATION", "audio"), ("IMAGE_CLASSIFICATION", "image")):
        if auto_class(source, (family,)) is not None:
            return modality
    return "text"
