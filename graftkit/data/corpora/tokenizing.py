"""Tokenize a corpus once, in parallel, into shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graftkit import claims
from graftkit.data.corpora import crew, stored
from graftkit.data.corpora.corpus import Corpus
from graftkit.data.corpora.shards import Shards, assembled, is_read_whole
from graftkit.data.corpora.writing import Encoder, Job
from graftkit.errors import UserError, listing
from graftkit.files import write_json

MOST_PROCESSES = 8
SMALL = 1 << 22  # bytes of a corpus for which starting processes would take longer than it saves
WORDS = {
    "tokenizer": "another tokenizer",
    "files": "other files, or files that have changed since",
    "column": "another column",
    "split": "documents that are divided otherwise",
    "encoding": "another encoding",
    "sentences": "another value of sentences",
    "keep_duplicates": "another value of keep_duplicates",
}


def tokenized(
    corpus: Corpus,
    tokenizer: Any,
    folder: str | Path,
    *,
    sentences: bool = False,
    keep_duplicates: bool = True,
    processes: int | None = None,
    show: Callable[[int, int], None] | None = None,
) -> Shards:
    """Tokenize a corpus into the shards of a folder, and return them. What a killed call has finished is kept.

    Args:
        tokenizer: of transformers, or a `tokenizers.Tokenizer`. No special tokens are added, and those that a text spells out
            are tokenized as text.
        folder: a new one, or one that an earlier call with the same corpus, tokenizer and options wrote: of that, shards
            that are missing, torn or damaged are made again.
        sentences: a document becomes one sequence per sentence, else one sequence.
        keep_duplicates: if False, leave out documents that an earlier one equals after normalization (NFKC, case, white
            space), for which the corpus is read twice.
        processes: default: as many as there are cores, at most 8; one for a small corpus, and for a tokenizer that is
            written in Python. The result does not depend on it.
        show: called with the bytes of the corpus that are done, about, and those of all whenever a shard is finished.

    Raises UserError for an empty corpus, for documents of more than 10 MB, and if the folder holds anything else.
    """
    folder = Path(folder).expanduser()
    if processes is not None and processes < 1:
        raise UserError(f"processes={processes} is less than 1. Name at least one process.")
    encoder = Encoder.of(tokenizer)
    options = {"sentences": sentences, "keep_duplicates": keep_duplicates}
    shards = corpus.shards()
    about = {
        "format": stored.FORMAT,
        "shards": len(shards),
        "vocabulary": encoder.vocabulary,
        "tokenizer": encoder.digest(),
    }
    about |= options | corpus.identity()
    _refuse_other(folder, about)
    jobs = [
        Job(str(stored.prefix_of(folder, n)), tuple(parts), corpus.reading, sentences)
        for n, parts in enumerate(shards)
    ]
    if _is_tidy(folder) and len(known := _whole(folder, len(jobs))) == len(jobs):  # it need not be writable
        return assembled(folder, about, [known[number] for number in range(len(jobs))])
    with claims.held(folder, str(folder)):
        _refuse_other(folder, about)  # another process may have begun there in between
        claims.remove_leftovers(folder)
        if not (folder / stored.CORPUS).exists():
            write_json(folder / stored.CORPUS, about)
        descriptions = _complete(jobs, folder, encoder, corpus, keep_duplicates, processes, show)
        found = assembled(folder, about, descriptions)
        if not found.statistics["tokens"]:
            names = listing((file.path for file in corpus.files), 4)
            _remove(folder, len(jobs))
            raise UserError(
                f"{corpus.name}: the corpus is empty: {names} has no document with text. Name others."
            )
    return found


def _complete(
    jobs: Sequence[Job], folder: Path, encoder: Encoder, corpus: Corpus, keep_duplicates: bool, processes: int | None,
    show: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Make the shards that are not there or not whole; return the descriptions of all."""
    found = _whole(folder, len(jobs))
    missing = [number for number in range(len(jobs)) if number not in found]
    if missing:
        at_once = _processes(processes, corpus)
        if not keep_duplicates:
            jobs = _without_duplicates(jobs, encoder, folder, at_once)
        for place, description in crew.done([jobs[number] for number in missing], encoder, at_once):
            found[missing[place]] = description
            if show is not None:
                show(round(corpus.size * len(found) / len(jobs)), corpus.size)
    return [found[number] for number in range(len(jobs))]


def _refuse_other(folder: Path, about: dict[str, Any]) -> None:
    """Raise `UserError` if a folder holds anything but shards of the same corpus."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the tokenized corpus.")
    names = [
        path.name for path in folder.iterdir() if path.name != claims.LOCK and not claims.is_leftover(path)
    ]
    if stored.CORPUS not in names:
        if names:
            raise UserError(
                f"{folder} holds files that are not a tokenized corpus ({listing(sorted(names), 4)}). Name another folder."
            )
        return
    before = stored.read_corpus(folder)
    other = [word for key, word in WORDS.items() if before.get(key) != about[key]]
    if other or before != about:
        raise UserError(
            f"{folder} holds a corpus that was tokenized with {' and '.join(other) or 'another version'}. Delete it, or name "
            "another folder."
        )


def _is_tidy(folder: Path) -> bool:
    """Return whether shards are there and nothing of a process at work, or of one that was killed."""
    if not (folder / stored.CORPUS).exists():
        return False
    return not any(path.name == claims.LOCK or claims.is_leftover(path) for path in folder.iterdir())


def _whole(folder: Path, shards: int) -> dict[int, dict[str, Any]]:
    """Return the descriptions of the shards that are there and whole, by number."""
    prefixes = [stored.prefix_of(folder, number) for number in range(shards)]
    thorough = is_read_whole(prefixes)
    found = {}
    for number, prefix in enumerate(prefixes):
        try:
            found[number] = stored.read_description(prefix, thorough)
        except UserError:
            continue
    return found


def _processes(asked: int | None, corpus: Corpus) -> int:
    if asked is not None:
        return asked
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if corpus.size < SMALL else min(available, MOST_PROCESSES)


def _without_duplicates(jobs: Sequence[Job], encoder: Encoder, folder: Path, processes: int) -> list[Job]:
    """Return the jobs without documents that an earlier one equals. Memory: at most 16 bytes for each document."""
    work = claims.temporary(folder / "fingerprints")
    work.mkdir()
    try:
        paths = [work / f"{number}.npy" for number in range(len(jobs))]
        for _ in crew.done(jobs, encoder, processes, paths):
            pass
        found = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        later = is_repeated(np.concatenate(found))
    finally:
        claims.remove(work)
    ends = np.cumsum([len(one) for one in found])
    return [job.without(later[end - len(one) : end]) for job, one, end in zip(jobs, found, ends)]


def is_repeated(fingerprints: np.ndarray) -> np.ndarray:
    """Return for each fingerprint whether an earlier one equals it, shape (documents,).

    They are compared in 16 parts, by their lowest bits, so that the memory is little more than that of the fingerprints.
    """
    later = np.zeros(len(fingerprints), bool)
    part_of = fingerprints.astype(np.uint8) & 15
    for part in range(16):
        places = np.flatnonzero(part_of == part)
        some = fingerprints[places]
        order = np.argsort(some, kind="stable")
        equal = some[order[1:]] == some[order[:-1]]
        later[places[order[1:][equal]]] = True
    return later


def _remove(folder: Path, shards: int) -> None:
    """Delete the files of an empty corpus."""
    for number in range(shards):
        for suffix in (".json", *stored.ENDINGS):
            claims.remove(stored.ending(stored.prefix_of(folder, number), suffix))
    claims.remove(folder / stored.CORPUS)
