"""Tiny language models in folders of their own, with a byte-level tokenizer, and rows to tune them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS = 0, 1, 2
SIZES = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48, "max_position_embeddings": 96},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
             "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 96,
             "decoder_start_token_id": EOS, "forced_eos_token_id": None},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mistral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "intermediate_size": 48, "max_position_embeddings": 96, "sliding_window": 5},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
            "word_embed_proj_dim": 32, "max_position_embeddings": 96},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 96, "final_logit_softcapping": 3.0},
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration", "mamba": "MambaForCausalLM", "opt": "OPTForCausalLM",
    "bloom": "BloomForCausalLM", "mistral": "MistralForCausalLM", "gemma2": "Gemma2ForCausalLM",
}  # fmt: skip
COLOURS = {"grass": "green", "snow": "white", "blood": "red", "coal": "black", "the sea": "blue"}


def tokenizer(template: str | None = None, *, post: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE. `post`: what it adds around a text, such as '<s> $A'."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(
        [f"what colour is {thing}? {colour}" for thing, colour in COLOURS.items()], trainer
    )
    if post:
        made.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[(token, i) for i, token in enumerate(SPECIAL) if token in post]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=template,
    )  # fmt: skip


def model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model whose likeliest tokens depend on what it reads."""
    made = getattr(transformers, CLASSES[kind])
    given = {"vocab_size": 300, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = made.config_class(**given | SIZES[kind] | changes)
    torch.manual_seed(seed)
    result = made(config).eval()
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return result


def folder(path: Path, kind: str, template: str | None = None, *, post: str = "", **changes: Any) -> Path:
    """A model folder."""
    model(kind, **changes).save_pretrained(path)
    tokenizer(template, post=post).save_pretrained(path)
    return path


def rows(count: int = 40) -> list[dict[str, str]]:
    """Questions with one right answer each."""
    things = list(COLOURS)
    return [
        {"prompt": f"what colour is {things[i % 5]}{'?' * (1 + i % 3)}", "completion": COLOURS[things[i % 5]]}
        for i in range(count)
    ]
