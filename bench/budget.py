"""How long `graftkit pretrain --budget TIME` takes, beside the time that was wanted.

    python bench/budget.py [--data FOLDER] ["1 min" "3 min" ...]

Each objective of `OBJECTIVES` on WikiText-2, in a process of its own, with the tokens of the corpus in an empty cache: the first
run of a corpus. `run` is the time from the first step to the end, which the budget is for; `whole` is all of the command, with
imports, the tokenizer, the tokens of the corpus and the measurement of the speed. Figures are kept in
bench/results/pretrain-budget-*.json, and printed as a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, machine
from pretraining import kept

from graftkit.recipe.values import seconds

BUDGETS = ("1 min", "3 min")
OBJECTIVES = ("mlm", "causal")


def timed(objective: str, budget: str, data: Path, *more: str) -> dict[str, Any]:
    """Pre-train once, and return what it took."""
    text = data / "text" / "wikitext2_valid.txt"
    with tempfile.TemporaryDirectory() as folder:
        words = ["pretrain", "--objective", objective, "--train", str(text), "--budget", budget, "--out", f"{folder}/run"]  # fmt: skip
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "graftkit", *words, "--json", *more],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, "GRAFTKIT_CACHE": f"{folder}/cache"},
        )  # fmt: skip
        whole = time.perf_counter() - begun
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout)
        recipe = json.loads((Path(folder) / "run" / "result.json").read_text())
    return {
        "objective": objective, "wanted": seconds(budget), "run": found["seconds"], "whole": whole,
        "steps": found["steps"], "tokens": found["tokens"], "parameters": recipe["total_parameters"],
        "loss": found["metrics"]["loss"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("budgets", nargs="*", default=BUDGETS)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--objective", action="append", help=f"by default {' and '.join(OBJECTIVES)}")
    options = parser.parse_args()
    rows = []
    for objective in options.objective or OBJECTIVES:
        for budget in options.budgets:
            name = f"budget-{objective}-{budget.replace(' ', '-')}"
            rows.append(kept(name, lambda o=objective, b=budget: timed(o, b, options.data)))  # type: ignore[misc]
    print(
        "| objective | wanted, s | run, s | of it | whole command, s | steps | parameters |\n| --- |"
        + " ---: |" * 6
    )
    for row in rows:
        print(
            f"| `{row['objective']}` | {row['wanted']:.0f} | {row['run']:.1f} | {row['run'] / row['wanted']:.0%} | "
            f"{row['whole']:.1f} | {row['steps']:,} | {row['parameters']:,} |"
        )
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
