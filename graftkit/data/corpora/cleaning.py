"""Clean texts of what cannot be decoded and of control characters, and count it."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import asdict, dataclass

import xxhash

LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")
UNWANTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffd\ufffe\uffff\ud800-\udfff]")


@dataclass
class Counts:
    """What was met in reading: characters that cannot be decoded, control characters, and documents without text."""

    undecodable: int = 0
    control: int = 0
    empty: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def clean(text: str, counts: Counts) -> str:
    """Return a text without surrounding white space, and without characters that mean nothing to a model.

    These are replacement characters (U+FFFD, which decoders write for bytes that cannot be decoded), unpaired surrogates,
    control characters, and byte-order marks. Line ends of all kinds become a line feed.
    """
    text = LINE_ENDS.sub("\n", text)
    if UNWANTED.search(text):
        wrong = len(UNDECODABLE.findall(text))
        shorter = UNWANTED.sub("", text)
        counts.undecodable += wrong
        counts.control += len(text) - len(shorter) - wrong
        text = shorter
    return text.strip()


def fingerprint(text: str) -> int:
    """Return 64 bits that are equal for texts that differ in case, white space and Unicode's compatible forms alone.

    With n different documents two of them collide with a probability of about n^2 / 2^65: 0.03% for 10^8.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return xxhash.xxh3_64_intdigest(" ".join(text.casefold().split()).encode())
