"""LoRA of a Llama geometry with 150 M parameters and a vocabulary of 128,256: sequences of 512, loss of the completion only.

Random weights and made-up words: neither speed nor memory depends on what they mean. A row is 384 tokens of prompt and 128 of
completion, so there is no padding on either side. The words of completions come from 64 of the vocabulary, which is what there is
to learn. As these answers are not right or wrong, the sides are compared by the loss on held-out rows.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from compared.measures import apart, peak_memory, word_tokenizer

GEOMETRY = {
    "vocab_size": 128_256, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 7,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 512,
}  # fmt: skip
QUICK = {**GEOMETRY, "vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
PROMPT, COMPLETION, ROWS, HELD, BATCH, RANK, LR = 384, 128, 96, 16, 4, 16, 5e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(folder: Path, quick: bool) -> None:
    """Write a model with random weights and a tokenizer that knows a word for each token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    geometry = QUICK if quick else GEOMETRY
    torch.manual_seed(0)
    config = LlamaConfig(
        **geometry, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(folder, geometry["vocab_size"])


def rows(quick: bool) -> tuple[list[dict], list[dict]]:
    draw, words = random.Random(0), (QUICK if quick else GEOMETRY)["vocab_size"]
    prompt, completion = (24, 8) if quick else (PROMPT, COMPLETION)

    def text(low: int, high: int, count: int) -> str:
        return " ".join(f"w{draw.randrange(low, high)}" for _ in range(count))

    # the end of a completion is a token too
    made = [
        {"prompt": text(2, words, prompt) + " ", "completion": text(2, 66, completion - 1)}
        for _ in range(24 if quick else ROWS + HELD)
    ]
    held = 8 if quick else HELD
    return made[:-held], made[-held:]


def graftkit_side(seed: int, quick: bool) -> dict:
    train, held = rows(quick)
    with tempfile.TemporaryDirectory() as folder:
        apart(make_model, Path(folder, "model"), quick)
        import graftkit
        from graftkit.runs.predict import evaluate  # noqa: F401  (imports are not part of the time on either side)

        start = time.perf_counter()
        run = graftkit.tune(
            model=f"{folder}/model", task="generate(template='plain')", train=train, out=f"{folder}/run",
            method=f"lora(rank={RANK}, alpha={2 * RANK}, lr={LR})", settings={
                "train.epochs": 1, "train.batch_size": BATCH, "train.warmup": 0.0, "data.eval": None, "seed": seed,
                "train.weight_decay": 0.0,
            },
        )  # fmt: skip
        seconds, memory = time.perf_counter() - start, peak_memory()
        return {"seconds": seconds, "loss": run.evaluate(held)["loss"], "memory": memory}


def trainer_side(seed: int, quick: bool, weights: str = "float32", compiled: bool = False) -> dict:
    """`weights`: the number type in which the frozen weights are held; products are in bf16 either way."""
    train, held = rows(quick)
    with tempfile.TemporaryDirectory() as folder:
        apart(make_model, Path(folder, "model"), quick)
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

        start = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")

        def encoded(row: dict) -> dict:
            prompt, completion = (
                tokenizer(row["prompt"])["input_ids"],
                tokenizer(row["completion"])["input_ids"],
            )
            completion.append(tokenizer.eos_token_id)
            tokens = [*prompt, *completion]
            return {
                "input_ids": tokens,
                "attention_mask": [1] * len(tokens),
                "labels": [-100] * len(prompt) + completion,
            }

        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=weights),
            LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS),
        )
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, num_train_epochs=1,
            learning_rate=LR, bf16=True, torch_compile=compiled, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, seed=seed, logging_strategy="no", prediction_loss_only=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=[encoded(row) for row in train])
        trainer.train()
        seconds, memory = time.perf_counter() - start, peak_memory()
        loss = trainer.evaluate([encoded(row) for row in held])["eval_loss"]
        return {"seconds": seconds, "loss": loss, "memory": memory}
