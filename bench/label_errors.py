"""Wrong labels in banking77: how many flipped ones are found, in which time, and what training without suspects gives.

`python bench/label_errors.py flips` flips 5% of the training labels, at random or to the class of the nearest row of another
class, and counts how many are among the first 8% of the list, by several scores, and with cleanlab if it is installed.
`python bench/label_errors.py train` trains a head without the most suspicious rows, or with the suggested labels, on the labels
as they are and on flipped ones, and evaluates it on the test rows, which are not changed. Both write their table into docs/results.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import MODEL, ROOT, machine, section

SHARED = ROOT.parent / "shared" / "data" / "banking77"
PAGE = ROOT / "docs" / "results.md"
FLIPPED, FIRST = 0.05, 0.08


def recipe_of(data: Path, test: bool = False) -> Any:
    from graftkit.recipe import schema as recipes

    paths = {"train": str(data / "train.csv"), "eval": None} | (
        {"test": str(data / "test.csv")} if test else {}
    )
    return recipes.make({"model": MODEL, "task": "classify", "data": paths})


def features(data: Path) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Features, label indices, the number of labels, and the seconds that the features took."""
    from graftkit.runs.features import frozen_backbone
    from graftkit.runs.prepare import prepare_rows

    recipe = recipe_of(data)
    rows = prepare_rows(recipe)
    start = time.perf_counter()
    found = frozen_backbone(recipe, rows).features(rows.train)
    print(found.filled, file=sys.stderr)
    return found.values, np.asarray(rows.train.targets), len(rows.labels), time.perf_counter() - start


def flipped(
    targets: np.ndarray, classes: int, seed: int, to: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Labels with 5% flipped, and the flipped rows. `to`: the label that each row would get; at random if None."""
    draw = np.random.default_rng(seed)
    rows = draw.choice(len(targets), round(FLIPPED * len(targets)), replace=False)
    new = targets.copy()
    new[rows] = (targets[rows] + draw.integers(1, classes, len(rows))) % classes if to is None else to[rows]
    return new, rows


def share_found(quality: np.ndarray, rows: np.ndarray) -> float:
    """The share of `rows` among the 8% with the lowest quality."""
    first = np.argsort(quality, kind="stable")[: round(FIRST * len(quality))]
    return len(np.intersect1d(first, rows)) / len(rows)


def with_cleanlab(values: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    """cleanlab's scores with scikit-learn's default regression, as in its tutorials; None if it is not installed."""
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    probabilities = cross_val_predict(
        LogisticRegression(max_iter=400), values, targets, cv=5, method="predict_proba"
    )
    return get_label_quality_scores(targets, probabilities)


def nearest_other_class(values: np.ndarray, targets: np.ndarray) -> np.ndarray:
    from graftkit.insight.near import centred

    ways = centred(values, values.mean(0))
    cosines = ways @ ways.T
    cosines[targets[:, None] == targets] = -2
    return targets[cosines.argmax(1)]


def flips(data: Path, seeds: int, cleanlab: bool) -> str:
    from graftkit.insight import labels as insight

    values, targets, classes, seconds = features(data)
    near = nearest_other_class(values, targets)
    found: dict[tuple[str, str], list[float]] = {}
    times = []
    for seed in range(seeds):
        for kind, to in (("at random", None), ("to the nearest class", near)):
            given, rows = flipped(targets, classes, seed, to)
            start = time.perf_counter()
            probabilities = insight.out_of_fold(values, given, classes)
            judged = insight.judge(probabilities, given)
            times.append(time.perf_counter() - start)
            scores = {
                "odds of the best other label (used)": 1 - judged.scores,
                "probability of the label": insight.self_confidence(probabilities, given),
                "normalized margin": insight.normalized_margin(probabilities, given),
            }
            if cleanlab and (other := with_cleanlab(values, given)) is not None:
                scores["cleanlab, scikit-learn's default regression"] = other
            for name, quality in scores.items():
                found.setdefault((name, kind), []).append(share_found(quality, rows))
            print(seed, kind, {name: found[name, kind][-1] for name in scores}, file=sys.stderr)
    names = list(dict.fromkeys(name for name, _ in found))
    lines = ["| score | flipped at random | flipped to the nearest class |", "| --- | --- | --- |"]
    for name in names:
        cells = (found[name, kind] for kind in ("at random", "to the nearest class"))
        lines.append(
            f"| {name} | {' | '.join(f'{np.mean(c):.1%} ({min(c):.1%} to {max(c):.1%})' for c in cells)} |"
        )
    return "\n".join([
        f"Flipped labels among the first {FIRST:.0%} of the list, {FLIPPED:.0%} of the labels flipped, {seeds} seeds: mean "
        "(lowest to highest).", "", *lines, "",
        f"Seconds: {np.median(times):.1f} for the folds and scores (median), {seconds:.0f} for the features of {len(targets):,} "
        f"rows before. {machine()}",
    ])  # fmt: skip


def by_probe(data: Path, values: np.ndarray, classes: int) -> Callable[..., float]:
    """The accuracy on the test rows of logistic regression on the features of the training rows."""
    from graftkit.insight import labels as insight
    from graftkit.runs.features import frozen_backbone
    from graftkit.runs.prepare import prepare_rows

    recipe = recipe_of(data, test=True)
    rows = prepare_rows(recipe)
    assert rows.test is not None
    asked = frozen_backbone(recipe, rows).features(rows.test).values
    targets = np.asarray(rows.test.targets)

    def measure(kept: np.ndarray, given: np.ndarray, seed: int) -> float:
        return float((insight.fitted(values[kept], given[kept], asked, classes).argmax(1) == targets).mean())

    return measure


def by_head(data: Path) -> Callable[..., float]:
    """The accuracy on the test rows of a run of `head()`."""
    import graftkit
    from graftkit.data.read import read_table

    table = read_table(str(data / "train.csv"))
    names = sorted(set(table.columns["category"]))

    def measure(kept: np.ndarray, given: np.ndarray, seed: int) -> float:
        rows = [{"text": table.columns["text"][at], "label": names[given[at]]} for at in kept]
        with tempfile.TemporaryDirectory() as folder:
            run = graftkit.tune(
                model=MODEL, task="classify", method="head()", train=rows, eval=None, test=str(data / "test.csv"),
                out=Path(folder) / "run", settings={"seed": seed},
            )  # fmt: skip
        return run.metrics["accuracy"]

    return measure


def measured_before(log: Path | None) -> dict[tuple[str, str, str], float]:
    """The accuracies that a measurement that was stopped has printed, by seed, column and name."""
    if log is None:
        return {}
    lines = [line.split() for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [words for words in lines if len(words) > 3 and words[0].isdecimal() and words[1] in ("0", "1")]
    return {(words[0], words[1], " ".join(words[2:-1])): float(words[-1]) for words in lines}


def train(data: Path, seeds: int, probe: bool, log: Path | None) -> str:
    """Accuracy without suspects, on the labels as they are and with 5% flipped at random."""
    from graftkit.insight import labels as insight

    values, targets, classes, _ = features(data)
    measure = by_probe(data, values, classes) if probe else by_head(data)
    found: dict[str, list[list[float]]] = {}
    before = measured_before(log)
    for seed in range(seeds):
        for column, given in enumerate((targets, flipped(targets, classes, seed, None)[0])):
            judged = insight.judge(insight.out_of_fold(values, given, classes), given)
            worst = np.argsort(-judged.scores, kind="stable")
            drawn = np.random.default_rng(seed).permutation(len(given))
            variants = {"all": (drawn, given)}
            variants["without 5% of the rows, drawn at random"] = (drawn[round(0.05 * len(drawn)) :], given)
            for share in (0.02, 0.05, 0.1):
                variants[f"without the {share:.0%} most suspicious"] = (
                    worst[round(share * len(worst)) :],
                    given,
                )
            for share in (0.02, 0.05):
                changed, first = given.copy(), worst[: round(share * len(worst))]
                changed[first] = judged.suggested[first]
                variants[f"the {share:.0%} most suspicious with the suggested label"] = (drawn, changed)
            for name, (kept, labels) in variants.items():
                accuracy = before.get((str(seed), str(column), name))
                if accuracy is None:
                    accuracy = measure(np.sort(kept), labels, seed)
                found.setdefault(name, [[], []])[column].append(accuracy)
                print(seed, column, name, f"{accuracy:.4f}", file=sys.stderr, flush=True)
    lines = ["| training rows | labels as they are | 5% flipped at random |", "| --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(map(_shown, columns))} |" for name, columns in found.items()]
    how = "Logistic regression on the features" if probe else "`head()` with its defaults"
    return "\n".join([
        f"Accuracy on the 3,080 test rows, which are as they are: mean (lowest to highest), {seeds} seeds. {how}.", "", *lines, "",
        machine(),
    ])  # fmt: skip


def _shown(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{np.mean(values):.1%}" + (f" ({low:.1%} to {high:.1%})" if low != high else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("flips", "train"))
    parser.add_argument("--data", type=Path, default=SHARED, help="folder with train.csv and test.csv")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-cleanlab", action="store_true")
    parser.add_argument(
        "--probe", action="store_true", help="train: logistic regression on the features, not runs of head()"
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="LOG",
        help="train: what a measurement that was stopped has printed, to go on from",
    )
    given = parser.parse_args()
    if given.part == "flips":
        text = flips(given.data, given.seeds, not given.no_cleanlab)
    else:
        text = train(given.data, given.seeds, given.probe, given.before)
    name = f"label errors: {given.part}" + (", by probe" if given.part == "train" and given.probe else "")
    print(text)
    section(PAGE, f"<!-- {name} -->", f"<!-- /{name} -->", text)


if __name__ == "__main__":
    main()
