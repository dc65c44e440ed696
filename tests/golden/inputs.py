"""Tiny models and rows for the golden losses, built from configs and seeds.

What the other tests have of this kind is copied on purpose: a recorded loss is worth something only as long as nothing
that it is computed from moves with the code it guards.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

RATE = 8000  # samples in a second of the sounds

FRUIT = ("apple", "pear", "plum", "cherry", "grape")
TOOL = ("hammer", "saw", "drill", "wrench", "file")
ANIMAL = ("cat", "dog", "cow", "hen", "pig")
FILLER = ("the", "a", "my", "is", "was", "very", "old", "new", "here", "there", "and", "of")
KINDS = {"fruit": FRUIT, "tool": TOOL, "animal": ANIMAL}
COLOURS = {"grass": "green", "snow": "white", "blood": "red", "coal": "black", "sea": "blue"}
MARKS = ("what", "colour", "?", "for", "sure", "Text", "Label", ":")
WORDS = (*KINDS, *FRUIT, *TOOL, *ANIMAL, *FILLER, *COLOURS, *COLOURS.values(), *MARKS)


# --- models


def scatter(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter random values of its own, whatever a version of transformers would start it with.

    Outputs of a matrix come out about as large as its inputs, so a tiny model tells its rows apart and has gradients
    of a useful size in every block.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                gain = name.endswith("weight")  # of a norm
                parameter.copy_(0.2 * values + gain)
            elif parameter.dim() < 4 and any(word in name for word in ("position", "type", "wpe")):
                parameter.copy_(0.3 * values)
            elif parameter.dim() < 4 and any(word in name for word in ("embed", "shared", "wte", "token")):
                parameter.copy_(values)
            else:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
    return model.eval()


def save(folder: Path, model: torch.nn.Module, processor: Any) -> Path:
    scatter(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def bert_tokenizer() -> Any:
    """Whole words, and single letters behind the first piece of a word, so that a word can have several tokens."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pieces = (*special, *WORDS, *(f"##{letter}" for letter in "abcdes"))
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=64, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def bert(folder: Path, model: str = "BertModel") -> Path:
    """Three blocks of width 32, with dropout of 0.1."""
    tokenizer = bert_tokenizer()
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return save(folder, getattr(hf, model)(config), tokenizer)


def causal_tokenizer() -> Any:
    special = ("<pad>", "<s>", "</s>", "<unk>")
    words = {word: i for i, word in enumerate((*special, *WORDS))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=64, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def llama(folder: Path) -> Path:
    """Three blocks of width 32 with grouped keys and values; dropout of attention 0.1."""
    tokenizer = causal_tokenizer()
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, attention_dropout=0.1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return save(folder, hf.LlamaForCausalLM(config), tokenizer)


def gpt2(folder: Path) -> Path:
    tokenizer = causal_tokenizer()
    config = hf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return save(folder, hf.GPT2LMHeadModel(config), tokenizer)


def t5(folder: Path) -> Path:
    tokenizer = causal_tokenizer()
    config = hf.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return save(folder, hf.T5ForConditionalGeneration(config), tokenizer)


def vit(folder: Path) -> Path:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    return save(folder, hf.ViTModel(config, add_pooling_layer=False), processor)


def ast(folder: Path) -> Path:
    """A spectrogram transformer: 64 frames of 10 ms and 16 mel bands."""
    config = hf.ASTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, patch_size=8, max_length=64,
        num_mel_bins=16, frequency_stride=8, time_stride=8, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    extractor = hf.ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=16, max_length=64)
    return save(folder, hf.ASTModel(config), extractor)


def wav2vec2(folder: Path) -> Path:
    """Convolutions on samples, rows of their own lengths, and time masked at random in training."""
    config = hf.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[16, 16, 16],
        conv_stride=[5, 4, 4], conv_kernel=[10, 8, 4], num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, mask_time_length=2,
    )  # fmt: skip
    extractor = hf.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    return save(folder, hf.Wav2Vec2Model(config), extractor)


MODELS: dict[str, Callable[[Path], Path]] = {
    "bert": bert,
    "masked": lambda folder: bert(folder, "BertForMaskedLM"),
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
    "ast": ast,
    "wav2vec2": wav2vec2,
}


# --- rows


def texts(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """The label is the kind of the one word in a text that is not filler."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        kind = list(KINDS)[i % 3]
        words = draw.choices(FILLER, k=draw.randint(2, 9))
        words.insert(draw.randrange(len(words) + 1), draw.choice(KINDS[kind]))
        rows.append({"text": " ".join(words), "label": kind})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    """Two texts, and whether they are about the same kind."""
    first, second = texts(count, 2), texts(count + 1, 3)
    return [
        {"text": a["text"], "text_pair": b["text"], "label": "same" if a["label"] == b["label"] else "other"}
        for a, b in zip(first, (row for i, row in enumerate(second) if i != 5))
    ]


def sets(count: int) -> list[dict[str, Any]]:
    """Sets of kinds, some of them empty."""
    first, second = texts(count, 2), texts(count, 3)
    rows = []
    for i, (a, b) in enumerate(zip(first, second)):
        text, label = f"{a['text']} {b['text']}", "; ".join(sorted({a["label"], b["label"]}))
        rows.append({"text": text, "label": label} if i % 5 else {"text": "the very old", "label": ""})
    return rows


def numbers(count: int) -> list[dict[str, Any]]:
    """How many words a text has, a hundred times."""
    return [{"text": row["text"], "label": 100.0 * len(row["text"].split())} for row in texts(count)]


def steps(count: int) -> list[dict[str, Any]]:
    """How long a text is, in three steps."""
    names = ("short", "middle", "long")
    return [
        {"text": row["text"], "label": names[min(2, len(row["text"].split()) // 4)]} for row in texts(count)
    ]


def tagged(count: int) -> list[dict[str, Any]]:
    """Tokens with the tags of an animal, or of a fruit with a tool behind it; some words have two pieces."""
    draw, rows = random.Random(4), []
    for i in range(count):
        words = [(word, "O") for word in draw.choices(FILLER, k=draw.randint(2, 8))]
        kind, names = ("fruit", FRUIT) if i % 2 else ("animal", ANIMAL)
        entity = [draw.choice(names) + draw.choice(["", "s"])] + [draw.choice(TOOL)] * (i % 2)
        at = draw.randrange(len(words) + 1)
        words[at:at] = [(word, ("I-" if j else "B-") + kind) for j, word in enumerate(entity)]
        rows.append({"tokens": [word for word, _ in words], "tags": [tag for _, tag in words]})
    return rows


def questions(count: int) -> list[dict[str, Any]]:
    """Questions after the word of a kind; a quarter have no answer, and some contexts need several windows."""
    draw, rows = random.Random(5), []
    for i in range(count):
        kind = list(KINDS)[i % 3]
        words = draw.choices(FILLER, k=draw.choice([6, 12, 60]))
        answer = {"text": [], "answer_start": []}
        if i % 4:
            words.insert(draw.randrange(len(words) + 1), draw.choice(KINDS[kind][1:]))
        context = " ".join(words)
        if i % 4:
            word = next(word for word in words if word in KINDS[kind])
            start = len(" ".join(words[: words.index(word)])) + (words.index(word) > 0)
            answer = {"text": [word], "answer_start": [start]}
        asked = f"the {KINDS[kind][0]} here"
        rows.append({"id": str(i), "question": asked, "context": context, "answers": answer})
    return rows


def choices(count: int) -> list[dict[str, Any]]:
    """Among two to four texts the one with a fruit is right."""
    draw, rows = random.Random(6), []
    for i in range(count):
        size = 2 + i % 3
        label = draw.randrange(size)
        words = [draw.choice(FRUIT if place == label else TOOL + ANIMAL) for place in range(size)]
        found = [f"{draw.choice(FILLER)} {word}" for word in words]
        rows.append({"question": f"{draw.choice(FILLER)} here", "choices": found, "label": label})
    return rows


def answered(count: int) -> list[dict[str, Any]]:
    """Questions after a colour, with answers of two to five tokens."""
    things, rows = list(COLOURS), []
    for i in range(count):
        thing = things[i % len(things)]
        end = (" ", " for sure ", " very old and new ")[i % 3]
        rows.append(
            {"prompt": f"what colour is the {thing} ?", "completion": f"{end}{COLOURS[thing]}".strip()}
        )
    return rows


def pictures(count: int) -> list[dict[str, Any]]:
    """Noise around one of three colours; of the model's size, as how an image is resized depends on what is installed."""
    rows = []
    for i in range(count):
        name, colour = list({"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}.items())[
            i % 3
        ]
        draw = random.Random(100 + i)
        values = [[[round(draw.gauss(c, 40)) for c in colour] for _ in range(32)] for _ in range(32)]
        rows.append({"image": np.clip(values, 0, 255).astype(np.uint8), "label": name})
    return rows


def sounds(count: int) -> list[dict[str, Any]]:
    """High and low tones with some noise, 0.2 to 0.5 seconds long."""
    draw, rows = random.Random(8), []
    for i in range(count):
        label, hertz = (("high", 1500.0), ("low", 200.0))[i % 2]
        hertz, turn = hertz * draw.uniform(0.8, 1.2), draw.uniform(0, 6)
        times = np.arange(round(draw.uniform(0.2, 0.5) * RATE)) / RATE
        noise = np.array([draw.gauss(0, 0.02) for _ in times])
        wave = (0.3 * np.sin(2 * np.pi * hertz * times + turn) + noise).astype(np.float32)
        rows.append({"audio": {"array": wave, "sampling_rate": RATE}, "label": label})
    return rows
