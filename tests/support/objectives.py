"""Corpora in memory, and tokenizers and models of a few kilobytes, for tests of the objectives."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from graftkit.tasks.objectives.documents import CorpusTable, Documents, Texts

WORDS = tuple(
    f"{a}{b}" for a in ("ka", "lo", "mi", "su", "te") for b in ("ra", "ne", "shi", "po", "wu", "da")
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class MemoryShards:
    """What `graftkit.data.corpora.Shards` promises, of lists of sentences of tokens."""

    def __init__(self, documents: list[list[list[int]]], sizes: list[int] | None = None) -> None:
        self.sequences = [np.array(s, dtype=np.int64) for document in documents for s in document]
        self.lengths = np.array([len(s) for s in self.sequences])
        self.documents = np.cumsum([0, *map(len, documents)])
        self.document_bytes = np.array(sizes or [4 * sum(map(len, d)) for d in documents])
        self.statistics: dict[str, Any] = {}

    def tokens(self, sequence: int, start: int = 0, end: int | None = None) -> np.ndarray:
        return self.sequences[sequence][start:end].copy()

    def document(self, document: int) -> np.ndarray:
        return np.concatenate(self.sequences[self.documents[document] : self.documents[document + 1]])

    def digest(self) -> str:
        return hashlib.sha256(b"".join(s.tobytes() for s in self.sequences)).hexdigest()


def texts_of(documents: list[list[list[int]]], numbers: Any = None) -> Texts:
    shards: Any = MemoryShards(documents)
    return Texts(shards, np.arange(len(documents)) if numbers is None else np.array(numbers))


def examples(held: bool = False) -> Documents:
    return Documents(CorpusTable({"text": []}, "corpus.txt", [], "document"), {}, held=held)


def random_documents(count: int, vocabulary: int, seed: int = 0, longest: int = 40) -> list[list[list[int]]]:
    """Documents of one sequence of ordinary tokens each."""
    random = np.random.default_rng(seed)
    return [[random.integers(5, vocabulary, random.integers(1, longest)).tolist()] for _ in range(count)]


def fake_tokenizer(vocabulary: int, tokens: dict[int, str] | None = None) -> Any:
    """What the rows need of a tokenizer whose first five tokens are BERT's special ones."""
    names = [*SPECIAL, *(f"w{i}" for i in range(5, vocabulary))]
    for number, token in (tokens or {}).items():
        names[number] = token

    class Fake(SimpleNamespace):
        def __len__(self) -> int:
            return vocabulary

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [names[i] for i in ids]

    return Fake(
        pad_token_id=0, cls_token_id=2, sep_token_id=3, mask_token_id=4, bos_token_id=None, eos_token_id=3,
        all_special_ids=[0, 1, 2, 3, 4],
    )  # fmt: skip


def write_texts(path: Path, paragraphs: int, seed: int = 0, sentences: int = 4) -> Path:
    """A text file of paragraphs of sentences, in which some words follow others more often."""
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(paragraphs):
        lines = []
        for _ in range(random.integers(2, sentences + 1)):
            start = int(random.integers(len(WORDS)))
            count = int(random.integers(3, 8))
            lines.append(
                " ".join(WORDS[(start + i * 7) % len(WORDS)] for i in range(count)).capitalize() + "."
            )
        parts.append(" ".join(lines))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def word_tokenizer(folder: Path, *, mask: bool = True, end: bool = False) -> Path:
    """A tokenizer of the words of `write_texts`, in a folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL, "<end>"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS, "."])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    named = {"mask_token": "[MASK]"} if mask else {}
    named |= {"bos_token": "<end>", "eos_token": "<end>"} if end else {}
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **named,
    ).save_pretrained(folder)
    return folder


def tiny_model(folder: Path, kind: str, vocabulary: int | None = None) -> Path:
    """A model of two layers and width 32 with its tokenizer: 'bert', 'pairs' (BERT with both heads) or 'gpt'."""
    import torch
    import transformers as t

    word_tokenizer(folder, end=kind == "gpt")
    size = vocabulary or len(t.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    if kind == "gpt":
        config: Any = t.GPT2Config(
            vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=5, eos_token_id=5
        )
        model: Any = t.GPT2LMHeadModel(config)
    else:
        config = t.BertConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32,
        )  # fmt: skip
        model = (t.BertForPreTraining if kind == "pairs" else t.BertForMaskedLM)(config)
    model.save_pretrained(folder)
    return folder
