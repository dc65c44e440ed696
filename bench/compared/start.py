"""The time from the command `graftkit tune` to the end of its first step: MiniLM, all rows of banking77, defaults, warm files.

The command runs as a user starts it, in a process of its own, which ends at the moment when the first step would be shown.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time

from common import MODEL, ROOT

# what ends the process stands in a module that is imported anyway
PROGRAM = """
import os, sys
from graftkit.report.console import Console
Console.step = lambda *given: os._exit(42)
from graftkit.cli.main import main
main()
"""


def graftkit_side(seed: int, quick: bool) -> dict:
    """Return the seconds of the second of two starts: the first warms the files."""
    for _ in range(1 if quick else 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-c", PROGRAM, "tune", f"model={MODEL}", f"data.train={ROOT}/graftkit/demo/train.csv",
                "data.columns={text: text, label: category}", f"out={folder}/run", f"seed={seed}", "method=lora() + head()",
            ]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            seconds = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode != 42:
                raise SystemExit(f"no step was made:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return {
        "seconds": seconds, "memory": after.ru_maxrss * 1024,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }  # fmt: skip
