"""The slope of corpora: 10, 100 and 1,000 MB of text, tokenized, opened, shuffled, and resumed at a late step.

The corpora are made from ../shared/data/text: paragraphs drawn at random, the order of the words within their lines shuffled
for all but the first copy, so that documents are as long as real ones and hardly any is repeated. The tokenizer is a WordPiece
of 12,000 tokens, trained on the texts themselves. Each figure is of a process of its own; memory is the peak of that process
and of the largest of those that it started.

Measured on two cores with nothing else running, 2026-11: 10 MB in 4.6 s and 100 MB in 47 s with two processes, at most 133 and 157 MB
of memory; opened in 0.01 and 0.06 s (with checksums of all bytes), shuffled in 0.014 and 0.017 s, the batch of a late step in 0.4 and
0.5 ms, at most 44 and 66 MB. 1,000 MB was not measured. Usage: python bench/corpus.py [MB ...], default 10 100 1000.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"
PROCESSES = 2
BATCH = 32


def make_corpus(path: Path, size: int, seed: int = 0) -> None:
    """Write about `size` bytes of paragraphs."""
    texts = [
        text
        for file in sorted(SHARED.glob("*.txt"))
        for text in file.read_text(encoding="utf-8").split("\n\n")
    ]
    draw, written, first = random.Random(seed), 0, True
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for text in draw.sample(texts, len(texts)):
                lines = text.split("\n") if first else [_shuffled(line, draw) for line in text.split("\n")]
                written += len(("\n".join(lines) + "\n\n").encode())
                file.write("\n".join(lines) + "\n\n")
                if written >= size:
                    return
            first = False


def _shuffled(line: str, draw: random.Random) -> str:
    """Shuffle words, or the characters of a line that has no spaces."""
    parts = line.split(" ") if " " in line else list(line)
    return (" " if " " in line else "").join(draw.sample(parts, len(parts)))


def tokenizing(corpus: str, tokenizer: str, folder: str) -> dict:
    from tokenizers import Tokenizer

    from graftkit.data.corpora import open_corpus, tokenized

    begun = time.perf_counter()
    found = tokenized(open_corpus(corpus), Tokenizer.from_file(tokenizer), folder, processes=PROCESSES)
    return {"seconds": time.perf_counter() - begun, **found.statistics}


def opening(corpus: str, tokenizer: str, folder: str) -> dict:
    """Open the shards, make the order of an epoch, and read the batch of a late step."""
    import numpy as np

    from graftkit.data.corpora import open_shards

    begun = time.perf_counter()
    shards = open_shards(folder)
    opened = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(shards))
    shuffled = time.perf_counter()
    late = order[int(len(order) * 0.9) :][:BATCH]
    batch = [shards.tokens(int(sequence)) for sequence in late]
    done = time.perf_counter()
    return {
        "open": opened - begun, "shuffle": shuffled - opened, "late_batch": done - shuffled, "tokens": sum(map(len, batch)),
    }  # fmt: skip


def peak() -> float:
    """Return the peak memory of this process and of the largest that it started, in MB.

    Of this process by VmHWM: its ru_maxrss begins with that of the process that started it.
    """
    own = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return (own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e3


def in_process(name: str, *given: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, name, *given], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def train(path: Path) -> None:
    from graftkit.data.vocabularies import SPECIAL, batches, learn_vocabulary

    texts = [
        text
        for file in sorted(SHARED.glob("*.txt"))
        for text in file.read_text(encoding="utf-8").split("\n\n")
    ]
    learn_vocabulary("wordpiece", lambda: batches(iter(texts)), 12_000, SPECIAL["bert"]).save(str(path))


def main(sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder, "tokenizer.json")
        train(tokenizer)
        print("MB      documents  tokenize s  MB/s  peak MB  open s  shuffle s  late batch ms  peak MB")
        for size in sizes:
            corpus, shards = Path(folder, f"{size}.txt"), Path(folder, f"shards-{size}")
            make_corpus(corpus, size * 1_000_000)
            made = in_process("tokenizing", str(corpus), str(tokenizer), str(shards))
            read = in_process("opening", str(corpus), str(tokenizer), str(shards))
            print(
                f"{size:<6} {made['documents']:>10,} {made['seconds']:>11.1f} {size / made['seconds']:>5.2f} "
                f"{made['peak']:>8.0f} {read['open']:>7.2f} {read['shuffle']:>10.3f} {read['late_batch'] * 1e3:>14.2f} "
                f"{read['peak']:>8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("tokenizing", "opening"):
        values = {"tokenizing": tokenizing, "opening": opening}[sys.argv[1]](*sys.argv[2:])
        print(json.dumps({**values, "peak": peak()}))
    else:
        main([int(word) for word in sys.argv[1:]] or [10, 100, 1000])
