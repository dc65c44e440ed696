"""Which files a corpus consists of, and its documents as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Corpus:
    """The checked files of a corpus. Nothing is read beyond the beginnings of the files until `documents` is asked for."""

    name: str

    def documents(self) -> Iterator[str]:
        """Yield the cleaned text of each document, in the order of the files, in constant memory."""
        raise NotImplementedError


def open_corpus(
    paths: Any,
    *,
    column: str | None = None,
    documents: str = "auto",
    encoding: str = "utf-8",
    name: str = "train",
) -> Corpus:
    """Return the corpus of text files, JSON lines, Parquet files, or folders of these.

    Args:
        paths: a file, a folder (searched recursively, in sorted order), or a list of these.
        column: the column with the text in JSON lines and Parquet; default `text`.
        documents: how text files are split: 'paragraphs' (separated by blank lines), 'lines', 'file' (each file is one
            document), or 'auto'.
        encoding: of text files and JSON lines. Bytes that cannot be decoded are left out and counted.
        name: what messages call the corpus.

    Raises UserError for files that are missing, empty, binary or in an unknown format.
    """
    raise NotImplementedError
