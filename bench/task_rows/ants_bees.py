"""Ants and bees: SqueezeNet of ImageNet with a new head, frozen and then fine-tuned, on 243 photographs."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TITLE = "ants_bees: 243 photographs of two classes"
BACKBONE = "SqueezeNet 1.0 of ImageNet"
METRIC = "accuracy"
BAR = "0.90 with a new head on the frozen network, 0.93 with the best method"

# SqueezeNet's own classifier drops half of its features, and so does the new one
METHODS = {
    "frozen": ("head(pooling='mean', dropout=0.5)", 40.0, ""),
    "flipped": ("head(pooling='mean', dropout=0.5)", 40.0, ", flip=0.5"),
    "stacked": ("head(pooling='stacked')", 20.0, ""),
    "last block": (
        "unfreeze('blocks[-1:]', lr=0.00005) + head(pooling='mean', dropout=0.5, lr=0.002)",
        20.0,
        ", flip=0.5",
    ),
}
TASK = "image_classify(resize=256, crop=227, channels='BGR', scale=1, mean=[104, 117, 123]{})"


def rows(data: Path, folder: Path) -> dict[str, dict]:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # where `examples` is
    return {
        name: {
            "model": "examples.squeezenet:squeezenet",
            "weights": str(data.parent.parent / "models" / "squeezenet1_0.safetensors"),
            "task": TASK.format(change),
            "method": method,
            "data": {"train": str(data / "train"), "eval": None, "test": str(data / "val")},
            "train": {"epochs": epochs},
        }
        for name, (method, epochs, change) in METHODS.items()
    }
