"""Corpora, tokenizers and an independent reader of their shards, for tests."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np

SPACED = (
    "apple pear plum cherry grape the a my is was very old new here there and of 天地 玄黃 宇宙 café Ünder"
)
WORDS = SPACED.split()


def make_documents(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Texts of one to three lines, without blank ones."""
    draw = random.Random(seed)

    def line() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) + draw.choice([".", "!", "。", ""])

    return ["\n".join(line() for _ in range(draw.randint(1, 3))) for _ in range(count)]


def make_tokenizer():
    """Words, their letters for others, and [UNK] for what has none of these."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    letters = "abcdefghijklmnopqrstuvwxyz.!"
    tokens = ["[UNK]", "[CLS]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, handle_chinese_chars=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[CLS]", "[MASK]"])
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return tokenizer


def read_megatron(prefix: Path) -> tuple[list[list[int]], list[int]]:
    """Return sequences and document index of a pair, by the layout of Megatron-LM's indexed_dataset.py alone."""
    index, binary = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", index[9:17])
    (code,) = struct.unpack("<B", index[17:18])
    sequences, entries = struct.unpack("<QQ", index[18:34])
    assert version == 1
    kind = {4: np.int32, 8: np.uint16}[code]
    lengths = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    documents = np.frombuffer(index, np.int64, entries, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * entries
    found = [np.frombuffer(binary, kind, n, p).tolist() for n, p in zip(lengths, pointers)]
    return found, documents.tolist()


def write_megatron(
    prefix: Path, sequences: list[list[int]], documents: list[int], code: int = 4, kind=np.int32
) -> None:
    """Write a pair as Megatron-LM does."""
    lengths = [len(sequence) for sequence in sequences]
    size = np.dtype(kind).itemsize
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(one, kind).tobytes() for one in sequences))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    arrays = (np.array(lengths, np.int32), np.array(pointers, np.int64), np.array(documents, np.int64))
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
