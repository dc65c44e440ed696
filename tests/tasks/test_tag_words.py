"""Words, the tokens they are read as by tokenizers of every kind, and parts of long texts."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from graftkit.errors import UserError
from graftkit.tasks.tag.words import _ends, align, special_tokens, split_all, split_words, text_of

TEXTS = [
    "Empire State Building = ESB.",
    "  two  spaces\tand a\nline ",
    "don't say \u201cnaïve café\u201d, e\u0301tude… ﬁne ½",
    "@user #tag http://t.co/x 3.14 U.S. C++",
    "東京タワー and ไทย, 한국어 नमस्ते",
    "emoji 👩‍👩‍👧 ❤️ \u200b zero \ufeff end",
    "İstanbul STRASSE straße ΑΣ",
    "x",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def wrapped(tokenizer: Tokenizer, template: bool = True) -> PreTrainedTokenizerFast:
    if template:
        ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )


def wordpiece() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(TEXTS[:4] * 3, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return wrapped(made)


def byte_level(prefix: bool, trim: bool) -> PreTrainedTokenizerFast:
    """GPT-2's: no prefix, offsets with the space; RoBERTa's: a prefix, offsets without."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 2, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    if trim:
        made.post_processor = processors.RobertaProcessing(
            ("[SEP]", 3), ("[CLS]", 2), trim_offsets=True, add_prefix_space=prefix
        )
    return wrapped(made, template=False)


def unigram() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=SPECIAL, unk_token="[UNK]")
    made.train_from_iterator(TEXTS * 2, trainer)
    return wrapped(made)


def fallback() -> PreTrainedTokenizerFast:
    """BPE as in Llama: spaces are marked by the normalizer, and bytes stand for what is not in the vocabulary."""
    vocabulary = {
        name: i
        for i, name in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeinst"])
    }
    made = Tokenizer(
        models.BPE(
            vocabulary, [("▁", "a")] if "▁a" in vocabulary else [], byte_fallback=True, unk_token="[UNK]"
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return wrapped(made)


def whole() -> PreTrainedTokenizerFast:
    """Tokens that go over several words: no pre-tokenizer parts them."""
    made = Tokenizer(
        models.Unigram(
            [(name, 0.0) for name in SPECIAL] + [("New York", -1.0), *((c, -9.0) for c in "NewYork inab")], 1
        )
    )
    return wrapped(made)


MADE = {
    "wordpiece": wordpiece, "gpt2": lambda: byte_level(False, False), "roberta": lambda: byte_level(True, True),
    "unigram": unigram, "llama": fallback, "over words": whole,
}  # fmt: skip


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request):
    return MADE[request.param]()


def encoded(tokenizer, text):
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_word_has_the_first_token_with_one_of_its_characters(tokenizer, text):
    spans = split_words(text)
    _, offsets = encoded(tokenizer, text)
    places, own = align(text, spans, offsets)
    taken: set[int] = set()
    for (start, end), place, owned in zip(spans, places, own):
        having = [
            i
            for i, (a, b) in enumerate(offsets)
            if any(start <= c < end and not text[c].isspace() for c in range(a, b))
        ]
        assert place == (having[0] if having else -1)
        assert owned == (bool(having) and having[0] not in taken)
        taken |= set(having[:1])


def test_words_that_are_tokens_are_aligned_as_by_transformers(tokenizer):
    """`word_ids` of words handed over one by one, where the tokenizer reads them so."""
    words = ["Empire", "State", "Building", "=", "ESB", ".", "don't", "#tag", "3.14"]
    if tokenizer.backend_tokenizer.pre_tokenizer is None:
        pytest.skip("it has no words of its own")
    text, spans = text_of(words)
    ids, offsets = encoded(tokenizer, text)
    split = tokenizer(words, is_split_into_words=True, add_special_tokens=False)
    if split["input_ids"] != ids:
        pytest.skip("it reads single words in another way than a text")
    places, _ = align(text, spans, offsets)
    for word, place in enumerate(places):
        first = split.word_ids().index(word)
        assert place in (first, first + 1)  # a space alone is a token of the word for transformers
        assert tokenizer.convert_ids_to_tokens(ids[first:place]) in ([], ["▁"], ["Ġ"])


def test_words_that_vanish_have_no_token():
    made = wordpiece()
    text, spans = text_of(["a", "\u200b", "\ufeff", "say", "\x07"])
    places, own = align(text, spans, encoded(made, text)[1])
    assert (places >= 0).tolist() == own.tolist() == [True, False, False, True, False]


def test_a_token_over_two_words_is_of_the_first():
    made = whole()
    text, spans = text_of(["in", "New", "York"])
    places, own = align(text, spans, encoded(made, text)[1])
    assert own.tolist() == [True, True, False] and places[1] == places[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Mr. O'Neil, 3.14!", ["Mr", ".", "O", "'", "Neil", ",", "3", ".", "14", "!"]),
        ("我爱北京", list("我爱北京")),
        ("ab\u0301c d\u0308", ["ab\u0301c", "d\u0308"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("snake_case x2 ❤️!", ["snake_case", "x2", "❤️", "!"]),
        ("한국어 ไท", ["한국어", "ไ", "ท"]),
        (" \t\n", []),
    ],
)
def test_words_of_a_text(text, words):
    assert [text[a:b] for a, b in split_words(text)] == words


def parts_of(tokenizer, tokens, max_length):
    text, spans = text_of(tokens)
    return split_all(tokenizer, [text], [spans], max_length, "the model"), text, spans


@pytest.mark.parametrize("max_length", [12, 20, 33, 200])
def test_long_texts_are_split_at_words_and_lose_nothing(tokenizer, max_length):
    tokens = ("the quick brown fox . jumps over a lazy dog and don't stop " * 6).split()
    parts, text, spans = parts_of(tokenizer, tokens, max_length)
    ids, offsets = encoded(tokenizer, text)
    before, behind = special_tokens(tokenizer)
    inner = [part.ids[len(before) : len(part.ids) - len(behind)].tolist() for part in parts]
    assert [i for row in inner for i in row] == ids
    assert all(len(part.ids) <= max_length and not part.cut for part in parts)
    assert all(part.ids.tolist() == [*before, *row, *behind] for part, row in zip(parts, inner))
    assert np.concatenate([part.words for part in parts]).tolist() == list(range(len(tokens)))
    places, _ = align(text, spans, offsets)
    at = 0
    for part, row in zip(parts, inner):
        assert (part.places - len(before) + at).tolist() == places[part.words].tolist()
        assert at == 0 or at in places  # a part begins with a word
        at += len(row)
    assert (len(parts) == 1) == (len(ids) + len(before) + len(behind) <= max_length)


def test_a_part_ends_with_a_sentence_where_one_is_near():
    made = wordpiece()
    vocabulary = made.get_vocab()
    tokens = ["a"] * 8 + ["."] + ["a"] * 30
    assert "a" in vocabulary and "." in vocabulary
    parts, _, _ = parts_of(made, tokens, 12)
    assert [len(part.words) for part in parts][:2] == [9, 10]


def test_a_word_longer_than_a_part_loses_its_end(tokenizer):
    tokens = ["a", "abcdefghijklmnopqrstuvwxyz" * 4, "b"]
    parts, _, _ = parts_of(tokenizer, tokens, 10)
    assert np.concatenate([part.words for part in parts]).tolist() == [0, 1, 2]
    assert all(len(part.ids) <= 10 for part in parts)
    if len(parts) > 1:  # WordPiece makes one unknown token of it
        assert any(part.cut for part in parts)


def test_no_room_and_no_places():
    with pytest.raises(
        UserError, match=r"data\.max_length is 2, of which 2 are special tokens of the model; raise it"
    ):
        parts_of(wordpiece(), ["a"], 2)

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="does not provide character offsets"):
        parts_of(Slow(), ["a"], 20)


def test_a_text_that_vanishes_is_still_a_row():
    parts, _, _ = parts_of(wordpiece(), ["\u200b"], 20)
    assert len(parts) == 1 and len(parts[0].words) == 0 and len(parts[0].ids) == 2
    parts, _, _ = parts_of(byte_level(False, False), [""], 20)
    assert len(parts[0].ids) == 1


class Counted(str):
    """A text that counts how many of its characters are looked at."""

    looked = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        Counted.looked += len(found)
        return found


def test_ends_of_sentences_are_found_in_linear_time():
    text = Counted("Ada lives. In London! Does she? " * 200)
    spans = split_words(str(text))
    Counted.looked = 0
    found = _ends(text, spans, np.arange(len(spans)))
    assert Counted.looked <= 2 * len(spans)
    assert found.tolist() == [
        word > 0 and str(text)[spans[word - 1][0]] in ".!?" for word in range(len(spans))
    ]
    assert _ends("", [(0, 0)], np.array([0])).tolist() == [False]
