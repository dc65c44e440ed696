"""GSM8K as instruction data: a tiny Llama, random at the start, learns to answer; rows alone and packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TITLE = "GSM8K, problems of arithmetic in words, as instructions"
BACKBONE = (
    "a Llama of 4 blocks of width 128, random, with a tokenizer of 4,000 pieces made of the training rows"
)
METRIC = "perplexity"
SHOWN = ("perplexity_start", "mask_right", "packing_difference")
BAR = (
    "the loss falls (`perplexity_start` is that of the random model, also on the test rows), the target tokens are the "
    "answer (`mask_right` 1), packed rows have the losses of separate ones (`packing_difference`, relative to the largest loss)"
)
ROWS = ("full", "full packed")
TRAIN_ROWS, TEST_ROWS = 1500, 300  # the first of each file
CHECKED = 100


def measure(row: str, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    import graftkit

    train, lines = first(data / "train.jsonl", folder / "train.jsonl", TRAIN_ROWS)
    test, _ = first(data / "test.jsonl", folder / "test.jsonl", TEST_ROWS)
    model = make_model(folder / "llama", [json.loads(line) for line in lines], seed)
    packed = row == "full packed"
    recipe = {
        "model": str(model),
        "task": "generate(packing=True)" if packed else "generate()",
        "method": "full(lr=0.003)",
        "data": {"train": str(train), "eval": None, "test": str(test), "max_length": 384},
        # about as many tokens in a step: two packed rows hold some six
        "train": {"epochs": 2.0, "batch_size": 4 if packed else 12, "schedule": "cosine"},
        "seed": seed,
        "out": str(folder / "run"),
    }
    start = losses(model, None, test)
    run = graftkit.tune(recipe)
    kept = {key: run.result[key] for key in ("trained_parameters", "seconds", "steps", "precision", "method")}
    more = {"perplexity_start": start["perplexity"], **checks(model, run.path, test)}
    return {**kept, "metrics": {**run.metrics, **more}}


def first(source: Path, target: Path, count: int) -> tuple[Path, list[str]]:
    lines = source.read_text(encoding="utf-8").splitlines()[:count]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target, lines


def make_model(folder: Path, rows: list[dict[str, str]], seed: int) -> Path:
    """A Llama folder with weights that nothing has trained."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([text for row in rows for text in (row["question"], row["answer"])], trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def losses(model: Path, graft: Path | None, test: Path) -> dict[str, Any]:
    """Metrics on the test rows of the model as it is."""
    _, task, dataset, forward = loaded(model, graft, test, "generate()")
    from graftkit.engine.predict import predict

    return task.metrics(predict(dataset, forward, task, 24), dataset, ())


def checks(model: Path, run: Path, test: Path) -> dict[str, float]:
    """Whether exactly the answers are learned, and how far losses of packed rows are from those of separate ones."""
    import numpy as np
    import torch

    tokenizer, _, alone, forward = loaded(model, run / "graft", test, "generate()", CHECKED)
    answers = [str(text) for text in alone.examples.targets]
    found = [tokenizer.decode(ids[mask]) for ids, mask in zip(alone.ids, alone.learned)]
    right = float(np.mean([text == f"{answer}</s>" for text, answer in zip(found, answers)]))
    packed = loaded(model, run / "graft", test, "generate(packing=True)", CHECKED)[2]
    scores: dict[bool, dict[int, float]] = {}
    with torch.no_grad():
        for dataset in (alone, packed):
            values = scores[dataset.packed] = {}
            for row, group in enumerate(dataset.groups):
                labels = forward(dataset.batch(np.array([row])))[:, 0]
                sizes = [int(alone.units[i]) for i in group]
                values |= {i: -float(part.sum()) for i, part in zip(group, labels.split(sizes))}
    largest = max(scores[False].values())
    difference = max(abs(scores[True][i] - loss) for i, loss in scores[False].items()) / largest
    return {"mask_right": right, "packing_difference": difference}


def loaded(model: Path, graft: Path | None, test: Path, expression: str, count: int | None = None) -> tuple:
    """Tokenizer, task, the test rows and a forward function, in fp32, of the model or of the graft on it."""
    import torch

    import graftkit
    from graftkit.backbone.load import load_backbone
    from graftkit.backbone.source import auto_class, find_source
    from graftkit.data.columns import find_columns
    from graftkit.data.read import read_table
    from graftkit.engine.forward import Forward
    from graftkit.runs.prepare import make_task

    task = make_task(expression)
    source = find_source(str(model))
    backbone = load_backbone(source, auto_class(source, task.families), complete=True)
    attached = graftkit.attach(backbone, "full()") if graft is None else graftkit.load(backbone, graft)
    table = read_table(str(test))
    table = table if count is None else table.take(range(count))
    columns = task.used(find_columns(table, task.columns, {}), {}, table)
    examples = task.examples(table, columns, (), False)
    dataset = task.dataset(examples, backbone, 384, training=True)
    attached.model.eval()
    return backbone.processor, task, dataset, Forward(attached, torch.device("cpu"), "fp32")
