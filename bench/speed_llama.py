"""LoRA on a Llama with a large vocabulary: GraftKit beside Hugging Face Trainer + PEFT in bf16, in turn.

Both sides train the same random model (150 M parameters, a vocabulary of 128,256, tied embeddings) on the same rows of 512
tokens, half of them a prompt that is not in the loss: LoRA of rank 16 on all linear layers, batch 4, bf16. The peer's frozen
weights are bf16, too. Seconds are those of the training alone; the CPU time of the process is given beside them, as it
depends less on what else the machine does. Peak memory is that of the process.

Usage: python bench/speed_llama.py [rounds] [--quick] [--profile]
--quick: a small model; --profile: where GraftKit's CPU time goes, by operation, instead of a comparison.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import child, child_arguments, gflops, machine

RATE, RANK, BATCH = 1e-3, 16, 4
WHOLE = {
    "vocabulary": 128_256,
    "width": 768,
    "layers": 8,
    "inner": 2048,
    "heads": 12,
    "kv": 4,
    "length": 512,
    "rows": 48,
}
QUICK = {
    "vocabulary": 16_384,
    "width": 128,
    "layers": 2,
    "inner": 256,
    "heads": 4,
    "kv": 2,
    "length": 128,
    "rows": 16,
}


def write_model(folder: Path, size: dict) -> None:
    """Write a random Llama and a tokenizer whose words are its tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(size["vocabulary"] - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocabulary"], hidden_size=size["width"], intermediate_size=size["inner"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv"],
        max_position_embeddings=2 * size["length"], tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def rows(size: dict) -> list[dict]:
    """Return rows whose completion repeats words of a small set, so that there is something to learn."""
    draw = random.Random(1)
    half = size["length"] // 2
    word = lambda most: f"w{draw.randrange(most)}"  # noqa: E731
    return [
        {
            "prompt": " ".join(word(size["vocabulary"] - 3) for _ in range(half)),
            "completion": " ".join(word(50) for _ in range(half - 1)),
        }
        for _ in range(size["rows"])
    ]


def measured(work) -> dict:
    """Return the seconds and the CPU seconds of `work`, and the peak memory of the process."""
    begun, cpu = time.perf_counter(), time.process_time()
    result = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": time.perf_counter() - begun,
        "cpu": time.process_time() - cpu,
        "memory": peak,
        "result": result,
    }


def run_graftkit(folder: str, size: dict, seed: int) -> dict:
    import graftkit

    taken = {}
    from graftkit.engine import loop

    steps = loop.Loop.__iter__

    def timed(self):
        begun = time.perf_counter(), time.process_time()
        yield from steps(self)
        taken["training"], taken["cpu"] = (
            b - a for a, b in zip(begun, (time.perf_counter(), time.process_time()))
        )

    loop.Loop.__iter__ = timed
    with tempfile.TemporaryDirectory() as out:
        graftkit.tune(
            model=folder, train=rows(size), task="generate(template='plain')",
            method=f"lora(rank={RANK}, alpha={2 * RANK}, sites='all-linear', lr={RATE})", out=f"{out}/run",
            settings={
                "train.epochs": 1, "train.batch_size": BATCH, "train.warmup": 0.0, "data.eval": None,
                "train.precision": "bf16", "seed": seed, "train.weight_decay": 0.0, "data.max_length": size["length"],
            },
        )  # fmt: skip
        lines = Path(out, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if line["kind"] == "step"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": taken["training"], "cpu": taken["cpu"], "memory": peak, "loss": losses[-1]}


def run_peer(folder: str, size: dict, seed: int) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(row: dict) -> dict:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    data = Dataset.from_list(rows(size)).map(encode, remove_columns=["prompt", "completion"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE, bf16=True, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, seed=seed, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, DataCollatorForSeq2Seq(tokenizer), data)
        found = measured(trainer.train)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {**{key: found[key] for key in ("seconds", "cpu", "memory")}, "loss": losses[-1]}


def profile(folder: str, size: dict) -> None:
    """Print where the CPU time of GraftKit's steps goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run_graftkit(folder, size, 0)
    print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


SIDES = {"Trainer + PEFT, bf16": "run_peer", "GraftKit": "run_graftkit"}


def main() -> None:
    words = sys.argv[1:]
    size = QUICK if "--quick" in words else WHOLE
    rounds = next((int(word) for word in words if word.isdigit()), 3)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), size)
        if "--profile" in words:
            profile(folder, size)
            return
        results: dict[str, list[dict]] = {name: [] for name in SIDES}
        for seed in range(rounds):
            for name, function in SIDES.items():
                given = {"function": function, "folder": folder, "size": size, "seed": seed}
                results[name].append(child(__file__, given))
                print(name, {k: round(v, 3) for k, v in results[name][-1].items()}, flush=True)
    print("\n| side | seconds, median | CPU seconds, median | peak memory, GB | last loss |")
    print("| --- | --- | --- | --- | --- |")
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    for name, one in middle.items():
        print(
            f"| {name} | {one['seconds']:.1f} | {one['cpu']:.1f} | {one['memory'] / 1e9:.2f} | {one['loss']:.3f} |"
        )
    peer, own = middle.values()
    print(
        f"\nGraftKit takes 1/{peer['seconds'] / own['seconds']:.2f} of the seconds, 1/{peer['cpu'] / own['cpu']:.2f} of the "
        f"CPU seconds and {own['memory'] / peer['memory']:.2f} of the memory. {rounds} rounds in turn, each in a process of "
        f"its own. {machine()}; bf16 products {gflops('bfloat16'):.0f} GFLOP/s."
    )
    print(json.dumps({name: one for name, one in middle.items()}))


if __name__ == "__main__":
    given = child_arguments()
    if given is None:
        main()
    else:
        function = globals()[given.pop("function")]
        print(json.dumps(function(**given)))
