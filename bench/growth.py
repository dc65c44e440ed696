"""How cost grows: with rows, tokens of a row, blocks, and the share of parameters that is trained.

    python bench/growth.py [--only CURVE ...] [--quick] [--only-write]

Each point is a run of its own in a process of its own, through `graftkit.tune` with random weights, so that nothing is cached from
the point before: the median seconds of a step after the first ones, seconds until the first step, and peak memory of the process.
`arithmetic` is how much a step's floating-point operations grow from the first point, `measured` how much its seconds do; where
the geometry is tiny, what a step costs besides its products makes the measured curve flatter. Rows of a table are held in
memory as token ids, those of a corpus in files. Figures are stored in bench/results/growth.json and written into
docs/performance.md with docs/images/growth.svg, which --only-write does without running anything; --quick stores nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, child, child_arguments, machine, section
from compared.measures import apart, peak_memory, word_tokenizer

STORED = ROOT / "bench" / "results" / "growth.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "growth.svg"
BEGIN, END = "<!-- growth: written by bench/growth.py -->", "<!-- end of growth -->"
WIDTH, INNER, HEADS, VOCABULARY = 128, 512, 2, 2000
POINT = {
    "rows": 1000,
    "tokens": 64,
    "blocks": 6,
    "batch": 16,
    "steps": 24,
    "first": 8,
    "method": "full() + head()",
}
SHARES = (
    "head(pooling=own)",
    "bitfit(sites='blocks[-1]') + head(pooling=own)", "lora(rank=1, sites='q,v') + head(pooling=own)",
    "lora(rank=8) + head(pooling=own)", "unfreeze('blocks[-1]') + head(pooling=own)", "unfreeze('blocks[-3:]') + head(pooling=own)",
    "full() + head(pooling=own)",
)  # fmt: skip
CURVES: dict[str, dict[str, Any]] = {
    "rows": {"title": "rows of a table", "points": [{"rows": n} for n in (1000, 10_000, 100_000, 1_000_000)]},
    "corpus": {"title": "rows of a corpus", "points": [{"rows": n, "corpus": True, "method": "full()"} for n in (1000, 10_000, 100_000, 1_000_000)]},
    "tokens": {"title": "tokens of a row", "points": [{"tokens": n, "batch": 4, "rows": 100} for n in (16, 64, 256, 1024, 2048)]},
    "blocks": {"title": "blocks", "points": [{"blocks": n} for n in (2, 6, 12, 24, 48)]},
    "share": {"title": "trained share", "points": [{"method": method} for method in SHARES]},
}  # fmt: skip
QUICK = {"steps": 4, "first": 1}


def operations(point: dict[str, Any], trained: dict[str, int]) -> float:
    """Return the operations of a step in its blocks: forwards, gradients of inputs above the first trained block, of weights.

    `trained`: trained parameters by block. With nothing trained in the blocks, they are computed forwards alone.
    """
    tokens, length, blocks = point["batch"] * point["tokens"], point["tokens"], point["blocks"]
    block = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER
    forwards = blocks * (2 * tokens * block + 4 * tokens * length * WIDTH)
    above = blocks - min((int(number) for number in trained), default=blocks)
    inputs = above * (2 * tokens * block + 8 * tokens * length * WIDTH)
    return float(forwards + inputs + 2 * tokens * sum(trained.values()))


def make_model(folder: Path, blocks: int, tokens: int, causal: bool) -> None:
    """Write a small BERT, or a small Llama, with random weights and a tokenizer that knows a word for each token."""
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    geometry = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": blocks,
        "num_attention_heads": HEADS, "max_position_embeddings": max(512, tokens),
    }  # fmt: skip
    if causal:
        LlamaForCausalLM(
            LlamaConfig(**geometry, bos_token_id=None, eos_token_id=0, pad_token_id=1)
        ).save_pretrained(folder)
    else:
        BertForSequenceClassification(BertConfig(**geometry, pad_token_id=1)).save_pretrained(folder)
    word_tokenizer(folder, VOCABULARY)


def make_rows(path: Path, rows: int, tokens: int, corpus: bool) -> None:
    """Write made-up rows: a CSV file with two labels, or a text file with a document for each row."""
    draw = random.Random(0)
    known = [
        " ".join(f"w{draw.randrange(2, VOCABULARY)}" for _ in range(tokens - corpus))
        for _ in range(min(rows, 1000))
    ]
    with path.open("w", encoding="utf-8") as file:
        if not corpus:
            file.write("text,label\n")
        for number in range(rows):
            # the number of the row makes each document another one
            text = f"w{2 + number % 1000} w{2 + number // 1000} {known[number % len(known)]}"
            words = text.split(" ", tokens)[:tokens]
            file.write(" ".join(words) + "\n\n" if corpus else f"{' '.join(words)},{'ab'[number % 2]}\n")


def measure(**point: Any) -> dict[str, Any]:
    """Train one point for some steps."""
    corpus = point.get("corpus", False)
    with tempfile.TemporaryDirectory() as folder:
        place, data = Path(folder, "model"), Path(folder, "rows.txt" if corpus else "rows.csv")
        apart(make_model, place, point["blocks"], point["tokens"], corpus)
        make_rows(data, point["rows"], point["tokens"], corpus)
        import graftkit
        from graftkit.report.console import Console

        times: list[float] = []
        Console.step = lambda *given: times.append(time.perf_counter())  # called once after each step
        start = time.perf_counter()
        run = graftkit.tune(
            model=str(place), task="causal()" if corpus else "classify()", train=str(data), method=point["method"],
            out=f"{folder}/run", settings={
                "train.steps": point["steps"], "train.batch_size": point["batch"], "data.eval": None,
                "data.max_length": point["tokens"], "train.checkpoint_every": point["steps"],
            },
        )  # fmt: skip
        memory = peak_memory()
        seconds = statistics.median(
            b - a for a, b in zip(times[point["first"] :], times[point["first"] + 1 :])
        )
        plan = json.loads(Path(run.path, "plan.json").read_text(encoding="utf-8"))
    trained, total = plan["trained_parameters"], plan["total_parameters"]
    return {
        **point,
        "seconds": seconds,
        "until_first": times[0] - start,
        "memory": memory,
        "share": trained / total,
    }


def trained_of(point: dict[str, Any]) -> dict[str, int]:
    """Return the parameters of the blocks' matrices that `method` trains, by block, for `operations`."""
    blocks, method, block = point["blocks"], point["method"], 4 * WIDTH * WIDTH + 2 * WIDTH * INNER
    if method.startswith("full"):
        first, each = 0, block
    elif method.startswith("unfreeze"):
        first, each = blocks - int(method.split("blocks[-")[1].split(":")[0].split("]")[0]), block
    elif method.startswith("head"):
        first, each = blocks, 0
    elif method.startswith("bitfit"):
        first, each = blocks - 1, 0
    else:
        first, each = 0, 0  # the products of low ranks are small
    return {str(number): each for number in range(first, blocks)}


def x_of(curve: str, one: dict[str, Any]) -> float:
    key = {"corpus": "rows", "share": "share"}.get(curve, curve)
    return one[key]


def table(curve: str, found: list[dict[str, Any]]) -> str:
    """Return a Markdown table of one curve."""
    lines = [
        f"| {CURVES[curve]['title']} | ms a step | µs a token | arithmetic | measured | s until the first step | peak memory |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = found[0]
    work = [operations(one, trained_of(one)) for one in found]
    for one, needed in zip(found, work):
        x = x_of(curve, one)
        name = f"{x:.2%}" if curve == "share" else f"{x:,}"
        tokens = one["batch"] * one["tokens"]
        lines.append(
            f"| {name} | {one['seconds'] * 1e3:.1f} | {one['seconds'] / tokens * 1e6:.1f} | {needed / work[0]:.2f} x | "
            f"{one['seconds'] / base['seconds']:.2f} x | {one['until_first']:.1f} | {one['memory'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw seconds of a step (beside the arithmetic) and peak memory of all curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "font.size": 8, "svg.hashsalt": "growth"})
    figure, axes = pyplot.subplots(2, len(found), figsize=(2.6 * len(found), 4.4), squeeze=False)
    for column, (curve, points) in enumerate(found.items()):
        x = [x_of(curve, one) for one in points]
        work = [operations(one, trained_of(one)) for one in points]
        above, below = axes[0][column], axes[1][column]
        above.plot(x, [one["seconds"] * 1e3 for one in points], "o-", color="#00796b", label="measured")
        above.plot(
            x,
            [points[0]["seconds"] * 1e3 * each / work[0] for each in work],
            "--",
            color="#888888",
            label="arithmetic",
        )
        below.plot(x, [one["memory"] / 1e6 for one in points], "o-", color="#00796b")
        for axis in (above, below):
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        below.set_xlabel(CURVES[curve]["title"])
        if not column:
            above.set_ylabel("ms a step")
            below.set_ylabel("peak memory, MB")
            above.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def write() -> None:
    """Put the stored curves into the page, and draw them."""
    text = "Not measured yet."
    if STORED.exists():
        stored = json.loads(STORED.read_text(encoding="utf-8"))
        if importlib.util.find_spec("matplotlib"):
            draw(stored["curves"], PICTURE)
        else:
            print("matplotlib is not installed, so the picture is an older one or missing", file=sys.stderr)
        parts = [table(curve, points) for curve, points in stored["curves"].items()]
        text = "\n\n".join(
            ["![Seconds of a step and peak memory](images/growth.svg)", *parts, f"{stored['machine']}."]
        )
    section(PAGE, BEGIN, END, text)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES), metavar="CURVE")
    parser.add_argument("--quick", action="store_true", help="two points of each curve, few steps")
    parser.add_argument("--only-write", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = options()
    if given.only_write:
        write()
        return
    found: dict[str, list[dict[str, Any]]] = {}
    if STORED.exists() and not given.quick:
        found = json.loads(STORED.read_text(encoding="utf-8"))["curves"]
    for curve in given.only:
        points = CURVES[curve]["points"]
        found[curve] = []
        for point in points[:2] if given.quick else points:
            one = child(__file__, {**POINT, **point, **(QUICK if given.quick else {})})
            found[curve].append(one)
            print(
                curve,
                {key: float(f"{one[key]:.4g}") for key in ("seconds", "until_first", "memory", "share")},
                file=sys.stderr,
                flush=True,
            )
    found = {curve: found[curve] for curve in CURVES if curve in found}
    if not given.quick:
        STORED.write_text(
            json.dumps({"machine": machine(), "curves": found}, indent=1) + "\n", encoding="utf-8"
        )
        write()
    for curve, points in found.items():
        print(f"{table(curve, points)}\n")
    if given.quick and importlib.util.find_spec("matplotlib"):
        with tempfile.TemporaryDirectory() as folder:
            draw(found, Path(folder, "growth.svg"))


if __name__ == "__main__":
    arguments = child_arguments()
    if arguments is None:
        main()
    else:
        print(json.dumps(measure(**arguments)))
