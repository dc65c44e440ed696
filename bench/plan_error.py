"""How right `graftkit plan` is: 20 runs of text, images and sounds, predicted beside measured; a section of docs/performance.md.

    python bench/plan_error.py run [--quick] [--only NAME,NAME] [--again]
    python bench/plan_error.py write

Each run is a process of its own with an empty cache folder, so that its forecast comes from a trial of its own. Its figures are
kept in bench/results/plan-error.json at once: an interrupted measurement goes on, and a run that fails is named and tried again
the next time. `run` ends with the bars: memory within 10% and time within 20% in 18 of 20 runs. About eight minutes on two quiet
cores; other programs make forecast and run differ. `--quick`: four runs of a few steps, not kept, to test the script.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

from common import MODEL, RESULTS, ROOT, machine, section

FILE = RESULTS / "plan-error.json"
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "images" / "plan_error.svg"
BEGIN, END = "<!-- plan error: written by bench/plan_error.py -->", "<!-- end of plan error -->"
BARS = {"peak_memory_bytes": 0.10, "seconds": 0.20}
LEAST = 0.9  # of the runs are within them
UPPER = "unfreeze('blocks[4:]') + head()"
SHORT, LONG = 1, 10  # queries in a row

# name: (kind, method, rows, queries a row, settings)
RUNS: dict[str, tuple[str, str, int, int, dict]] = {
    "text-head-short": ("text", "head()", 4000, SHORT, {"train.epochs": 8}),
    "text-head-long": ("text", "head()", 800, LONG, {"train.epochs": 8}),
    "text-lora-short": ("text", "lora() + head()", 1500, SHORT, {}),
    "text-lora-long": ("text", "lora() + head()", 300, LONG, {}),
    "text-lora-small-batch": ("text", "lora() + head()", 400, SHORT, {"train.batch_size": 4}),
    "text-lora-large-batch": ("text", "lora() + head()", 1500, SHORT, {"train.batch_size": 128}),
    "text-lora-fp32": ("text", "lora() + head()", 600, SHORT, {"train.precision": "fp32"}),
    "text-lora-accumulated": ("text", "lora() + head()", 600, LONG // 2, {"train.batch_size": 8, "train.accumulate": 4}),
    "text-full-short": ("text", "full() + head()", 1200, SHORT, {}),
    "text-full-long": ("text", "full() + head()", 250, LONG, {}),
    "text-full-fp32": ("text", "full() + head()", 500, SHORT, {"train.precision": "fp32"}),
    "text-full-recomputed": ("text", "full() + head()", 250, LONG, {"train.checkpointing": "blocks"}),
    "text-upper-short": ("text", UPPER, 2000, SHORT, {}),
    "text-upper-long": ("text", UPPER, 400, LONG, {}),
    "image-head": ("image", "head()", 300, 1, {"train.epochs": 8}),
    "image-lora": ("image", "lora() + head()", 300, 1, {}),
    "image-full": ("image", "full() + head()", 300, 1, {"train.batch_size": 16}),
    "audio-head": ("audio", "head()", 120, 1, {"train.epochs": 8}),
    "audio-lora": ("audio", "lora() + head()", 120, 1, {"train.batch_size": 8}),
    "audio-full": ("audio", "full() + head()", 120, 2, {"train.batch_size": 8}),
}  # fmt: skip
QUICK = ("text-lora-short", "text-full-short", "image-full", "audio-head")


def text_rows(folder: Path, count: int, queries: int) -> Path:
    """Rows of some real queries each, with 1 where the first is about a card."""
    with (ROOT / "graftkit" / "demo" / "train.csv").open(encoding="utf-8", newline="") as file:
        known = list(csv.DictReader(file))
    draw, path = random.Random(0), folder / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            some = draw.choices(known, k=draw.randint(max(1, queries // 2), queries))
            writer.writerow([" ".join(row["text"] for row in some), "card" in some[0]["category"]])
    return path


def image_rows(folder: Path, count: int) -> Path:
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(count):
        place = folder / "rows" / ("light", "dark")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        values = draw.integers(0, 256, (96, 96, 3)) // (1 + i % 2)
        Image.fromarray(values.astype(np.uint8)).save(place / f"{i}.png")
    return folder / "rows"


def audio_rows(folder: Path, count: int, seconds: int) -> Path:
    import numpy as np

    draw = np.random.default_rng(0)
    for i in range(count):
        place = folder / "rows" / ("high", "low")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        times = np.arange(int(16000 * seconds * draw.uniform(0.6, 1.0))) / 16000
        values = np.sin(2 * math.pi * (880, 220)[i % 2] * times) * 8000 + draw.normal(0, 500, len(times))
        with wave.open(str(place / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(values.astype(np.int16).tobytes())
    return folder / "rows"


def image_model(folder: Path) -> str:
    """A ViT of about the size of ViT-tiny, with random weights: they do not change what a step takes."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=8, num_attention_heads=3, intermediate_size=768, image_size=96, patch_size=8,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder)
    return str(folder)


def audio_model(folder: Path) -> str:
    """A wav2vec 2.0 of 4 blocks of width 256, with random weights."""
    import transformers as hf

    config = hf.Wav2Vec2Config(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, conv_dim=[128] * 5,
        conv_stride=[5, 4, 4, 2, 2], conv_kernel=[10, 8, 4, 3, 2], num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
    )  # fmt: skip
    hf.Wav2Vec2Model(config).save_pretrained(folder)
    hf.Wav2Vec2FeatureExtractor(sampling_rate=16000, return_attention_mask=True).save_pretrained(folder)
    return str(folder)


def measure(name: str, quick: bool) -> dict:
    """One run, in this process."""
    import torch

    import graftkit

    kind, method, count, length, settings = RUNS[name]
    count = min(count, 64) if quick else count
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if kind == "text":
            model, rows, task = MODEL, text_rows(folder, count, length), "classify"
        elif kind == "image":
            model, rows, task = image_model(folder / "model"), image_rows(folder, count), "image_classify"
        else:
            model, rows, task = (
                audio_model(folder / "model"),
                audio_rows(folder, count, length),
                "audio_classify",
            )
        # a busy machine would make a run seem long enough to compile its blocks
        settings = {"train.epochs": 1 if quick else 2, "train.compile": "none", **settings}
        run = graftkit.tune(
            model=model, task=task, method=method, train=str(rows), out=folder / "run", settings=settings
        )
    return {key: run.result[key] for key in ("predicted", "measured", "steps", "precision")}


def run(only: list[str], quick: bool, again: bool) -> bool:
    """Measure what is not known yet, and return whether all of it is within the bars."""
    known = {} if quick or not FILE.exists() else json.loads(FILE.read_text(encoding="utf-8"))["runs"]
    if again:
        known = {name: one for name, one in known.items() if name not in only}
    failed = []
    for name in [one for one in RUNS if one in only and one not in known]:
        with tempfile.TemporaryDirectory() as cache:
            environment = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "GRAFTKIT_CACHE": cache,
                "GRAFTKIT_CACHE_GB": "0",
                "GRAFTKIT_FORECAST": "1",
            }
            command = [sys.executable, __file__, "child", name, *(["--quick"] if quick else [])]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        try:
            one = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"{name:24} {told(one)}", flush=True)
        except (IndexError, ValueError, KeyError, TypeError):
            failed.append(name)
            print(f"{name:24} failed: {done.stderr.strip()[-300:]}", flush=True)
            continue
        known[name] = one
        if not quick:
            FILE.parent.mkdir(exist_ok=True)
            FILE.write_text(json.dumps({"machine": machine(), "runs": known}, indent=1), encoding="utf-8")
    passed = bars({name: known[name] for name in only if name in known})
    if failed:
        print(f"failed: {', '.join(failed)}; run this again to try them again")
    return passed and not failed


def bars(runs: dict[str, dict]) -> bool:
    """Print how many runs are within each bar, and return whether enough are."""
    passed = True
    for figure, bar in BARS.items():
        good = sum(abs(error(one, figure)) <= bar for one in runs.values())
        passed = passed and good >= LEAST * len(runs)
        print(
            f"{figure} within {bar:.0%} in {good} of {len(runs)} runs (wanted: {math.ceil(LEAST * len(runs))})"
        )
    return passed


def error(one: dict, figure: str) -> float:
    """Measured by predicted, less one."""
    return one["measured"][figure] / one["predicted"][figure] - 1


def told(one: dict) -> str:
    parts = [
        f"{figure} {one['predicted'][figure]:,.6g} -> {one['measured'][figure]:,.6g} ({error(one, figure):+.0%})"
        for figure in BARS
    ]
    return ", ".join(parts)


def write() -> None:
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    runs = {name: kept["runs"][name] for name in RUNS if name in kept["runs"]}
    lines = [
        "| run | memory, planned | measured | | time, planned | measured | |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, one in runs.items():
        before, after = one["predicted"], one["measured"]
        lines.append(
            f"| {name} | {before['peak_memory_bytes'] / 1e6:,.0f} MB | {after['peak_memory_bytes'] / 1e6:,.0f} MB | "
            f"{error(one, 'peak_memory_bytes'):+.0%} | {before['seconds']:.1f} s | {after['seconds']:.1f} s | {error(one, 'seconds'):+.0%} |"
        )
    within = {
        figure: sum(abs(error(one, figure)) <= bar for one in runs.values()) for figure, bar in BARS.items()
    }
    said = (
        f"Within 10% of the memory over the resident model in {within['peak_memory_bytes']} of {len(runs)} runs, within 20% of the "
        f"time in {within['seconds']} (`python bench/plan_error.py`; {kept['machine']}).\n\n![Planned and measured](images/plan_error.svg)"
    )
    PICTURE.write_text(drawn(runs), encoding="utf-8")
    section(PAGE, BEGIN, END, "\n".join(["## How right the plan is", "", said, "", *lines]))


def drawn(runs: dict[str, dict]) -> str:
    """Two columns of points, measured by planned, with the bars as a band."""
    wide, line, left, high = 300, 18, 190, 18 * len(runs) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + 2 * wide + 40} {high}" font-family="sans-serif" font-size="12">',
        "<title>Planned and measured memory and time of each run</title>",
        "<style>text{fill:#333}.band{fill:#9992}.axis{stroke:#999}circle{fill:#1668a8}@media(prefers-color-scheme:dark){text{fill:#ddd}circle{fill:#6cb6ef}}</style>",
    ]
    for column, (figure, bar) in enumerate(BARS.items()):
        start = left + column * (wide + 20)
        middle, unit = start + wide / 2, wide / 2 / 0.6  # 60% on each side
        parts += [
            f'<text x="{middle}" y="16" text-anchor="middle">{("memory", "time")[column]}: measured by planned</text>',
            f'<rect class="band" x="{middle - bar * unit:.1f}" y="24" width="{2 * bar * unit:.1f}" height="{18 * len(runs)}"/>',
            f'<line class="axis" x1="{middle}" x2="{middle}" y1="24" y2="{high - 26}"/>',
            *(f'<text x="{middle + at * unit:.1f}" y="{high - 8}" text-anchor="middle">{at:+.0%}</text>' for at in (-0.5, -bar, bar, 0.5)),
        ]  # fmt: skip
        for row, one in enumerate(runs.values()):
            at = middle + max(-0.6, min(0.6, error(one, figure))) * unit
            parts.append(f'<circle cx="{at:.1f}" cy="{33 + line * row}" r="4"/>')
    parts += [f'<text x="0" y="{37 + line * row}">{name}</text>' for row, name in enumerate(runs)]
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "write", "child"))
    parser.add_argument("name", nargs="?", help="of a run, for child")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure all runs anew")
    parser.add_argument("--only", default="", help="names of runs")
    given = parser.parse_args()
    if given.command == "child":
        print(json.dumps(measure(given.name, given.quick)))
    elif given.command == "run":
        only = given.only.split(",") if given.only else list(QUICK if given.quick else RUNS)
        unknown = [name for name in only if name not in RUNS]
        if unknown:
            parser.error(f"unknown runs: {', '.join(unknown)}; known: {', '.join(RUNS)}")
        raise SystemExit(0 if run(only, given.quick, given.again) else 1)
    else:
        write()


if __name__ == "__main__":
    main()
