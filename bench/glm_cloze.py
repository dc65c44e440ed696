"""The same pre-trained GLM on 500 rows of banking77 in two forms: a cloze with a word for each label, and a classification head.

    python bench/glm_cloze.py run [--data FOLDER] [--quick]   # three seeds; goes on where it was stopped
    python bench/glm_cloze.py show                            # the table, from what has been run

A `glm-tiny` reads the 10,003 sentences without labels. Each form then gets its learning rate of `RATES` by the accuracy on a
tenth of the 500 rows, held out, with seed 0 alone; with that rate all 500 rows are trained on, and the test rows are evaluated once.
A label's word is a single token of the tokenizer, so that a row costs one pass: of the words of the label's own training rows, the
one that is most often there and in few other labels (term frequency times inverse label frequency), each word for one label. Figures are kept in bench/results/pretrain-cloze-*.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import ROOT
from pretraining import RESULTS, SEEDS, T_95, kept, ran, sample, sentences

RATES = (3e-4, 1e-3, 3e-3)
FORMS = {
    "cloze": ("cloze(template='{text} This is about [MASK].', words=WORDS)", "full(lr=LR)"),
    "head": ("classify", "full(lr=LR) + head(pooling='mean')"),
}
STEPS, EPOCHS = 4000, 20
QUICK = (20, 1)


def tuned(form: str, rate: float, model: Path, rows: Path, test: Path, folder: Path, seed: int, epochs: int,
          share: float | None) -> dict[str, Any]:  # fmt: skip
    """Fine-tune in a form; return the metrics of the held-out rows, or of the test rows if none are held out."""
    import graftkit

    task, method = FORMS[form]
    pairs = ", ".join(f"{label!r}: {word!r}" for label, word in words_of(rows, model).items())
    run = graftkit.tune(
        model=str(model), task=task.replace("WORDS", f"{{{pairs}}}"), train=rows, eval=share, test=None if share else test,
        method=method.replace("LR", str(rate)), out=folder / "tuned", overwrite=True,
        settings={"train.epochs": epochs, "train.batch_size": 16, "seed": seed, "data.columns": {"label": "category"},
                  "data.max_length": 64},
    )  # fmt: skip
    return {"accuracy": run.metrics["accuracy"], "seconds": run.result["seconds"]}


def measured(data: Path, seed: int, steps: int, epochs: int, rates: dict[str, float]) -> dict[str, Any]:
    """Pre-train with a seed, and fine-tune in both forms. `rates`: of each form; empty: choose them on held-out rows."""
    test = data / "banking77" / "test.csv"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = sample(data, 500, seed, folder)
        more = {"settings": {"data.eval": None}, "size": "glm-tiny", "vocabulary": 2048, "seed": seed}
        ran(folder / "pre", "glm(documents='lines')", sentences(data, folder), steps, **more)
        found: dict[str, Any] = {"seed": seed, "rates": dict(rates), "held_out": {}}
        for form in FORMS:
            given = form, folder / "pre" / "model", rows, test, folder, seed, epochs
            if form not in found["rates"]:
                tried = {rate: tuned(form, rate, *given[1:], 0.1)["accuracy"] for rate in RATES}
                found["held_out"][form] = tried
                found["rates"][form] = max(tried, key=lambda rate: tried[rate])
            found[form] = tuned(form, found["rates"][form], *given[1:], None)
    return found


def words_of(rows: Path, model: Path) -> dict[str, str]:
    """Return a word for each label that is one token, chosen from its rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    special = set(tokenizer.all_special_tokens)
    whole = sorted(token for token in tokenizer.get_vocab() if token.isalpha() and token not in special)
    counts: dict[str, Counter[str]] = {}
    with rows.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            tokens = tokenizer.tokenize(row["text"])
            counts.setdefault(row["category"], Counter()).update(set(tokens) & set(whole))
    spread = Counter(word for found in counts.values() for word in found)
    scored = [
        (-count * math.log(len(counts) / spread[word]), label, word)
        for label, found in counts.items()
        for word, count in found.items()
    ]
    chosen: dict[str, str] = {}
    for _, label, word in sorted(scored):
        if label not in chosen and word not in chosen.values():
            chosen[label] = word
    rest = iter(word for word in whole if word not in chosen.values())
    return {label: chosen.get(label) or next(rest) for label in sorted(counts)}


def run(data: Path, quick: bool) -> None:
    steps, epochs = QUICK if quick else (STEPS, EPOCHS)
    if quick:
        print(json.dumps(measured(data, 0, steps, epochs, {form: RATES[1] for form in FORMS}), indent=1))
        return
    rates: dict[str, float] = {}
    for seed in SEEDS:
        found = kept(
            f"cloze-{seed}", lambda seed=seed, rates=rates: measured(data, seed, steps, epochs, rates)
        )  # type: ignore[misc]
        rates = found["rates"]
    show()


def show() -> None:
    """Print both accuracies for each seed, and the difference with its 95% interval."""
    rows = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("pretrain-cloze-*.json"))]
    print("| seed | cloze | head | difference |\n| ---: | ---: | ---: | ---: |")
    differences = [row["cloze"]["accuracy"] - row["head"]["accuracy"] for row in rows]
    for row, difference in zip(rows, differences):
        print(
            f"| {row['seed']} | {row['cloze']['accuracy']:.4f} | {row['head']['accuracy']:.4f} | {difference:+.4f} |"
        )
    if len(rows) > 1:
        mean = statistics.mean(differences)
        around = T_95[len(rows)] * statistics.stdev(differences) / len(rows) ** 0.5
        print(f"\nmean difference {mean:+.4f}, 95% interval {mean - around:+.4f} to {mean + around:+.4f}")
    if rows:
        print(f"learning rates, chosen with seed 0: {rows[0]['rates']}\n\n{rows[0]['machine']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, to see that it runs; keeps nothing"
    )
    options = parser.parse_args()
    if options.command == "show":
        show()
    else:
        run(options.data, options.quick)


if __name__ == "__main__":
    main()
