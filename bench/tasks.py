"""Real results of every task: the rows of bench/task_rows on real data, three seeds; a section of docs/results.md.

    python bench/tasks.py run [--data ../shared/data] [--only wnut17,xquad] [--rows lora] [--seeds 0,1,2]
                               [--jobs 2]
    python bench/tasks.py write

Each run is a process of its own and its figures are kept in bench/results/, so that an interrupted measurement goes
on. A file of bench/task_rows names its data set and holds TITLE, BACKBONE, METRIC, BAR and either
`rows(data, folder)`, recipes by name, or ROWS and `measure(row, seed, data, folder)` where one recipe is not enough; and
SHOWN, other metrics that are told below its table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from common import ROOT, child_arguments, machine, section

FOLDER = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "results.md"
DATA = ROOT.parent / "shared" / "data"
BEGIN, END = "<!-- tasks: written by bench/tasks.py -->", "<!-- end of tasks -->"
KEPT = ("trained_parameters", "seconds", "peak_memory_bytes", "steps", "precision", "method")


def sets() -> dict[str, ModuleType]:
    """The data sets there are, by name."""
    names = sorted(
        path.stem for path in (ROOT / "bench" / "task_rows").glob("*.py") if path.stem != "__init__"
    )
    return {name: importlib.import_module(f"task_rows.{name}") for name in names}


def names_of(module: ModuleType, data: Path) -> tuple[str, ...]:
    if hasattr(module, "ROWS"):
        return tuple(module.ROWS)
    with tempfile.TemporaryDirectory() as folder:
        return tuple(module.rows(data, Path(folder)))


def measure(name: str, row: str, seed: int, data: str) -> dict:
    """One run, in this process."""
    import graftkit

    module, place = sets()[name], Path(data) / name
    with tempfile.TemporaryDirectory() as folder:
        if hasattr(module, "measure"):
            result = module.measure(row, seed, place, Path(folder))
        else:
            recipe = module.rows(place, Path(folder))[row]
            run = graftkit.tune({**recipe, "seed": seed, "out": f"{folder}/run"})
            result = {key: run.result[key] for key in KEPT} | {"metrics": run.metrics}
    figures = {key: value for key, value in result["metrics"].items() if isinstance(value, int | float)}
    return {"set": name, "row": row, "seed": seed, "machine": machine(), **result, "metrics": figures}


def path_of(name: str, row: str, seed: int) -> Path:
    return FOLDER / f"task-{name}-{row.replace(' ', '')}-{seed}.json"


def run_all(data: Path, seeds: list[int], only: list[str], wanted: list[str], jobs: int) -> None:
    FOLDER.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = "1"
    work = [
        (module, name, row, seed)
        for seed in seeds
        for name, module in sets().items()
        if not only or name in only
        for row in names_of(module, data / name)
        if not path_of(name, row, seed).exists() and (not wanted or row in wanted)
    ]

    def one(item: tuple[ModuleType, str, str, int]) -> None:
        module, name, row, seed = item
        given = json.dumps({"name": name, "row": row, "seed": seed, "data": str(data)})
        done = subprocess.run(
            [sys.executable, __file__, "--child", given], capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            print(f"{name}, {row}, seed {seed} failed: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
            return
        result = json.loads(done.stdout.strip().splitlines()[-1])
        path_of(name, row, seed).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(
            name, row, seed, round(result["metrics"][module.METRIC], 4), round(result["seconds"]), flush=True
        )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, work))


def write() -> None:
    """The section of the page, from the kept figures."""
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("task-*.json"))]
    parts = [
        "## Every task",
        "",
        "Output of `python bench/tasks.py run`. If settings were chosen with test figures in view, the data set's file in "
        "`bench/task_rows/` says so. Missing data sets, and rows with fewer than three seeds, have not been measured completely.",
        "",
    ]
    for name, module in sets().items():
        runs = [run for run in kept if run["set"] == name]
        if not runs:
            continue
        parts += [f"### {module.TITLE}", "", f"Backbone: {module.BACKBONE}. Target: {module.BAR}.", ""]
        parts += [f"| row | method | {module.METRIC}, mean | lowest to highest | trained parameters |"]
        parts += ["| --- | --- | --- | --- | --- |"]
        for row in dict.fromkeys(run["row"] for run in runs):
            parts.append(line([run for run in runs if run["row"] == row], module.METRIC))
        shown = getattr(module, "SHOWN", ())
        if shown:
            parts.append("")
        for run in runs if shown else ():
            told = ", ".join(f"`{key}` {run['metrics'][key]:.4g}" for key in shown)
            parts.append(f"- {run['row']}, seed {run['seed']}: {told}.")
        parts.append("")
    section(PAGE, BEGIN, END, "\n".join(parts))


def line(runs: list[dict], metric: str) -> str:
    values = [run["metrics"][metric] for run in runs]
    seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    return (
        f"| {runs[0]['row']} | `{runs[0]['method']}` | {statistics.mean(values):.4f} | {min(values):.4f} to "
        f"{max(values):.4f} ({seeds}) | {runs[0]['trained_parameters']:,} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "write"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", default="")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at a time; two or more have one thread each"
    )
    options = parser.parse_args()
    if options.command == "run":
        only, wanted = ([part for part in text.split(",") if part] for text in (options.only, options.rows))
        seeds = [int(seed) for seed in options.seeds.split(",")]
        run_all(options.data.expanduser().resolve(), seeds, only, wanted, options.jobs)
    write()


if __name__ == "__main__":
    given = child_arguments()
    if given is None:
        main()
    else:
        print(json.dumps(measure(**given)))
