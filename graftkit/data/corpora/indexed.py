"""One pair of `.bin` and `.idx` files, as Megatron-LM and its kin write them (megatron/core/datasets/indexed_dataset.py).

The `.bin` file holds the tokens of all sequences, one after another. The `.idx` file holds, little-endian:

    9 bytes      MMIDIDX and two zero bytes
    uint64       version, 1
    uint8        code of the tokens' type: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    uint64       sequences S
    uint64       entries D of the index of documents, one more than there are documents
    int32[S]     tokens of each sequence
    int64[S]     place of each sequence in the .bin file, in bytes
    int64[D]     first sequence of each document, and at its end S
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graftkit.errors import UserError
from graftkit.files import irregular

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = (6, 7)
SMALL = 65_500  # vocabularies below this number have tokens of two bytes, as in Megatron
SCANNED = 1 << 22  # tokens that are looked at together
AGAIN = "make the pair again, or restore it from a copy"


def token_type(vocabulary: int) -> np.dtype:
    """Return the type of the tokens of a vocabulary: uint16 if it is small, else int32."""
    return np.dtype("<u2" if vocabulary < SMALL else "<i4")


def index_bytes(lengths: np.ndarray, documents: np.ndarray, kind: np.dtype) -> bytes:
    """Return the content of an `.idx` file for sequences that follow one another in the `.bin` file."""
    code = next(code for code, name in TYPES.items() if np.dtype(name) == kind)
    places = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1], out=places[1:], dtype="<i8")
    places *= kind.itemsize
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(documents))
    return b"".join(
        [header, lengths.astype("<i4").tobytes(), places.tobytes(), documents.astype("<i8").tobytes()]
    )


@dataclass(frozen=True)
class Pair:
    """An opened pair. `lengths`, `places` and `documents` are mapped from the index, `kind` is the type of the tokens."""

    prefix: str
    kind: np.dtype
    lengths: np.ndarray  # (sequences,) int32
    places: np.ndarray  # (sequences,) int64, bytes
    documents: np.ndarray  # (documents + 1,) int64
    content: np.ndarray  # the .bin file, uint8

    def tokens(self, sequence: int, start: int, end: int) -> np.ndarray:
        """Return tokens `start` to `end` of a sequence, as int64."""
        first = int(self.places[sequence]) + start * self.kind.itemsize
        last = first + max(0, end - start) * self.kind.itemsize
        return self.content[first:last].view(self.kind).astype(np.int64)

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield all that the `.bin` file holds, in order, in pieces that fit into memory."""
        whole = len(self.content) // self.kind.itemsize * self.kind.itemsize
        for start in range(0, whole, SCANNED * self.kind.itemsize):
            yield self.content[start : min(start + SCANNED * self.kind.itemsize, whole)].view(self.kind)

    def range(self) -> tuple[int, int]:
        """Return the smallest and the largest token; (0, -1) if there is none."""
        found = [(int(piece.min()), int(piece.max())) for piece in self.pieces()]
        return min((low for low, _ in found), default=0), max((high for _, high in found), default=-1)


def open_pair(prefix: str | Path) -> Pair:
    """Open `prefix`.bin and `prefix`.idx, memory-mapped, and check that they fit together.

    Raises UserError if one is missing or no regular file, if the index is no index, has another version, holds numbers that
    are no integers, or has another size than it says, or if sequences lie outside of the `.bin` file.
    """
    index, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, binary):
        if (wrong := irregular(path)) is not None:
            raise UserError(f"{path} {wrong}.")
        if not path.exists():
            raise UserError(f"{path} is missing; a pair of .bin and .idx files is needed.")
    raw = _mapped(index)
    kind, sequences, entries = _header(index, raw)
    stop = HEADER.size + sequences * 12 + entries * 8
    if (
        not stop <= len(raw) <= stop + sequences
    ):  # with a byte for the mode of each sequence in multimodal ones
        raise UserError(f"{index} has {len(raw):,} bytes, but its header announces {stop:,}; {AGAIN}.")
    first, second = HEADER.size + sequences * 4, HEADER.size + sequences * 12
    lengths = raw[HEADER.size : first].view("<i4")
    places, documents = raw[first:second].view("<i8"), raw[second:stop].view("<i8")
    content = _mapped(binary)
    if sequences:
        ends = places + lengths.astype(np.int64) * kind.itemsize
        if (
            lengths.min() < 0
            or places.min() < 0
            or int(ends.max()) > len(content)
            or (places % kind.itemsize).any()
        ):
            raise UserError(
                f"{binary} has {len(content):,} bytes, but {index.name} places sequences up to byte {int(ends.max()):,}; "
                f"{AGAIN}."
            )
    if entries < 1 or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise UserError(f"{index} divides its {sequences:,} sequences into impossible documents; {AGAIN}.")
    return Pair(str(prefix), kind, lengths, places, documents, content)


def _mapped(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


def _header(index: Path, raw: np.ndarray) -> tuple[np.dtype, int, int]:
    """Return the tokens' type, the number of sequences, and of entries of the index of documents."""
    head = raw[: HEADER.size].tobytes()
    if not head.startswith(MAGIC) or len(head) < HEADER.size:
        raise UserError(
            f"{index} is not the index of a token file (it does not begin with MMIDIDX); {AGAIN}."
        )
    _, version, code, sequences, entries = HEADER.unpack(head)
    if version != 1:
        raise UserError(
            f"{index} has version {version}, and only version 1 can be read; write the pair again in that form."
        )
    if code not in TYPES:
        kind = "numbers with a fraction, not tokens" if code in FLOATS else f"an unknown type ({code})"
        raise UserError(f"{index} says that its .bin file holds {kind}; name a pair of token files.")
    return np.dtype(TYPES[code]), sequences, entries
