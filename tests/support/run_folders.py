"""Run folders written by hand, for tests of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

PIXEL = (  # a PNG of one pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SOUND = "data:audio/wav;base64,UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAIA+AAACABAAZGF0YQIAAAAAAA=="


def per_class(counts: dict[str, tuple[int, int, int]]) -> dict[str, dict[str, Any]]:
    """The table by class for counts of (rows, right, answered)."""
    made = {}
    for name, (rows, right, answered) in counts.items():
        precision, recall = right / answered if answered else 0.0, right / rows if rows else 0.0
        f1 = 2 * right / (rows + answered) if rows + answered else 0.0
        made[name] = {"precision": precision, "recall": recall, "f1": f1, "rows": rows}
    return made


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "accuracy": 0.8, "accuracy_interval": [0.7, 0.875], "macro_f1": 0.75, "loss": 0.5, "rows": 40,
        "per_class": per_class({"cat": (20, 18, 22), "dog": (12, 10, 13), "eel": (8, 4, 4)}),
        "confusion": [[2, 0, 3], [0, 1, 2], [1, 0, 1], [2, 1, 1]],
        "calibration": {"error": 0.0625, "bins": [[0.4, 0.5, 10, 0.4375, 0.5], [0.9, 1.0, 30, 0.9375, 0.875]]},
    } | changes  # fmt: skip


def log(steps: int = 60, evaluations: int = 3, slope: float = 1.0) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({
            "kind": "step", "step": step, "loss": 2 * math.exp(-slope * step / steps), "accuracy": step / (steps + 9),
            "gradient_norm": 1 + (step % 5) / 7, "lr_factor": 1 - step / (steps + 1), "rows": 8,
        })  # fmt: skip
        if evaluations and step % (steps // evaluations) == 0:
            lines.append(
                {
                    "kind": "evaluation",
                    "step": step,
                    "loss": 1 / step,
                    "accuracy": step / (steps + 20),
                    "rows": 40,
                }
            )
    return lines


def write_run(
    folder: Path, *, task: str = "classify", found: dict[str, Any] | None = None, lines: list[dict] | None = None,
    worst: list[dict] | None = None, previews: list[dict] | None = None, result: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None, plan: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a finished run; what is given replaces the parts of a small classification."""
    folder.mkdir(parents=True)
    found = metrics() if found is None else found
    data = {"train": "train.csv", "eval": 0.1, "test": "test.csv"}
    whole = {
        "model": "tiny",
        "task": task,
        "method": "lora(rank=8) + head()",
        "data": data,
        "seed": 3,
        "out": str(folder),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(whole | (recipe or {})), encoding="utf-8")
    told = {
        "run": str(folder), "metrics": found, "evaluation": {"step": 40}, "task": task, "headline": ["accuracy", "macro_f1"],
        "method": "lora(rank=8) + head()", "trained_parameters": 1234, "total_parameters": 56789, "seconds": 75.2,
        "peak_memory_bytes": 1_500_000_000, "steps": 60, "precision": "fp32", "device": "cpu", "optimizer": "adamw",
        "problems": [], "warnings": [], "versions": {"graftkit": "0.1.0", "torch": "2.13.0"},
    } | (result or {})  # fmt: skip
    (folder / "result.json").write_text(json.dumps(told), encoding="utf-8")
    lengths = {"unit": "tokens", "sum": 1200, "mean": 12.0, "longest": 64}
    labels = {"cat": 100, "dog": 90, "eel": 4}
    about = {"train": {"rows": 194, "lengths": lengths, "truncated": 0, "labels": labels}}
    (folder / "plan.json").write_text(
        json.dumps({"batch_size": 8, "statistics": about, "warnings": []} | (plan or {}))
    )
    lines = log() if lines is None else lines
    final = [{"kind": "final", "data": "test", "step": 60, **found}] if found else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *final]))
    if worst is not None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in worst)
        (folder / "worst.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
    if previews is not None:
        (folder / "previews.json").write_text(json.dumps(previews))
    return folder
