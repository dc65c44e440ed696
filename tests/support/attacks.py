"""Attacks on the command line as data: files that are put in place, a command, and the error that must come of it.

Each attack runs in a folder of its own, which holds `model` (a tiny BERT), `train.csv`, `eval.csv` and, if its command
names it, `run` (a finished run of these). A new attack is one line in a table of `tests/attack`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 20.0  # far above what a refusal takes, far below what an attack that succeeds takes
TUNE = "tune --model model --task classify --train train.csv --eval eval.csv --method head() --out out train.epochs=1"
PLAN = TUNE.replace("tune", "plan", 1)


@dataclass(frozen=True)
class Attack:
    """One attack.

    `files`: contents by path; a function is called with the path, and None removes the file. `says`: what the error must
    match. `status`: of the command; 0 for an attack that must be survived, not refused.
    """

    name: str
    says: str
    command: str = TUNE
    files: Mapping[str, str | bytes | Callable[[Path], object] | None] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    status: int = 1
    seconds: float = SECONDS

    def place(self, folder: Path, model: Path, rows: Path, run: Path) -> None:
        """Put everything in place in an empty folder."""
        shutil.copytree(model, folder / "model")
        for name in ("train.csv", "eval.csv"):
            shutil.copy(rows / name, folder / name)
        if re.search(r"\brun\b", self.command):
            shutil.copytree(run, folder / "run")
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.unlink()
            elif callable(content):
                content(path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    def check(self, command: Callable, folder: Path) -> None:
        """Run the command and check status, error, time, and that a refusal left every file as it was."""
        before = tree(folder)
        start = time.monotonic()
        done = command(*self.command.split(" "))
        took = time.monotonic() - start
        assert done.status == self.status, done.err
        assert re.search(self.says, done.err, re.DOTALL), done.err
        assert took < self.seconds, f"{took:.1f} s"
        if self.status:
            assert done.err.count("error: ") == 1, done.err
            assert tree(folder) == before, "something was written or lost"


def edited(**changes: object) -> Callable[[Path], object]:
    """Changes entries of a JSON file; None stays null, and `...` removes the entry."""

    def edit(path: Path) -> None:
        value = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))

    return edit


def spoiled(**changes: Callable) -> Callable[[Path], object]:
    """Changes tensors of a safetensors file: those whose names contain the key; `_` adds one called `stranger`."""

    def spoil(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        for part, change in changes.items():
            if part == "_":
                tensors["base_model.model.stranger.weight"] = change()
            for name in [name for name in tensors if part in name and part != "_"]:
                tensors[name] = change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def linked(target: str) -> Callable[[Path], object]:
    """Puts a link to `target` in place of a file."""

    def link(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return link


def pipe(path: Path) -> None:
    """Puts a pipe in place of a file: reading it would wait for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def tree(folder: Path) -> dict[str, tuple]:
    """What a folder holds: kind, size and time of change of each file, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = os.lstat(path)
        found[str(path.relative_to(folder))] = (
            (about.st_mode,) if path.is_dir() else (about.st_mode, about.st_size, about.st_mtime_ns)
        )
    return found
