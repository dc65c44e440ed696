"""What a run notices in its rows on the way: rows that occur twice, and labels that its model is sure are others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from graftkit.insight.confidence import probabilities_of
from graftkit.insight.confidence_evidence import WORDS, Evidence
from graftkit.insight.labels import judge
from graftkit.insight.repeated import Pair, are_labels
from graftkit.runs.labels import file_of, named_label, text_of
from graftkit.runs.prepare import Rows
from graftkit.tasks.base import Dataset, Task

SURE = 0.9  # another answer is nine times as likely as the one that the row has
LISTED = 10  # of each kind, in result.json
CHARACTERS = 300


def noticed(
    rows: Rows, datasets: Mapping[str, Dataset], evidence: Mapping[str, Evidence], temperature: float
) -> dict[str, Any]:
    """Return what result.json says of the rows: `repeated`, counts of rows that occur twice with the first of them, and
    `suspects`, answers of evaluation and test rows that the run's model contradicts, the worst first.

    `evidence`: outputs on these rows, with the best weights; they are divided by `temperature`. Nothing is computed for this
    but digests of the rows and a softmax.
    """
    suspects = [_suspects(rows, name, datasets[name], shown, temperature) for name, shown in evidence.items()]
    return {"repeated": _repeated(rows), "suspects": [one for one in suspects if one]}


def _repeated(rows: Rows) -> list[dict[str, Any]]:
    """Return counts by the two parts that a row is in; those with another answer are shown first."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in rows.repeated:
        found.setdefault((pair.data, pair.other), []).append(pair)
    return [
        {
            "data": name, "of": other, "rows": len(pairs), "total": len(rows.parts[name]),
            "other_answer": sum(pair.same is False for pair in pairs),
            "shown": [_pair(rows, pair) for pair in sorted(pairs, key=lambda pair: pair.same is not False)[:LISTED]],
        }
        for (name, other), pairs in found.items()
    ]  # fmt: skip


def _pair(rows: Rows, pair: Pair) -> dict[str, Any]:
    examples, others = rows.parts[pair.data], rows.parts[pair.other]
    return {
        **file_of(examples, pair.row), "text": text_of(rows.task, examples, pair.row)[:CHARACTERS],
        "of": file_of(others, pair.other_row), "same_answer": pair.same,
        **_label(rows, "label", examples.targets, pair.row), **_label(rows, "label_there", others.targets, pair.other_row),
    }  # fmt: skip


def _label(rows: Rows, key: str, targets: Any, row: int) -> dict[str, str]:
    return {key: rows.labels[int(targets[row])]} if rows.labels and are_labels(targets) else {}


def _suspects(
    rows: Rows, name: str, dataset: Dataset, seen: Evidence, temperature: float
) -> dict[str, Any] | None:
    """Return the answers that the model is sure are others. `judged`: how many it has looked at."""
    targets = seen.targets.astype(np.int64)
    if not targets.size or not np.isfinite(seen.logits).all():
        return None
    judged = judge(probabilities_of(seen.logits, targets.ndim > 1, temperature), targets)
    order = np.argsort(-judged.scores, kind="stable")
    order = order[judged.scores[order] >= SURE]
    first = np.searchsorted(seen.rows, seen.rows, side="left")  # of the answers to the same row
    return {
        "data": name, "of": "words" if rows.task.calibrates == WORDS else "rows", "judged": len(targets), "count": len(order),
        "shown": [
            {
                **_about(rows.task, dataset, int(seen.rows[at]), int(at - first[at])),
                "given": named_label(targets[at], rows.labels), "suggested": named_label(judged.suggested[at], rows.labels),
                "score": round(float(judged.scores[at]), 4),
            }
            for at in order[:LISTED]
        ],
    }  # fmt: skip


def _about(task: Task, dataset: Dataset, row: int, number: int) -> dict[str, Any]:
    example = dataset.example(row)
    text = text_of(task, dataset.examples, example)[:CHARACTERS]
    return {**file_of(dataset.examples, example), "text": text, **dataset.about(row, number)}
