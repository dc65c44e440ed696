"""How many labels `graftkit label next` saves on banking77, against rows in random order.

    python bench/label_next.py --data FOLDER [--seeds 5] [--held-out 2000]

Labelling is simulated: all training rows are the pool, and a row that is chosen gets its label. At each budget a linear probe
on features of MiniLM, which stays frozen, is fitted to the rows labelled so far; its accuracy on the test rows is reported
and decides nothing. With `--held-out N`, accuracy is that on N training rows that are taken out of the pool: the constants in
`graftkit/insight/choosing.py` were chosen in this way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from graftkit.insight.choosing import choose
from graftkit.insight.knn import directions
from graftkit.insight.probe import fit_probe
from graftkit.insight.targets import Classes

BUDGETS = (50, 100, 200, 300, 400, 500, 700, 1000, 1500, 2000)
NAMES = ("random", "least certain", "label next")


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return features and label numbers of the training rows and of the test rows."""
    from common import MODEL

    from graftkit.recipe import schema as recipes
    from graftkit.runs.features import frozen_backbone
    from graftkit.runs.prepare import prepare_rows

    data = {"train": str(folder / "train.csv"), "test": str(folder / "test.csv"), "eval": None}
    recipe = recipes.make({"model": MODEL, "task": "classify", "data": data})
    rows = prepare_rows(recipe)
    reading = frozen_backbone(recipe, rows)
    parts = [
        (reading.features(part).values, np.asarray(part.targets)) for part in (rows.train, rows.test) if part
    ]
    return *parts[0], *parts[1]


def simulate(
    name: str, features: np.ndarray, labels: np.ndarray, others: np.ndarray, expected: np.ndarray, seed: int
) -> list[float]:
    """Return the accuracy on `others` after each budget, when rows are chosen in one of the ways of `NAMES`."""
    draw, classes = np.random.default_rng(seed), int(labels.max()) + 1
    unit, done, found = directions(features), np.zeros(0, np.int64), []
    predict = None
    for budget in BUDGETS:
        left, more = np.setdiff1d(np.arange(len(features)), done), budget - len(done)
        unsure = None
        if predict is not None and name != NAMES[0]:
            unsure = 1 - predict(features[left]).max(1)
        if name == NAMES[2]:
            chosen = left[choose(unit[left], more, unsure, unit[done], seed)]
        elif unsure is None:
            chosen = draw.permutation(left)[:more]
        else:
            chosen = left[np.argsort(-unsure, kind="stable")[:more]]
        done = np.concatenate([done, chosen])
        predict = fit_probe(features[done], Classes(labels[done], classes))
        found.append(float((predict(others).argmax(1) == expected).mean()))
    return found


def table(found: dict[str, np.ndarray]) -> str:
    """Return a Markdown table of accuracies (seeds, budgets): mean and standard deviation over seeds, and how many labels in
    random order give the accuracy of `label next`."""
    random, ours = (found[name].mean(0) for name in (NAMES[0], NAMES[2]))
    lines = [
        "| labels | " + " | ".join(NAMES) + " | random order needs |",
        "| ---: | " + " | ".join("---:" for _ in NAMES) + " | ---: |",
    ]
    for place, budget in enumerate(BUDGETS):
        cells = [f"{found[name].mean(0)[place]:.3f} ± {found[name].std(0)[place]:.3f}" for name in NAMES]
        needs = "more than 2,000"
        if ours[place] <= random[-1]:
            needs = f"about {np.interp(ours[place], np.maximum.accumulate(random), BUDGETS):,.0f}"
        lines.append(f"| {budget:,} | " + " | ".join(cells) + f" | {needs} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.csv and test.csv of banking77"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--held-out", type=int, default=0, help="training rows to use in place of the test rows"
    )
    given = parser.parse_args()
    features, labels, others, expected = read(given.data)
    if given.held_out:
        mixed = np.random.default_rng(0).permutation(len(features))
        out, pool = mixed[: given.held_out], mixed[given.held_out :]
        features, labels, others, expected = features[pool], labels[pool], features[out], labels[out]
    report(features, labels, others, expected, given.seeds)


def report(
    features: np.ndarray, labels: np.ndarray, others: np.ndarray, expected: np.ndarray, seeds: int
) -> None:
    found = {
        name: np.array([simulate(name, features, labels, others, expected, seed) for seed in range(seeds)])
        for name in NAMES
    }
    print(table(found))


if __name__ == "__main__":
    main()
