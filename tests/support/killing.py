"""Runs that are killed at a chosen moment, and what came of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
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


def moments(root: Path, words: list[str], copies: Path, *, power: bool = False) -> list[Path]:
    """Run a command, and copy the folder `root` before each operation on files in it: what a kill at that moment leaves.
    `power`: what a loss of power leaves, where a file has only the bytes that were synced.

    Return the copies that differ, in order; the last is what the command leaves at its end.
    """
    from graftkit.cli.main import main

    def work():
        watching = True
        synced = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
        sync, replace = os.fsync, os.replace

        def note(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_file():
                synced[path] = path.stat().st_size
            sync(descriptor)

        def moved(source, target) -> None:
            replace(source, target)
            source, target = Path(source), Path(target)
            for path in [path for path in synced if path == source or source in path.parents]:
                synced[target / path.relative_to(source)] = synced.pop(path)

        def copied() -> None:
            copy = Path(shutil.copytree(root, copies / f"{len(list(copies.iterdir())):04d}", symlinks=True))
            for path in copy.rglob("*") if power else ():
                if path.is_file() and path.name != ".lock":
                    os.truncate(path, min(path.stat().st_size, synced.get(root / path.relative_to(copy), 0)))

        def hook(event: str, given: tuple) -> None:
            nonlocal watching
            if watching and _changes_files(event, given, str(root)):
                watching = False
                copied()
                watching = True

        os.fsync, os.replace = note, moved
        sys.addaudithook(hook)
        try:
            main(words)
        finally:
            watching = False
            copied()

    copies.mkdir()
    done = forked(work)
    assert done.status == 0, done.err
    found: dict[object, Path] = {}
    for path in sorted(copies.iterdir()):
        found.setdefault(tuple(sorted(contents(path).items())), path)
    return list(found.values())


def _changes_files(event: str, given: tuple, root: str) -> bool:
    """Return whether an audit event of Python announces a change of a file or folder below `root`."""
    if event == "open":
        path, _, flags = given
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and str(path).startswith(root)
    if event not in ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.truncate", "os.chmod", "os.link"):
        return False
    inside = event in ("os.remove", "os.rmdir") and given[1] != -1  # of a tree that is being removed
    return inside or any(os.fspath(path).startswith(root) for path in given if isinstance(path, str | Path))


def at_operation(number: int, root: Path, do: Callable[[], object]) -> None:
    """From here on, in this process, call `do` before operation `number` (1-based) on files below `root`."""
    count = 0

    def hook(event: str, given: tuple) -> None:
        nonlocal count
        if _changes_files(event, given, str(root)):
            count += 1
            if count == number:
                do()

    sys.addaudithook(hook)


def stopped_at(step: int, words: list[str], command, monkeypatch) -> None:
    """Run a command whose training stops before this step (from 0), as by a signal."""
    from graftkit.engine.loop import Loop
    from graftkit.errors import Interrupted

    plain = Loop._take_step

    def stop(self, *given):
        if self.step == step:
            raise Interrupted("stopped")
        return plain(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_take_step", stop)
        assert command(*words).status != 0


def put_back(copy: Path, root: Path) -> None:
    shutil.rmtree(root)
    shutil.copytree(copy, root, symlinks=True)


def contents(folder: Path) -> dict[str, bytes | None]:
    """The bytes of each file by its path, without what locks say and the numbers of processes; None for a folder."""
    return {
        re.sub(r"\.\d+\.part", ".N.part", str(path.relative_to(folder))): None
        if path.is_dir() or path.name == ".lock"
        else path.read_bytes()
        for path in folder.rglob("*")
    }


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
