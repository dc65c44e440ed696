"""Tiny models of images with their processors, and pictures in three colours to train them on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import graftkit
from graftkit.recipe.schema import make
from graftkit.runs.prepare import prepare, prepare_rows

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}
QUICK = {"train.precision": "fp32", "train.batch_size": 8, "train.lr": 0.02, "train.epochs": 4.0}


def picture(kind: str, seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    draw = np.random.default_rng([seed, *KINDS[kind]])
    values = draw.normal(KINDS[kind], 40, (size[1], size[0], 3)).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8))


def fill(folder: Path, count: int, seed: int = 0, kinds=tuple(KINDS), size=(40, 36)) -> Path:
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(kind, seed + i, size).save(folder / kind / f"{i}.png")
    return folder


def vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def convnext(folder: Path) -> Path:
    from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

    torch.manual_seed(0)
    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32, layer_scale_init_value=0.1
    )
    ConvNextForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def tune(model, colours: Path, out: Path, task: str = "image_classify", method: str = "head()", **settings):
    return graftkit.tune(
        model=str(model), task=task, train=colours / "train", eval=colours / "eval", method=method, out=out,
        settings={**QUICK, **settings},
    )  # fmt: skip


def dataset_of(model, train, task: str = "image_classify", training: bool = True, **data):
    values = {"model": str(model), "task": task, "method": "head()", "data": {"eval": None, **data}}
    in_memory = not isinstance(train, (str, Path))
    values["data"]["train"] = "(in memory)" if in_memory else str(train)
    recipe = make(values)
    rows = prepare_rows(recipe, train if in_memory else None)
    prepared = prepare(recipe, rows)
    dataset = rows.task.dataset(rows.train, prepared.backbone, prepared.max_length, training=training)
    return dataset, prepared


def table_rows() -> list[dict]:
    return [
        {"image": f"{kind}/{i}.png", "label": kind} for kind in KINDS for i in range(8)
    ]  # relative to the table


def spoil(folder: Path) -> list[str]:
    """Every kind of bad image; their names."""
    good = (folder / "red" / "0.png").read_bytes()
    buffer = io.BytesIO()
    picture("red", 3, (64, 64)).save(buffer, "JPEG")
    bad = {
        "cut.png": good[: len(good) // 2], "cut.jpg": buffer.getvalue()[:600], "empty.png": b"",
        "page.jpg": b"<html>not found</html>",
    }  # fmt: skip
    for name, raw in bad.items():
        (folder / "red" / name).write_bytes(raw)
    return list(bad)
