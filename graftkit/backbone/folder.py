"""Check that the folder of a model is complete and its files are intact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftkit.errors import UserError, listing
from graftkit.files import fault, read_json, read_shapes, refuse_irregular

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # the two that transformers reads
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
# small files that hold one object each
OBJECTS = (PREPROCESSOR_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def config_of(folder: Path) -> dict[str, Any]:
    """Return the content of a model's config.json."""
    return read_json(folder / CONFIG)


def refuse_faults(folder: Path, names: Sequence[str]) -> None:
    """Raise `UserError` for a file that is not a regular file, a Git LFS pointer, empty or truncated."""
    for name in names:
        wrong = fault(folder / name)
        if wrong is not None:
            raise UserError(f"{folder / name} {wrong}.")


def refuse_strange_files(folder: Path) -> None:
    """Raise `UserError` for what transformers might open and wait for (pipes, sockets and devices, whatever their names),
    for JSON files that are no objects, and for an adapter, which it would load together with the model.
    """
    for path in sorted([*folder.iterdir(), *folder.glob(f"*/{CONFIG}"), *folder.glob("*/*.jinja")]):
        if path.exists() and not path.is_dir():
            refuse_irregular(path)
    for name in OBJECTS:
        if (folder / name).exists():
            refuse_faults(folder, [name])
            read_json(folder / name)
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise UserError(
            f"{folder} has an adapter ({adapter.name}) beside the model, which transformers would load with it. Move the "
            "adapter to a folder of its own."
        )


def refuse_lost_parts(folder: Path, weights: Sequence[str]) -> None:
    """Raise `UserError` if weights are split into several files and some of them are missing, or are not files of this
    folder that safetensors reads.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        refuse_faults(folder, [index.name])
        named = _named_in(index)
        lost = sorted(named - set(weights))
        if lost and WEIGHTS not in weights:
            raise UserError(
                f"{folder} lacks {listing(lost, 4)}, which {index.name} names: download the missing files."
            )
    if WEIGHTS in weights:
        return
    if not (folder / INDEX).exists():
        raise UserError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}, only {listing(weights, 4)}; name its weights {WEIGHTS}."
        )
    _refuse_wrong_places(folder)


def _named_in(index: Path) -> set[str]:
    """Return the files that an index names. Raises `UserError` for anything but a safetensors file beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(
            f"{index} does not say which file holds which weight (weight_map is missing or not an object); download it "
            "again."
        )
    for weight, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: weight_map names {name!r} for {weight!r}, but weights are read from .safetensors files in this "
                "folder only; download the index again."
            )
    return set(places.values())


def _refuse_wrong_places(folder: Path) -> None:
    """Raise `UserError` for a weight that is not in the file that the index names for it, or is in several files."""
    index = folder / INDEX
    places = read_json(index)["weight_map"]
    found: dict[str, str] = {}
    for name in sorted(set(places.values())):
        for weight in read_shapes(folder / name):
            if weight in found:
                raise UserError(
                    f"{folder}: {weight!r} is in {found[weight]} and in {name}; download both again."
                )
            found[weight] = name
    for weight, name in places.items():
        if found.get(weight) != name:
            raise UserError(
                f"{index}: weight_map names {name} for {weight!r}, which is not in it; download both again."
            )


def weights_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads the weights from."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(_named_in(folder / INDEX))]


def processor_kind(folder: Path) -> tuple[str, str]:
    """Return the kind of processor that a model needs, with its file name, and the class that saves it."""
    from transformers.models.auto import modeling_auto

    kind = config_of(folder).get("model_type")
    if kind in modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES:
        return f"feature extractor ({PREPROCESSOR_FILE})", "AutoFeatureExtractor"
    if kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return f"image processor ({PREPROCESSOR_FILE})", "AutoImageProcessor"
    return "tokenizer (tokenizer.json)", "AutoTokenizer"
