"""Make one shard: read its documents, tokenize them, write its files."""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from graftkit.data.corpora import stored
from graftkit.data.corpora.cleaning import Counts, fingerprint
from graftkit.data.corpora.indexed import index_bytes, token_type
from graftkit.data.corpora.reading import Part, Reading
from graftkit.data.corpora.sentences import split_sentences
from graftkit.errors import UserError
from graftkit.files import replacing

BATCH = 1 << 19  # characters that are tokenized together
UNTOLD = 0.1  # share of characters that cannot be decoded from which on the encoding must be wrong


@dataclass(frozen=True)
class Encoder:
    """A tokenizer without special tokens, truncation or padding.

    `vocabulary`: one more than the largest token. `unknown`: the token of what is not in the vocabulary, or None. `portable`:
    the tokenizer as JSON, for other processes; None if it is written in Python.
    """

    call: Any
    vocabulary: int
    unknown: int | None
    portable: str | None

    @staticmethod
    def of(tokenizer: Any) -> Encoder:
        """Return the encoder of a tokenizer of transformers, or of a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        fast = (
            tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        )
        unknown = getattr(tokenizer, "unk_token_id", None)
        if isinstance(fast, Tokenizer):
            return Encoder.read(fast.to_str(), unknown)
        largest = max(tokenizer.get_vocab().values(), default=-1)

        def call(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
                "input_ids"
            ]

        return Encoder(call, max(len(tokenizer), largest + 1), unknown, None)

    @staticmethod
    def read(text: str, unknown: int | None = None) -> Encoder:
        """Return the encoder of a tokenizer in the JSON form of `tokenizers`."""
        from tokenizers import Tokenizer

        fast = Tokenizer.from_str(text)
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True  # "[MASK]" in a text is text
        if unknown is None and (name := getattr(fast.model, "unk_token", None)) is not None:
            unknown = fast.token_to_id(name)
        largest = max(fast.get_vocab(with_added_tokens=True).values(), default=-1)

        def call(texts: list[str]) -> list[list[int]]:
            return [one.ids for one in fast.encode_batch_fast(texts, add_special_tokens=False)]

        return Encoder(call, largest + 1, unknown, text)

    def digest(self) -> str:
        """Return a checksum of what decides on the tokens of a text."""
        import json

        if self.portable is None:
            texts = ["The quick brown fox, 1 2 3.", "天地玄黃，宇宙洪荒。", "Ünïcödé — 🙂"]
            return xxhash.xxh3_64_hexdigest(json.dumps([self.vocabulary, self.call(texts)]).encode())
        parts = json.loads(self.portable)
        rest = {
            key: value
            for key, value in parts.items()
            if key not in ("truncation", "padding", "post_processor")
        }
        return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())


@dataclass(frozen=True)
class Job:
    """A shard to make. `left_out`: a bit for each document, whether it is not wanted, in base64; empty for none."""

    prefix: str
    parts: tuple[Part, ...]
    reading: Reading
    sentences: bool
    left_out: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(values: dict[str, Any]) -> Job:
        parts = tuple(Part(**part) for part in values["parts"])
        reading = Reading(**values["reading"])
        return Job(values["prefix"], parts, reading, values["sentences"], values["left_out"])

    def without(self, unwanted: np.ndarray) -> Job:
        """Return the job without documents, given one bool for each, shape (documents,)."""
        return replace(self, left_out=base64.b64encode(np.packbits(unwanted).tobytes()).decode())

    @property
    def unwanted(self) -> np.ndarray:
        """Whether a document is not wanted, as bool, for at least as many documents as there are, or for none."""
        return np.unpackbits(np.frombuffer(base64.b64decode(self.left_out), np.uint8)).astype(bool)

    def texts(self, counts: Counts) -> Iterator[str]:
        """Yield the text of each document of the shard, those that are not wanted too."""
        for part in self.parts:
            yield from self.reading.read(part, counts)


def fingerprints(job: Job, to: Path) -> None:
    """Write the fingerprint of each document of a shard, as a file of uint64."""
    found = np.fromiter((fingerprint(text) for text in job.texts(Counts())), np.uint64)
    with replacing(to) as path, path.open("wb") as file:
        np.save(file, found, allow_pickle=False)


def write_shard(job: Job, encoder: Encoder) -> dict[str, Any]:
    """Make the files of a shard, each atomically, its description last. Return the description.

    Raises UserError for documents that cannot be read, and if a tenth of the characters cannot be decoded.
    """
    begun = time.perf_counter()
    prefix, counts = Path(job.prefix), Counts()
    made = _Made(encoder, job)
    with suppress(FileNotFoundError):
        stored.ending(prefix, ".json").unlink()  # of files that are not whole
    with replacing(stored.ending(prefix, ".bin")) as path, path.open("wb") as file:
        for tokens in made.batches(job.texts(counts)):
            file.write(tokens.tobytes())
    if counts.undecodable > UNTOLD * (made.characters + counts.undecodable):
        raise UserError(
            f"{job.parts[0].path}: {counts.undecodable:,} of {made.characters + counts.undecodable:,} characters cannot be "
            f"decoded as {job.reading.encoding}. Name the encoding of the file."
        )
    lengths = np.array(made.lengths, np.int64)
    with replacing(stored.ending(prefix, ".idx")) as path:
        path.write_bytes(index_bytes(lengths, np.array(made.documents, np.int64), made.kind))
    with replacing(stored.ending(prefix, ".npy")) as path, path.open("wb") as file:
        known = np.zeros(len(made.bytes), stored.DOCUMENTS)
        known["bytes"], known["fingerprint"] = made.bytes, made.fingerprints
        np.save(file, known, allow_pickle=False)
    about: dict[str, Any] = {
        "documents": len(known), "sequences": len(lengths), "tokens": int(lengths.sum()),
        "bytes": int(known["bytes"].sum()), "characters": made.characters, "unknown": made.unknown,
        "left_out": int(job.unwanted.sum()), **counts.as_dict(), "seconds": round(time.perf_counter() - begun, 3),
    }  # fmt: skip
    about["empty"] += made.empty
    return stored.describe(prefix, about)


class _Made:
    """What is known of the documents of a shard while they are tokenized."""

    def __init__(self, encoder: Encoder, job: Job) -> None:
        self.encoder, self.job = encoder, job
        self.kind = token_type(encoder.vocabulary)
        self.lengths, self.documents = array("q"), array("q", [0])
        self.bytes, self.fingerprints = array("q"), array("Q")
        self.characters = self.unknown = self.empty = 0

    def batches(self, texts: Iterator[str]) -> Iterator[np.ndarray]:
        """Tokenize documents, some at a time, and yield their tokens in order."""
        waiting: list[str] = []
        size = 0
        unwanted = self.job.unwanted
        for place, text in enumerate(texts):
            if len(unwanted) and unwanted[place]:
                continue
            waiting.append(text)
            size += len(text)
            if size >= BATCH:
                yield self._tokenize(waiting)
                waiting, size = [], 0
        if waiting:
            yield self._tokenize(waiting)

    def _tokenize(self, texts: Sequence[str]) -> np.ndarray:
        parts = [split_sentences(text) if self.job.sentences else [text] for text in texts]
        coming = iter(self.encoder.call([sentence for sentences in parts for sentence in sentences]))
        kept: list[list[int]] = []
        for text, sentences in zip(texts, parts):
            found = [tokens for tokens in (next(coming) for _ in sentences) if tokens]
            if not found:  # characters that the tokenizer knows nothing of
                self.empty += 1
                continue
            kept += found
            self.lengths.extend(map(len, found))
            self.documents.append(len(self.lengths))
            self.bytes.append(len(text.encode()))
            self.fingerprints.append(fingerprint(text))
            self.characters += len(text)
        tokens = np.fromiter((token for one in kept for token in one), self.kind)
        if self.encoder.unknown is not None:
            self.unknown += int(np.count_nonzero(tokens == self.encoder.unknown))
        return tokens
