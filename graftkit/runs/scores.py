"""What each evaluated row contributes to the metrics of a run, in its folder: two runs can be compared row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graftkit.files import read_tensors, write_tensors
from graftkit.runs.folder import SCORES
from graftkit.tasks.base import Dataset, Task


def write_scores(
    folder: Path, task: Task, outcomes: Sequence[Any], dataset: Dataset, labels: Sequence[str]
) -> None:
    """Write the metrics by row (`Task.by_row`): of the test rows, or of the evaluation rows with the best weights."""
    made = task.by_row(outcomes, dataset, labels)
    if made:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in made.items()}
        write_tensors(folder / SCORES, tensors)


def read_scores(folder: Path) -> Mapping[str, np.ndarray]:
    """Return the metrics by row of a finished run, (rows, 2) each; empty if its task has none."""
    path = folder / SCORES
    return {name: values.numpy() for name, values in read_tensors(path)[0].items()} if path.is_file() else {}
