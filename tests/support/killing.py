"""Runs that are killed at a chosen moment, and what came of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from conftest import equal_bits, forked, graft_tensors


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(moment: str, number: int, words: list[str]) -> None:
    """Run a command in a process that dies while it writes its file number `number`, or between two files."""
    import safetensors.torch

    from graftkit.cli.main import main
    from graftkit.runs import monitor as watch

    plain_save, plain_replace, plain_append = safetensors.torch.save_file, os.replace, watch.append_lines
    written = 0

    def save_file(tensors, path, metadata=None):
        nonlocal written
        plain_save(tensors, path, metadata=metadata)
        if "step-" in str(path):
            written += 1
            if moment == "mid-write" and written == number:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

    def replace(source, target):
        name, now = Path(target).name, written == number
        if (
            (moment == "before-rename" and "step-" in name and now)
            or (moment == "before-result" and name == "result.json")
            or (moment == "before-plan" and name == "plan.json")
        ):
            die()
        plain_replace(source, target)
        if (moment == "after-rename" and "step-" in name and now) or (
            moment == "after-best" and "best" in name and written >= number
        ):
            die()

    def append_lines(path, lines):
        lines = list(lines)
        if moment == "mid-log" and written == number:
            with path.open("a") as file:
                file.write("\n".join(lines)[:-20])
            die()
        plain_append(path, lines)

    def work():
        safetensors.torch.save_file, os.replace, watch.append_lines = save_file, replace, append_lines
        main(words)

    done = forked(work)
    assert done.status == -signal.SIGKILL, done.err


def resume(folder: Path) -> dict:
    from graftkit.report.console import Console
    from graftkit.runs.tune import resume_run

    return resume_run(folder, Console(quiet=True)).result


def lines(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("seconds", None)
    return found


def assert_same(left: Path, right: Path) -> None:
    assert equal_bits(graft_tensors(left), graft_tensors(right))
    assert lines(left) == lines(right)
    steps = [line["step"] for line in lines(left) if line["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    results = [json.loads((folder / "result.json").read_text()) for folder in (left, right)]
    for name in ("metrics", "evaluation", "steps", "trained_parameters", "method"):
        assert results[0][name] == results[1][name]
    assert (left / "plan.json").read_text() == (right / "plan.json").read_text()
    assert not list(left.rglob("*.part"))
