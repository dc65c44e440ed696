"""GraftKit beside what people use, on the same work, on a CPU: seconds, accuracy, peak memory, and whether each bar is reached.

    python bench/compare_hf.py [--json] [--rows NAME ...] [--repeat 3] [--compiled] [--quick] [--only-write]

Each side runs in a process of its own (bench/compared/ has the work), the two in turn, `--repeat` times with another seed;
seconds and memory are medians, accuracy is the mean. Where a peer has several settings, all run in the first round and the fastest
goes on; those with torch.compile, which take minutes to compile, only with --compiled. Each run is kept in
bench/results/compare-runs.json until all rows are done, so that the same command goes on where it was interrupted, as long as
neither the code nor the machine has changed. A row passes if its ratio reaches the bar and our accuracy is at most a point lower (a loss at most one percent higher).
Ends with 1 if a row does not pass. --json: one JSON object last. --quick: everything small, to try the script; bars are not
checked and nothing is stored. Otherwise the rows are stored in bench/results and written into docs/performance.md, which
--only-write does without running anything. Needs the extras `demo`, `images` and `peft`, and ../shared for the images.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, child, child_arguments, gflops, machine, section

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- compared: written by bench/compare_hf.py -->", "<!-- end of compared -->"
POINT = 0.01  # how much lower our accuracy may be, and how much higher, relative to the peer's, our loss


@dataclass(frozen=True)
class Side:
    """A function of a file of bench/compared, with its arguments."""

    kind: str
    function: str
    given: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def compiled(self) -> bool:
        return bool(self.given.get("compiled"))

    def run(self, seed: int, quick: bool, done: Done) -> dict[str, Any]:
        """Return the figures of a run: those of an earlier one of this measurement, if it was made already."""
        given = {"kind": self.kind, "function": self.function, "seed": seed, "quick": quick, **self.given}
        key = json.dumps(given, sort_keys=True)
        if key not in done.runs:
            done.add(key, child(__file__, given))
            tell(f"{self.function} ({self.name or self.kind}), seed {seed}", done.runs[key])
        return done.runs[key]


@dataclass(frozen=True)
class Row:
    """One comparison: `bar` is the least ratio of the peer's seconds to ours.

    Without peers, ours are compared with `limit` in seconds, or with the `ideal` that our side returns. `memory_bar` is the
    largest share of the peer's peak memory.
    """

    title: str
    peer: str
    bar: float
    ours: Side
    peers: tuple[Side, ...] = ()
    limit: float | None = None
    memory_bar: float | None = None


def trainer(work: str, **given: Any) -> Side:
    return Side("texts", "trainer_side", {"work": work, **given}, ", ".join(given) or "defaults")


def texts(work: str) -> Side:
    return Side("texts", "graftkit_side", {"work": work})


ROWS = {
    "lora": Row(
        "LoRA r=8 on q and v, MiniLM, 6,919 sentences as long as SST-2's (19 tokens), one epoch", "Trainer + PEFT, defaults",
        8.0, texts("lora"), (trainer("lora"),),
    ),
    "lora-bf16": Row(
        "the same", "Trainer + PEFT, bf16, grouped by length", 4.0, texts("lora"),
        (trainer("lora", bf16=True, grouped=True), trainer("lora", bf16=True, grouped=True, compiled=True)),
    ),
    "head": Row(
        "head on a frozen MiniLM, banking77 (10,003 rows), 10 epochs", "Trainer, defaults", 20.0, texts("head"), (trainer("head"),)
    ),
    "last-two": Row(
        "last 2 of 6 blocks and head, MiniLM, 4,000 rows of banking77, 10 epochs", "Trainer, defaults", 8.0, texts("last two"),
        (trainer("last two"),),
    ),
    "images": Row(
        "new head on a frozen SqueezeNet, ants_bees (243 images), 25 epochs", "a plain PyTorch loop", 10.0,
        Side("images", "graftkit_side"),
        (Side("images", "loop_side", {"workers": 0}, "no workers"), Side("images", "loop_side", {"workers": 2}, "2 workers")),
    ),
    "llama": Row(
        "LoRA r=16 on all linear layers, Llama geometry of 150 M, vocabulary 128k, 96 sequences of 512, completion-only loss",
        "Trainer + PEFT, bf16", 2.5, Side("llama", "graftkit_side"),
        (
            Side("llama", "trainer_side", {}, "bf16"),
            Side("llama", "trainer_side", {"weights": "bfloat16"}, "bf16, weights too"),
            Side("llama", "trainer_side", {"weights": "bfloat16", "compiled": True}, "bf16, weights too, compiled"),
        ),
        memory_bar=0.5,
    ),
    "bert-step": Row(
        "LoRA step on BERT-base, 8 x 128, bf16", "the machine's measured bf16 products", 0.5, Side("products", "graftkit_side")
    ),
    "start": Row(
        "`graftkit tune` to the end of the first step, MiniLM, warm files", "limit", 1.0, Side("start", "graftkit_side"), limit=5.0
    ),
}  # fmt: skip


class Done:
    """The runs of a measurement that are done, in a file if `path` is one. Rows that share a run share its figures."""

    def __init__(self, path: Path | None, origin: str) -> None:
        self.path, self.origin = path, origin
        self.runs: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.runs = stored["runs"] if stored["origin"] == origin else {}

    def add(self, key: str, found: dict[str, Any]) -> None:
        self.runs[key] = found
        if self.path is not None:
            new = self.path.with_suffix(".new")
            new.write_text(
                json.dumps({"origin": self.origin, "runs": self.runs}, indent=1) + "\n", encoding="utf-8"
            )
            new.replace(self.path)

    def end(self) -> None:
        """Forget the runs: the next measurement is another one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def code() -> str:
    """Return a digest of the code that is measured."""
    digest = hashlib.sha256()
    for path in sorted(
        [*Path(ROOT, "graftkit").rglob("*.py"), *Path(ROOT, "bench", "compared").glob("*.py")]
    ):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_row(row: Row, repeat: int, quick: bool, done: Done, compiled: bool = False) -> dict[str, Any]:
    """Run both sides in turn; peers with torch.compile if `compiled`."""
    ours: list[dict[str, Any]] = []
    left = [side for side in row.peers if compiled or not side.compiled]
    theirs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in left}
    for seed in range(repeat):
        ours.append(row.ours.run(seed, quick, done))
        for side in left:
            theirs[side.name].append(side.run(seed, quick, done))
        if len(left) > 1:
            left = [min(left, key=lambda side: theirs[side.name][0]["seconds"])]
    best = theirs[left[0].name] if left else [{"seconds": row.limit or one["ideal"]} for one in ours]
    found = compared(row, ours, best)
    settings = {name: [one["seconds"] for one in runs] for name, runs in theirs.items()}
    return found | {"peer_settings": settings, "runs": ours, "peer_runs": best}


def tell(name: str, found: dict[str, Any]) -> None:
    figures = {key: float(f"{value:.4g}") for key, value in found.items() if isinstance(value, int | float)}
    print(f"  {name}: {figures}", file=sys.stderr, flush=True)


def compared(row: Row, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a row, and whether it passes."""
    seconds, peer_seconds = (statistics.median(one["seconds"] for one in runs) for runs in (ours, theirs))
    found: dict[str, Any] = {
        "peer": row.peer, "peer_seconds": peer_seconds, "seconds": seconds, "ratio": peer_seconds / seconds, "bar": row.bar,
    }  # fmt: skip
    passed = found["ratio"] >= row.bar
    for key in ("accuracy", "loss", "memory"):
        for prefix, runs in (("", ours), ("peer_", theirs)):
            values = [one[key] for one in runs if key in one]
            middle = statistics.median if key == "memory" else statistics.mean
            found[prefix + key] = middle(values) if values else None
    if found["peer_accuracy"] is not None:
        passed &= found["accuracy"] >= found["peer_accuracy"] - POINT
    if found["peer_loss"] is not None:
        passed &= found["loss"] <= found["peer_loss"] * (1 + POINT)
    if row.memory_bar is not None:
        found["memory_bar"] = row.memory_bar
        passed &= found["memory"] <= row.memory_bar * found["peer_memory"]
    return found | {"passed": passed}


def table(found: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the rows."""
    lines = [
        "| work | peer | peer, s | GraftKit, s | ratio | at least | accuracy or loss, peer's | ours | peak memory, peer's | ours | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in found:
        row = ROWS[one["name"]]
        quality = [one[p + "loss"] if one["accuracy"] is None else one[p + "accuracy"] for p in ("peer_", "")]
        cells = [row.title, one["peer"], f"{one['peer_seconds']:.3g}", f"{one['seconds']:.3g}", f"{one['ratio']:.2f} x",
                 f"{one['bar']:g}"]  # fmt: skip
        cells += ["" if value is None else f"{value:.4f}" for value in quality]
        cells += [
            "" if one[p + "memory"] is None else f"{one[p + 'memory'] / 1e9:.2f} GB" for p in ("peer_", "")
        ]
        lines.append("| " + " | ".join([*cells, "" if one["passed"] else "below the bar"]) + " |")
    return "\n".join(lines)


def write() -> None:
    """Put the stored rows into the page, in the place of earlier ones."""
    paths = {name: RESULTS / f"compare-{name}.json" for name in ROWS}
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in paths.values() if path.exists()]
    lacking = ", ".join(f"`{name}`" for name, path in paths.items() if not path.exists())
    parts = [table(stored)] if stored else []
    machines = dict.fromkeys(one["machine"] for one in stored)
    parts += [f"Rounds in turn: {stored[0]['repeat']}. {'; '.join(machines)}."] if stored else []
    parts += [f"Not measured yet: {lacking}."] if lacking else []
    section(PAGE, BEGIN, END, "\n\n".join(parts))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="try torch.compile on the peer's side too")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only-write", action="store_true")
    return parser.parse_args()


def main() -> int:
    given = options()
    if given.only_write:
        write()
        return 0
    repeat = 1 if given.quick else given.repeat
    about = (
        f"{machine()}; matrix products: fp32 {gflops('float32'):.0f}, bf16 {gflops('bfloat16'):.0f} GFLOP/s"
    )
    done = Done(None if given.quick else RESULTS / "compare-runs.json", f"{machine()}; code {code()}")
    found, start = [], time.monotonic()
    for name in given.rows:
        print(f"{name}: {ROWS[name].title}", file=sys.stderr, flush=True)
        found.append({"name": name, **run_row(ROWS[name], repeat, given.quick, done, given.compiled)})
        if not given.quick:
            stored = {**found[-1], "repeat": repeat, "machine": about}
            path = Path(RESULTS, f"compare-{name}.json")
            path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    if not given.quick:
        write()
        done.end()
    print(table(found))
    print(f"\nRounds in turn: {repeat}; {(time.monotonic() - start) / 60:.0f} minutes. {about}.")
    if given.as_json:
        told = [
            {key: value for key, value in one.items() if not key.endswith(("runs", "settings"))}
            for one in found
        ]
        passed = all(one["passed"] for one in found)
        print(json.dumps({"rows": told, "quick": given.quick, "machine": about, "passed": passed}))
    return int(not given.quick and not all(one["passed"] for one in found))


if __name__ == "__main__":
    arguments = child_arguments()
    if arguments is None:
        sys.exit(main())
    module = importlib.import_module(f"compared.{arguments.pop('kind')}")
    print(json.dumps(getattr(module, arguments.pop("function"))(**arguments)))
