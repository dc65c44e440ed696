"""Every method on banking77: test accuracy, trained parameters, seconds and peak memory; writes docs/results.md.

    python bench/results.py run [--jobs 2] [--seeds 0,1,2] [--only full,ten,thirty] [--names lora,dora]
                                                                 each missing run, one process each
    python bench/results.py time                                 seconds a step and memory where no run has them
    python bench/results.py write                                                     the page, from bench/results/

A run's figures are kept in bench/results/, so that an interrupted measurement goes on. `--jobs 2` runs two
processes of one thread each; seconds and memory on the page come only from runs of two threads: whole ones, or
short ones of TIMED_STEPS steps made by `time`, whose seconds are multiplied by the number of steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import MODEL, ROOT, child_arguments, machine

from graftkit.recipe.sections import DEFAULT_OPTIMIZER

FOLDER = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "results.md"
TASKS = "<!-- tasks: written by bench/tasks.py -->"  # from here on the page is that script's
SEEDS = (0, 1, 2)
FULL, TOP = "full(lr=1e-4) + layerwise_lr(decay=0.85)", "unfreeze('blocks[-2:]', lr=2e-4)"
COMMON = {"train.label_smoothing": 0.1}
SMALL = {**COMMON, "train.batch_size": 16}
# name: (method, epochs), and settings where there are any; epochs are what each needs, cheap ones get more
ALL_ROWS: dict[str, tuple] = {
    "head": ("head()", 10),
    "head + unfreeze": (f"{TOP} + head()", 6),
    "full + layerwise_lr": (f"{FULL} + head()", 4),
    "lora": ("lora() + head()", 3),
    "adapter": ("adapter() + head()", 3),
    "prefix": ("prefix() + head()", 3),
    "bitfit": ("bitfit() + head()", 3),
}
# every other method with its default settings
ALL_ROWS |= {
    "dora": ("dora() + head()", 1),
    "pissa": ("pissa() + head()", 1),
    "adalora": ("adalora() + head()", 1),
    "loha": ("loha() + head()", 1),
    "lokr": ("lokr() + head()", 1),
    "vera": ("vera() + head()", 2),
    "peft": ("peft() + head()", 1),
    "adapter pfeiffer": ("adapter(placement='pfeiffer') + head()", 1),
    "adapter parallel": ("adapter(placement='parallel') + head()", 1),
    "adapter_fusion": ("adapter_fusion(grafts=['{first}', '{second}']) + head()", 1),
    "ia3": ("ia3() + head()", 2),
    "norms": ("norms() + head()", 2),
    "prompt": ("prompt() + head()", 2),
    "ptuning": ("ptuning() + head()", 2),
    "unfreeze": ("unfreeze() + head()", 2),
    "gradual_unfreeze": ("gradual_unfreeze() + head()", 2),
    "full": ("full() + head()", 2),
    "galore": ("full(lr=1e-4) + head()", 2, {"train.optimizer": "galore(scale=1.0)"}),
    "freeze": ("full() + freeze('embeddings') + head()", 2),
    "layerwise_lr": ("full() + layerwise_lr() + head()", 2),
}
TIMED_STEPS = 60
FEW_ROWS = {
    "head": ("head()", 40),
    "head + unfreeze": (f"{TOP} + head()", 12),
    "full + layerwise_lr": (f"{FULL} + head()", 8),
}
PARTS = {
    "full": (None, ALL_ROWS, COMMON),
    "thirty": (30, FEW_ROWS, SMALL),
    "ten": (10, FEW_ROWS, SMALL),
}


def rows(shots: int | None, seed: int) -> list[dict]:
    """The training rows, or `shots` of each class drawn by the seed."""
    path = ROOT / "graftkit" / "demo" / "train.csv"
    table = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    if shots is None:
        return table
    draw = random.Random(seed)
    classes: dict[str, list[dict]] = {}
    for row in table:
        classes.setdefault(row["category"], []).append(row)
    return [row for name in sorted(classes) for row in draw.sample(classes[name], shots)]


def halves(folder: str, seed: int) -> dict[str, str]:
    """Two adapters to be fused, each trained for an epoch on one half of the classes."""
    import graftkit

    table = rows(None, seed)
    classes = sorted({row["category"] for row in table})
    made = {}
    for name, part in (("first", classes[::2]), ("second", classes[1::2])):
        run = graftkit.tune(
            model=MODEL, train=[row for row in table if row["category"] in set(part)],
            method="adapter(placement='pfeiffer') + head()", out=f"{folder}/{name}",
            settings={"data.eval": None, "train.epochs": 1, "seed": seed},
        )  # fmt: skip
        made[name] = str(run.path / "graft")
    return made


def measure(part: str, name: str, seed: int, alone: bool, steps: int | None = None) -> dict:
    """One run, in this process. With `steps`, for its seconds alone: nothing is tested."""
    import graftkit

    shots, methods, settings = PARTS[part]
    method, epochs, *more = methods[name]
    settings = {**settings, **(more[0] if more else {})}
    if steps is not None:
        settings = {**settings, "train.steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        if "{first}" in method:
            method = method.format(**halves(folder, seed))
        run = graftkit.tune(
            model=MODEL, train=rows(shots, seed), method=method,
            test=None if steps is not None else ROOT / "graftkit" / "demo" / "test.csv", out=f"{folder}/run",
            settings={"data.eval": None, "train.epochs": epochs, "seed": seed, **settings},
        )  # fmt: skip
    kept = (
        "trained_parameters",
        "total_parameters",
        "seconds",
        "peak_memory_bytes",
        "steps",
        "precision",
        "method",
        "optimizer",
    )
    result = {**run.result, "method": run.result["method"].replace(folder, "runs")}
    return {
        "part": part, "name": name, "seed": seed, "epochs": epochs, "alone": alone, "machine": machine(),
        **{name: run.metrics[name] for name in ("accuracy", "macro_f1") if run.metrics},
        **{key: result[key] for key in kept},
    }  # fmt: skip


def path_of(part: str, name: str, seed: int) -> Path:
    return FOLDER / f"{part}-{name.replace(' ', '')}-{seed}.json"


def timing_of(name: str) -> Path:
    return FOLDER / f"timed-{name.replace(' ', '')}.json"


def run_all(jobs: int, seeds: list[int], parts: list[str], names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    work = [(p, n, s) for p in parts for s in seeds for n in PARTS[p][1]
            if not path_of(p, n, s).exists() and (not names or n in names)]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = "1"

    def one(item: tuple[str, str, int]) -> None:
        part, name, seed = item
        given = json.dumps({"part": part, "name": name, "seed": seed, "alone": jobs == 1})
        done = subprocess.run(
            [sys.executable, __file__, "--child", given], env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            print(f"{item} failed: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
            return
        result = json.loads(done.stdout.strip().splitlines()[-1])
        path_of(part, name, seed).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(item, round(result["accuracy"], 4), result["seconds"], flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, work))


def time_all() -> None:
    """A short run of two threads for each method that has no whole one."""
    for name in ALL_ROWS:
        runs = [
            json.loads(path_of("full", name, s).read_text())
            for s in SEEDS
            if path_of("full", name, s).exists()
        ]
        if any(run["alone"] for run in runs) or timing_of(name).exists():
            continue
        given = json.dumps({"part": "full", "name": name, "seed": 0, "alone": True, "steps": TIMED_STEPS})
        done = subprocess.run([sys.executable, __file__, "--child", given], capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{name} failed: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
            continue
        timing_of(name).write_text(done.stdout.strip().splitlines()[-1] + "\n", encoding="utf-8")
        print(name, json.loads(timing_of(name).read_text())["seconds"], flush=True)


def write() -> None:
    """The page, from the kept figures."""
    paths = sorted(path for part in PARTS for path in FOLDER.glob(f"{part}-*-?.json"))
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    text = (ROOT / "bench" / "results_head.md").read_text(encoding="utf-8")
    titles = {
        "full": "All 10,003 training rows",
        "thirty": "30 rows of each class (2,310 rows)",
        "ten": "10 rows of each class (770 rows)",
    }
    for part, title in titles.items():
        methods = PARTS[part][1]
        text += f"\n## {title}\n\n| method | test accuracy, mean | lowest to highest | trained parameters | epochs | seconds | peak memory |\n"
        text += "| --- | --- | --- | --- | --- | --- | --- |\n"
        for name in methods:
            runs = [run for run in kept if run["part"] == part and run["name"] == name]
            if runs:
                text += line(runs)
    alone = next((run["machine"] for run in kept if run["alone"]), kept[0]["machine"])
    _, mark, tasks = PAGE.read_text(encoding="utf-8").partition(TASKS) if PAGE.exists() else ("", "", "")
    PAGE.write_text(text + f"\nMachine: {alone}.\n" + (f"\n{mark}{tasks}" if mark else ""), encoding="utf-8")
    print(PAGE)


def line(runs: list[dict]) -> str:
    accuracies = [run["accuracy"] for run in runs]
    timed = [run for run in runs if run["alone"]]
    if not timed and timing_of(runs[0]["name"]).exists():
        short = json.loads(timing_of(runs[0]["name"]).read_text())
        timed = [{**short, "seconds": short["seconds"] * runs[0]["steps"] / short["steps"]}]
    seconds = f"{statistics.median(run['seconds'] for run in timed):.0f}" if timed else "not timed"
    memory = f"{max(run['peak_memory_bytes'] for run in timed) / 1e9:.2f} GB" if timed else "not measured"
    spread = (
        f"{min(accuracies):.4f} to {max(accuracies):.4f} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
    )
    optimizer = runs[0].get("optimizer", DEFAULT_OPTIMIZER)
    beside = "" if optimizer == DEFAULT_OPTIMIZER else f", `train.optimizer={optimizer}`"
    return (
        f"| `{runs[0]['method']}`{beside} | {statistics.mean(accuracies):.4f} | {spread} | {runs[0]['trained_parameters']:,} "
        f"| {runs[0]['epochs']} | {seconds} | {memory} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "time", "write"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--names", default="")
    options = parser.parse_args()
    if options.command == "run":
        names = [name for name in options.names.split(",") if name]
        run_all(options.jobs, [int(s) for s in options.seeds.split(",")], options.only.split(","), names)
    if options.command == "time":
        time_all()
    write()


if __name__ == "__main__":
    given = child_arguments()
    if given is None:
        main()
    else:
        print(json.dumps(measure(**given)))
