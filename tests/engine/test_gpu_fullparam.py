"""bench/gpu_fullparam.py runs here in its tiny form, with torch and transformers alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import forked

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_fullparam.py"
ABSENT = ("pydantic", "datasets", "accelerate", "sklearn", "xxhash", "regex", "typer", "rich", "peft")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--rounding",), ("--after",)])
def test_it_runs_without_what_a_gpu_machine_may_not_have(more):
    def work() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] in ("graftkit", *ABSENT)]:
            del sys.modules[name]
        sys.modules |= dict.fromkeys(("pydantic", "datasets", "accelerate", "xxhash"), None)
        sys.argv = [str(SCRIPT), "--tiny", "--one", "--lengths", "16", *more]
        exec(
            compile(SCRIPT.read_text(encoding="utf-8"), str(SCRIPT), "exec"),
            {"__name__": "__main__", "__file__": str(SCRIPT)},
        )

    done = forked(work)
    assert done.status == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    count = found["parameters"]
    assert found["weight_bytes"] == 2 * count and found["tokens_per_second"] > 0
    wanted = 8 * count if "--rounding" in more else 4 * count  # two moments, in fp32 or bf16
    assert 0 <= found["optimizer_bytes"] - wanted < 4 * 100
    assert found["gradient_bytes"] == (2 * count if "--after" in more else 2 * 256 * 64)
