"""A small case of each task, with all that is random in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from audio_models import ast, write_tones
from conftest import make_rows, write_csv
from language_models import folder, rows
from squad_rows import articles, write_squad

from graftkit.data.chat import TEMPLATES

LORA = "lora(rank=2, dropout=0.1)"


# task with all that is random in it, method, and the moment at which the run is killed
CASES = {
    "classify": ("classify(class_weights='balanced')", f"{LORA} + head()", ("after-rename", 2)),
    "tag": ("tag()", f"{LORA} + head()", ("mid-write", 3)),
    "span": ("span()", f"{LORA} + head()", ("after-rename", 3)),
    "image": ("image_classify(random_crop='resized', flip=0.5, randaugment=1, mixup=0.2, cutmix=0.5)",
              f"{LORA} + head()", ("mid-write", 4)),
    "audio": ("audio_classify(spec_augment=True, gain=3.0, shift=0.02)", f"{LORA} + head()", ("before-rename", 3)),
    "generate": ("generate(packing=True)", LORA, ("mid-log", 2)),
}  # fmt: skip


def tagged(path: Path, count: int) -> Path:
    """JSON lines of the rows of `make_rows`, each word with a tag."""
    with path.open("w") as file:
        for row in make_rows(count, 5):
            words = row["text"].split()
            tags = ["O" if len(word) < 4 else f"B-{row['label']}" for word in words]
            file.write(json.dumps({"tokens": words, "tags": tags}) + "\n")
    return path


def pictures(path: Path, count: int) -> Path:
    from PIL import Image

    draw = np.random.default_rng(0)
    for kind, colour in {"blue": (40, 60, 200), "red": (200, 60, 40)}.items():
        (path / kind).mkdir(parents=True)
        for number in range(count):
            values = draw.normal(colour, 40, (36, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(values).save(path / kind / f"{number}.png")
    return path


def vit(path: Path) -> Path:
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def material(case: str, path: Path, bert: Path) -> tuple[Path, Path]:
    """Model and training rows of a case."""
    if case == "image":
        return vit(path / "vit"), pictures(path / "pictures", 12)
    if case == "audio":
        return ast(path / "ast"), write_tones(path / "tones", 12, 1)
    if case == "generate":
        with (path / "rows.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(40))
        return folder(path / "llama", "llama", TEMPLATES["chatml"]), path / "rows.jsonl"
    if case == "span":
        return bert, write_squad(path / "squad.json", articles(6))
    if case == "tag":
        return bert, tagged(path / "tagged.jsonl", 24)
    return bert, write_csv(path / "rows.csv", make_rows(24, 1))
