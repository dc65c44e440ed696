"""How long `graftkit compare` takes: this source tree beside another one, alternating.

    git worktree add /tmp/before COMMIT
    python bench/compare_speed.py /tmp/before [--repeats 3] [--rows 2000] [--only head]

2,000 rows of banking77 with MiniLM: head() with 4 learning rates and 3 seeds, and head() beside lora(rank=8) + head(). The cache
of activations is empty before each run; what is measured once for each machine is there. Wall and CPU seconds of all processes,
medians. Metrics are shown too: they must be equal up to rounding.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import MODEL, ROOT

METHODS = {"head": ["head()"], "both": ["head()", "lora(rank=8) + head()"]}


def rows_of(folder: Path, count: int) -> Path:
    with (ROOT / "graftkit" / "demo" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    path = folder / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[:count])
    return path


def timed(tree: Path, place: Path, train: Path, methods: list[str], more: tuple[str, ...] = ()) -> dict:
    """One comparison by a source tree, in processes of its own."""
    cache, out = place / f"cache-{tree.name}", place / "out"
    shutil.rmtree(cache / "prefix", ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "graftkit", "compare", "--model", MODEL, "--task", "classify", "--train", str(train), "--test",
        str(ROOT / "graftkit" / "demo" / "test.csv"), "--methods", *methods, "--out", str(out), "--json", *more,
    ]  # fmt: skip
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "GRAFTKIT_CACHE": str(cache), "PYTHONPATH": str(tree),
    }  # fmt: skip
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    means = {row["method"]: round(row["mean"], 4) for row in json.loads(done.stdout)["rows"]}
    return {"wall": wall, "cpu": cpu, "means": means}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="another source tree")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--only", choices=METHODS)
    given = parser.parse_args()
    trees = {"before": given.before.resolve(), "after": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        train = rows_of(place, given.rows)
        for tree in trees.values():  # the number type and the rates of this machine
            timed(tree, place, train, ["head()"], ("--seeds", "1", "--search", "1", "train.steps=2"))
        for name, methods in METHODS.items():
            if given.only not in (None, name):
                continue
            found: dict[str, list[dict]] = {side: [] for side in trees}
            for _ in range(given.repeats):
                for side, tree in trees.items():
                    found[side].append(timed(tree, place, train, methods))
                    print(name, side, found[side][-1], file=sys.stderr, flush=True)
            for side, runs in found.items():
                wall, cpu = (statistics.median(run[key] for run in runs) for key in ("wall", "cpu"))
                print(f"{name} {side}: {wall:.1f} s wall, {cpu:.1f} s CPU, {runs[0]['means']}", flush=True)


if __name__ == "__main__":
    main()
