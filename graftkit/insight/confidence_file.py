"""The file of a graft's confidence, beside its tensors: one safetensors file, with a checksum and facts in its metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftkit.errors import UserError
from graftkit.files import read_tensors, write_tensors
from graftkit.grafts.stored import CONFIDENCE, SUMS
from graftkit.insight.confidence import LARGEST, Confidence
from graftkit.insight.confidence_known import Known

FACTS, GRAFT = (
    "confidence",
    "graft",
)  # in the metadata: what was fitted, and the checksums of the graft's tensors
AGAIN = "restore it from a copy, remove it, or fit it again with `graftkit calibrate`"


def write(folder: Path, about: Mapping[str, Any], found: Confidence) -> None:
    """Write what was fitted for the graft in `folder`, whose description is `about`."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {
        "temperature": found.temperature, "rows": found.rows, "before": found.before, "after": found.after,
        "note": found.note,
    }  # fmt: skip
    if found.scores is not None:
        tensors["scores"] = torch.from_numpy(found.scores)
    if found.known is not None:
        tensors |= found.known.tensors()
        facts["threshold"] = found.known.threshold
    graft = json.dumps(about.get(SUMS, {}), sort_keys=True)
    write_tensors(folder / CONFIDENCE, tensors, {FACTS: json.dumps(facts), GRAFT: graft})


def read(folder: Path, about: Mapping[str, Any]) -> Confidence | None:
    """Return what was fitted for the graft in `folder`; None if nothing was, as in runs of earlier versions.

    Raises `UserError` if the file is damaged, or belongs to another graft.
    """
    path = folder / CONFIDENCE
    if not path.is_symlink() and not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    try:
        facts, graft = json.loads(metadata[FACTS]), json.loads(metadata[GRAFT])
        temperature, before, after = (float(facts[name]) for name in ("temperature", "before", "after"))
        rows, note, threshold = int(facts["rows"]), str(facts["note"]), facts.get("threshold")
    except (KeyError, ValueError, TypeError, RecursionError, OverflowError):
        raise UserError(f"{path} is not a file that graftkit wrote; {AGAIN}.") from None
    if graft != about.get(SUMS, {}):
        raise UserError(f"{path} was fitted for another graft than the one beside it; {AGAIN}.")
    scores = tensors.pop("scores", None)
    good = math.isfinite(before) and math.isfinite(after) and 1 / (2 * LARGEST) < temperature < 2 * LARGEST
    if scores is not None:
        kind = scores.dtype == torch.float32 and scores.dim() == 1
        good = (
            good and kind and bool((scores.diff() >= 0).all()) and bool(((scores >= 0) & (scores <= 1)).all())
        )
    known = Known.read(tensors, threshold) if tensors else None
    if not good or (tensors and known is None):
        raise UserError(f"{path} holds values that no calibration gives; {AGAIN}.")
    sorted_scores = None if scores is None else scores.numpy()
    return Confidence(temperature, rows, before, after, sorted_scores, known, note)
