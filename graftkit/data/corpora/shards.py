"""Several pairs of `.bin` and `.idx` files, memory-mapped and seen as one sequence of sequences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from graftkit.data.corpora import stored
from graftkit.data.corpora.indexed import Pair, open_pair
from graftkit.errors import UserError, listing
from graftkit.files import special

# of a description, that are added up over the shards
SUMS = (
    "documents", "sequences", "tokens", "bytes", "characters", "unknown", "undecodable", "control", "empty", "left_out",
)  # fmt: skip


class Shards:
    """The tokens of a corpus, in memory-mapped files; only index arrays are in memory.

    Attributes:
        lengths: tokens of each sequence, shape (sequences,).
        documents: the first sequence of each document, and the number of sequences, shape (documents + 1,); Megatron's
            `doc_idx`.
        document_bytes: UTF-8 bytes of each document's text, shape (documents,). None for pairs that others wrote.
        statistics: documents, sequences (with `sentences`, also by that name), tokens; unless others wrote the pairs, also
            bytes, characters, unknown (tokens), undecodable and control (characters that were left out), empty (documents
            without text), duplicates (documents that an earlier one equals), left_out (of these), files, shards, split
            (what a document is in text files), seconds.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        document_bytes: np.ndarray | None,
        statistics: dict[str, Any],
        checksums: Sequence[str],
    ) -> None:
        self._pairs = tuple(pairs)
        self._checksums = tuple(checksums)
        self._starts = np.cumsum([0, *(len(pair.lengths) for pair in pairs)])
        self.lengths: np.ndarray = np.concatenate([pair.lengths for pair in pairs])
        parts = [pair.documents[:-1] + start for pair, start in zip(pairs, self._starts)]
        self.documents: np.ndarray = np.concatenate([*parts, self._starts[-1:]]).astype(np.int64)
        self.document_bytes = document_bytes
        self.statistics = statistics

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, sequence: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Return a copy of the tokens of a sequence, from `start` to `end` as in a slice, as int64."""
        length = int(self.lengths[sequence])
        start, end, _ = slice(start, end).indices(length)
        sequence = int(sequence) % len(self.lengths)
        shard = int(np.searchsorted(self._starts, sequence, side="right")) - 1
        return self._pairs[shard].tokens(sequence - int(self._starts[shard]), start, end)

    def document(self, document: int) -> np.ndarray:
        """Return a copy of all tokens of a document, as int64."""
        document = range(len(self.documents) - 1)[document]
        first, last = int(self.documents[document]), int(self.documents[document + 1])
        return np.concatenate(
            [self.tokens(sequence) for sequence in range(first, last)] or [np.zeros(0, np.int64)]
        )

    def digest(self) -> str:
        """Return a checksum of the shards' checksums, which tells whether two corpora hold the same tokens in the same
        sequences and documents.
        """
        return xxhash.xxh3_64_hexdigest(json.dumps(self._checksums).encode())

    @cached_property
    def largest(self) -> int:
        """The largest token; all files are read for it. Raises UserError if there is a negative one."""
        return max(_largest(pair) for pair in self._pairs)

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raise UserError if a token is not below `vocabulary`. All files are read, piece by piece."""
        if self.largest >= vocabulary:
            worst = next(pair for pair in self._pairs if _largest(pair) >= vocabulary)
            raise UserError(
                f"{worst.prefix}.bin holds the token {_largest(worst):,}, but the vocabulary has {vocabulary:,}. It was made "
                "with another tokenizer: name that one, or tokenize the corpus again."
            )


def _largest(pair: Pair) -> int:
    low, high = pair.range()
    if low < 0:
        raise UserError(
            f"{pair.prefix}.bin holds the token {low:,}; tokens are not negative. Make the pair again."
        )
    return high


def open_shards(path: str | Path, *, vocabulary: int | None = None) -> Shards:
    """Open pairs of `.bin` and `.idx` files: a folder that `tokenized` wrote, a folder of pairs, or one pair by its prefix.

    Sizes and index are always compared, and in a folder that `tokenized` wrote checksums: of all bytes up to 1 GB of tokens,
    of a sample beyond.

    `vocabulary`: raise UserError if a token is not below this number, for which all tokens are read. Raises UserError for
    files that are missing, torn, truncated or damaged, and if there are no tokens at all.
    """
    path = Path(path).expanduser()
    if (path / stored.CORPUS).exists():
        shards = _own(path)
    else:
        shards = _foreign(path)
    if not len(shards) or not shards.statistics["tokens"]:
        raise UserError(f"{path} holds no tokens. Name another corpus.")
    if vocabulary is not None:
        shards.check_vocabulary(vocabulary)
    return shards


def _own(folder: Path) -> Shards:
    about = stored.read_corpus(folder)
    prefixes = [stored.prefix_of(folder, number) for number in range(about["shards"])]
    whole = is_read_whole(prefixes)
    try:
        return assembled(folder, about, [stored.read_description(prefix, whole) for prefix in prefixes])
    except UserError as error:
        raise UserError(
            f"{error} Tokenize the corpus again into the same folder; what is whole is kept."
        ) from None


def is_read_whole(prefixes: Sequence[Path]) -> bool:
    """Return whether the shards are small enough to compare all bytes when they are opened."""
    paths = [stored.ending(prefix, ".bin") for prefix in prefixes]
    return sum(path.stat().st_size for path in paths if path.exists()) <= stored.FULL


def assembled(folder: Path, about: dict[str, Any], descriptions: Sequence[dict[str, Any]]) -> Shards:
    """Return the shards of a folder that `tokenized` wrote and whose descriptions were read."""
    prefixes = [stored.prefix_of(folder, number) for number in range(len(descriptions))]
    known = [stored.read_documents(prefix) for prefix in prefixes]
    statistics: dict[str, Any] = {name: sum(one[name] for one in descriptions) for name in SUMS}
    if about["sentences"]:
        statistics["sentences"] = statistics["sequences"]
    statistics["duplicates"] = statistics["left_out"] or repeated([part["fingerprint"] for part in known])
    statistics |= {"files": len(about["files"]), "shards": about["shards"], "split": about["split"]}
    statistics["seconds"] = round(sum(one["seconds"] for one in descriptions), 3)
    sizes = np.concatenate([part["bytes"] for part in known])
    checksums = [one["files"][suffix]["checksum"] for one in descriptions for suffix in (".bin", ".idx")]
    return Shards([open_pair(prefix) for prefix in prefixes], sizes, statistics, checksums)


def repeated(fingerprints: Sequence[np.ndarray]) -> int:
    """Return how many documents equal an earlier one, with 9 bytes of memory for each document."""
    whole = np.concatenate(fingerprints)
    whole.sort()
    return int(np.count_nonzero(whole[1:] == whole[:-1]))


def _foreign(path: Path) -> Shards:
    """Open pairs that others wrote."""
    if path.is_dir():
        indices = sorted(path.glob("*.idx"))
        if not indices:
            raise UserError(
                f"{path} holds no pair of .bin and .idx files. Name the folder or the prefix of a tokenized corpus."
            )
        prefixes = [str(index.with_suffix("")) for index in indices]
        lost = [f"{prefix}.bin" for prefix in prefixes if not Path(f"{prefix}.bin").exists()]
        lone = sorted({str(found.with_suffix("")) for found in path.glob("*.bin")} - set(prefixes))
        if lost or lone:
            raise UserError(
                f"{path} lacks {listing([*lost, *(f'{one}.idx' for one in lone)], 4)}. Restore it from a copy."
            )
    else:
        given = str(path)
        prefixes = [given.removesuffix(".idx").removesuffix(".bin")]
        if not any(
            Path(f"{prefixes[0]}{suffix}").exists() or special(Path(given)) for suffix in (".idx", ".bin")
        ):
            raise UserError(
                f"{path} does not exist, and neither do {prefixes[0]}.bin and .idx. Check the path."
            )
    pairs = [open_pair(prefix) for prefix in prefixes]
    statistics: dict[str, Any] = {
        "documents": sum(len(pair.documents) - 1 for pair in pairs),
        "sequences": sum(len(pair.lengths) for pair in pairs),
        "tokens": sum(int(pair.lengths.sum(dtype=np.int64)) for pair in pairs),
        "shards": len(pairs),
    }
    checksums = [stored.sample(Path(prefix + suffix)) for prefix in prefixes for suffix in (".bin", ".idx")]
    return Shards(pairs, None, statistics, checksums)
