"""Check that the folder of a model is complete and its files are intact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from graftkit.errors import UserError, listing
from graftkit.files import fault

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


def refuse_faults(folder: Path, names: Sequence[str]) -> None:
    """Raise `UserError` for a file that is a Git LFS pointer, empty or truncated."""
    for name in names:
        wrong = fault(folder / name)
        if wrong is not None:
            raise UserError(f"{folder / name} {wrong}.")


def refuse_lost_parts(folder: Path, weights: Sequence[str]) -> None:
    """Raise `UserError` if weights are split into several files and some of them are missing."""
    for index in folder.glob("*.safetensors.index.json"):
        refuse_faults(folder, [index.name])
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} does not say which file holds which weight ({error}); download it again."
            ) from None
        lost = sorted(map(str, named - set(weights)))
        if lost and "model.safetensors" not in weights:
            raise UserError(
                f"{folder} lacks {listing(lost, 4)}, which {index.name} names: download the missing files."
            )


def processor_kind(folder: Path) -> tuple[str, str]:
    """Return the kind of processor that a model needs, with its file name, and the class that saves it."""
    from transformers.models.auto import modeling_auto

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind in modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES:
        return f"feature extractor ({PREPROCESSOR_FILE})", "AutoFeatureExtractor"
    if kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return f"image processor ({PREPROCESSOR_FILE})", "AutoImageProcessor"
    return "tokenizer (tokenizer.json)", "AutoTokenizer"
