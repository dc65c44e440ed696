"""What the sides share: the peak memory of the process, and real sentences."""

from __future__ import annotations

import csv
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, long_queries

DEMO = ROOT / "graftkit" / "demo"


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory.

    By VmHWM, where there is one: ru_maxrss begins with that of the process that started this one.
    """
    try:
        return (
            int(Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0])
            * 1024
        )
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(work: Callable[..., None], *given: Any) -> None:
    """Call `work` in a process of its own, so that its memory does not count here. Before torch is imported."""
    child = os.fork()
    if not child:
        try:
            work(*given)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{work.__name__} failed")


def intents(train: int | None, test: int | None, labels: int = 77) -> tuple[list[dict], list[dict]]:
    """Return rows of banking77, the first of its training and test rows in a random order, with the label as a number."""
    tables = []
    for name in ("train.csv", "test.csv"):
        with (DEMO / name).open(encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    numbers = {name: number for number, name in enumerate(sorted({row["category"] for row in tables[0]}))}
    found = []
    for table, count in zip(tables, (train, test)):
        random.Random(0).shuffle(table)
        numbered = [{"text": row["text"], "label": numbers[row["category"]]} for row in table]
        found.append([row for row in numbered if row["label"] < labels][:count])
    return found[0], found[1]


def queries(train: int, test: int) -> tuple[list[dict], list[dict]]:
    """Return the longest queries of banking77, about a card or not: as long as the sentences of SST-2."""
    table = long_queries(train + test)
    random.Random(0).shuffle(table)
    return table[:train], table[train:]


DATA = {"intents": intents, "queries": queries}


def word_tokenizer(folder: Path | str, size: int) -> None:
    """Write a tokenizer of `size` tokens: <end> is 0, <pad> is 1, and w2, w3 and so on are words between spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<end>": 0, "<pad>": 1, **{f"w{number}": number for number in range(2, size)}}
    words = Tokenizer(models.WordLevel(known, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    made.save_pretrained(folder)
