"""Record the golden losses: `python tests/golden/record.py`.

All cases of cases.py are run with the library of this checkout, on one thread, and golden.json is written anew. With
names of cases only these are: `python tests/golden/record.py classify-lora generate-full`.

Record only where losses are meant to change, and say in the commit why they do.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before a graftkit that is installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from cases import CASES, run
from inputs import MODELS

GOLDEN = Path(__file__).with_name("golden.json")


def record(names: list[str]) -> None:
    known = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"] if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        kinds = sorted({CASES[name].model for name in names})
        folders = {kind: MODELS[kind](Path(place) / kind) for kind in kinds}
        for name in names:
            start = time.perf_counter()
            known[name] = run(name, folders[CASES[name].model], Path(place) / name)
            losses = known[name].get("loss") or [known[name]["metrics"]["loss"]]
            print(f"{name:28} {time.perf_counter() - start:5.2f} s  {losses[0]:.4f} to {losses[-1]:.4f}")
    made = {
        "made with": {
            "torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "cases": {name: known[name] for name in CASES if name in known},
    }  # fmt: skip
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asked = sys.argv[1:] or list(CASES)
    if unknown := sorted(set(asked) - set(CASES)):
        sys.exit(f"no cases of these names: {', '.join(unknown)}. There are: {', '.join(CASES)}")
    record(asked)
