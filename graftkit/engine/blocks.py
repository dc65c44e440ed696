"""Blocks of cached activations on disk: safetensors files that hold the values of some rows, by digest.

They lie under PREFIX in the user's cache folder, in a folder for each key. Nobody vouches for them: each has a checksum,
and one that is damaged, or is not what its place says, is removed, so that its rows are computed again. A file is complete
or not there, and its name follows from its rows, so processes that write the same rows at once do no harm.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graftkit.claims import is_leftover
from graftkit.errors import Note, UserError
from graftkit.files import map_tensors, write_tensors
from graftkit.recipe.environment import cache_folder

PREFIX = "prefix"
LIMIT = 20.0  # GB of all blocks
HOUR = 3600.0


@dataclass(frozen=True)
class Block:
    """The values of some rows of a dataset, memory-mapped: those of `rows[i]` are `values[starts[i]:starts[i] + span]`."""

    rows: np.ndarray
    starts: np.ndarray
    values: Tensor


class Blocks:
    """The blocks of one key. `digests` (rows, bytes) of a dataset's rows; `spans` (rows,): how many values each has."""

    def __init__(self, key: str, digests: np.ndarray, spans: np.ndarray) -> None:
        self.key, self.digests, self.spans = key, digests, spans
        self.folder = home() / key
        self.wanted: dict[bytes, list[int]] = {}
        for row, digest in enumerate(digests):
            self.wanted.setdefault(digest.tobytes(), []).append(row)

    @property
    def begun(self) -> bool:
        """Whether anything was ever written under this key."""
        return self.folder.is_dir()

    def find(self) -> list[Block]:
        """Return blocks with rows of the dataset, each row once. Damaged ones are removed, with a note."""
        found, have = [], np.zeros(len(self.spans), bool)
        for path in _files(self.folder):
            try:
                block = self._opened(path, have)
            except UserError as error:
                self._remove(path, str(error))
                continue
            if block is not None and len(block.rows):
                have[block.rows] = True
                found.append(block)
                with suppress(OSError):
                    os.utime(path)  # used last
        return found

    def _opened(self, path: Path, have: np.ndarray) -> Block | None:
        held: list[tuple[list[int], list[int]]] = []

        def wanted(tensors: dict[str, Tensor]) -> bool:
            digests = tensors.get("rows")
            if digests is None or digests.dim() != 2 or digests.dtype != torch.uint8:
                return True  # which is refused below
            rows, places = [], []
            for place, digest in enumerate(digests.numpy()):
                for row in self.wanted.get(digest.tobytes(), ()):
                    if not have[row]:
                        rows.append(row)
                        places.append(place)
            held.append((rows, places))
            return bool(rows)

        mapped = map_tensors(path, wanted)
        if mapped is None:
            return None
        tensors, metadata = mapped
        if metadata.get("key") != self.key or not held or not _is_sound(tensors):
            raise UserError(f"{path} holds no activations of this model.")
        rows, places = (np.array(part, np.int64) for part in held[0])
        starts = tensors["starts"].numpy()
        right = np.diff(starts)[places] == self.spans[rows]
        return Block(rows[right], starts[places][right], tensors["values"])

    def refuse(self) -> None:
        """Remove all blocks, as they do not hold what the model computes."""
        for path in _files(self.folder):
            self._remove(path, f"{path} does not hold what the model computes.")

    def _remove(self, path: Path, why: str) -> None:
        warnings.warn(Note(f"{why} Its rows are computed again."), stacklevel=3)
        with suppress(OSError):
            path.unlink()

    def write(self, rows: np.ndarray, values: Tensor) -> None:
        """Write the values of these rows, (sum of their spans, ...). Raises `UserError` if that fails."""
        digests = np.ascontiguousarray(self.digests[rows])
        starts = np.concatenate([[0], np.cumsum(self.spans[rows])])
        name = hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()
        tensors = {"rows": torch.from_numpy(digests), "starts": torch.from_numpy(starts), "values": values}
        write_tensors(self.folder / f"{name}.safetensors", tensors, {"key": self.key})


def _is_sound(tensors: dict[str, Tensor]) -> bool:
    """Return whether the tensors of a block fit together."""
    if tensors.keys() != {"rows", "starts", "values"} or not tensors["values"].dim():
        return False
    starts = tensors["starts"]
    if starts.dtype != torch.int64 or starts.shape != (len(tensors["rows"]) + 1,):
        return False
    rising = bool((starts.diff() >= 0).all()) and int(starts[0]) == 0
    return rising and int(starts[-1]) == len(tensors["values"]) and tensors["values"].is_floating_point()


def home() -> Path:
    return cache_folder() / PREFIX


def limit() -> float:
    """Return the bytes that all blocks together may take: GRAFTKIT_CACHE_GB, or 20 GB. Raises `UserError` if it is no number."""
    given = os.environ.get("GRAFTKIT_CACHE_GB") or LIMIT
    try:
        found = float(given)
    except ValueError:
        found = -1.0
    if not found >= 0:
        raise UserError(
            f"environment variable GRAFTKIT_CACHE_GB is {given!r}, but must be a number of gigabytes."
        )
    return found * 1e9


def room() -> float:
    """Return the bytes that blocks of a run may take: the limit, and no more than half of what is free on the disk."""
    place = home()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return min(limit(), shutil.disk_usage(place).free / 2)
    except OSError:
        return 0.0


def stored() -> list[tuple[str, int, int, float]]:
    """Return (key, files, bytes, time of last use) of each key, the one used last first."""
    found = []
    for folder in _folders():
        sizes = [(path.stat().st_size, path.stat().st_mtime) for path in _files(folder)]
        if sizes:
            found.append((folder.name, len(sizes), sum(s for s, _ in sizes), max(t for _, t in sizes)))
    return sorted(found, key=lambda entry: -entry[3])


def prune(most: float | None = None) -> tuple[int, int]:
    """Remove the blocks used least recently until all take `most` bytes, by default the limit; and what killed processes
    left. Return how many files were removed, and their bytes. A process that has mapped one may go on reading it.
    """
    most = limit() if most is None else most
    known = []
    for folder in _folders():
        for path in folder.iterdir():
            with suppress(OSError):
                if is_leftover(path) and path.stat().st_mtime < time.time() - HOUR:
                    path.unlink()
        for path in _files(folder):
            with suppress(OSError):
                known.append((path.stat().st_mtime, path.stat().st_size, path))
    total, count, removed = sum(size for _, size, _ in known), 0, 0
    for _, size, path in sorted(known):
        if total - removed <= most:
            break
        with suppress(OSError):
            path.unlink()
            count, removed = count + 1, removed + size
    for folder in _folders():
        with suppress(OSError):  # something is in it
            folder.rmdir()
    return count, removed


def _folders() -> list[Path]:
    try:
        return [path for path in sorted(home().iterdir()) if path.is_dir()]
    except OSError:
        return []


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.safetensors"))
    except OSError:
        return []
