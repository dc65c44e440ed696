"""What a folder of shards holds, and whether it is whole.

corpus.json                      what the shards were made of and how, and how many there are
shard-00000.bin, shard-00000.idx a pair in Megatron's form
shard-00000.npy                  for each document its bytes and its fingerprint
shard-00000.json                 counts, and sizes and checksums of these files; it is written last
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from graftkit.errors import UserError
from graftkit.files import irregular, read_json, write_json

CORPUS = "corpus.json"
FORMAT = 1
DOCUMENTS = np.dtype([("bytes", "<i8"), ("fingerprint", "<u8")])
ENDINGS = (".bin", ".idx", ".npy")
BLOCKS, BLOCK = 32, 1 << 16  # of a sample
FULL = (
    1 << 30
)  # bytes of a corpus whose shards are read as a whole when it is opened; of larger ones samples are


def prefix_of(folder: Path, number: int) -> Path:
    """Return the path of a shard without the ending of its files."""
    return folder / f"shard-{number:05d}"


def ending(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def checksum(path: Path) -> str:
    """Return the XXH3 of a file."""
    found = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def sample(path: Path, whole: int = BLOCKS * BLOCK, blocks: int = BLOCKS) -> str:
    """Return the XXH3 of blocks of a file, its first and last among them; of all of it up to `whole` bytes."""
    size = path.stat().st_size
    if size <= whole:
        return checksum(path)
    found = xxhash.xxh3_64()
    with path.open("rb") as file:
        for number in range(blocks):
            file.seek((size - BLOCK) * number // (blocks - 1))
            found.update(file.read(BLOCK))
    return found.hexdigest()


def describe(prefix: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Write the description of a shard whose other files are written, and return it."""
    files = {
        suffix: {"size": path.stat().st_size, "checksum": checksum(path), "sample": sample(path)}
        for suffix in ENDINGS
        for path in [ending(prefix, suffix)]
    }
    description = {**about, "files": files}
    description["checksum"] = _checksum_of(description)
    write_json(ending(prefix, ".json"), description)
    return description


def read_description(prefix: Path, thorough: bool) -> dict[str, Any]:
    """Return the description of a shard. Raises UserError if it is missing, or one of the files is not as it says.

    `thorough`: compare all bytes of the `.bin` file, instead of a sample of them.
    """
    path = ending(prefix, ".json")
    description = read_json(path)
    if description.get("checksum") != _checksum_of(description):
        raise UserError(f"{path} does not match its checksum.")
    for suffix in ENDINGS:
        path, about = ending(prefix, suffix), description["files"][suffix]
        if (wrong := irregular(path)) is not None:
            raise UserError(f"{path} {wrong}.")
        if not path.exists():
            raise UserError(f"{path} is missing.")
        if (size := path.stat().st_size) != about["size"]:
            raise UserError(f"{path} has {size:,} bytes instead of {about['size']:,}.")
        whole = thorough or suffix != ".bin"
        if (checksum(path) if whole else sample(path)) != about["checksum" if whole else "sample"]:
            raise UserError(f"{path} does not match its checksum.")
    return description


def _checksum_of(description: dict[str, Any]) -> str:
    rest = {key: value for key, value in description.items() if key != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())


def read_corpus(folder: Path) -> dict[str, Any]:
    """Return what a folder says of its shards. Raises UserError if it is not one that this version wrote."""
    about = read_json(folder / CORPUS)
    if about.get("format") != FORMAT or not isinstance(about.get("shards"), int):
        raise UserError(
            f"{folder / CORPUS} is not of the form that this version of GraftKit writes. Delete the folder, so that it is made "
            "again, or name another."
        )
    return about


def read_documents(prefix: Path) -> np.ndarray:
    """Return bytes and fingerprint of each document of a shard, mapped into memory."""
    path = ending(prefix, ".npy")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if found.dtype != DOCUMENTS or found.ndim != 1:
        raise UserError(f"{path} does not hold what is known of the documents of a shard.")
    return found
