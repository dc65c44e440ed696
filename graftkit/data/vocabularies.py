"""Learn the vocabulary of a tokenizer from texts, with the `tokenizers` library. The same texts give the same tokenizer.

The library's own trainers for WordPiece and Unigram depend on the order of a hash map, which differs from process to process
(tokenizers#1794). Here the pieces of WordPiece that continue a word get their numbers beforehand, and the probabilities of
Unigram are rounded and sorted afterwards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from graftkit.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS = ("wordpiece", "bpe", "unigram")
UNKNOWN, CLASS, SEPARATOR, END = "[UNK]", "[CLS]", "[SEP]", "</s>"
SPECIAL = {
    "bert": ("[PAD]", UNKNOWN, CLASS, SEPARATOR, "[MASK]"),
    "glm": (
        "[PAD]", UNKNOWN, CLASS, SEPARATOR, "[MASK]", "[sMASK]", "[gMASK]", "[dBLOCK]", "<|startofpiece|>", "<|endofpiece|>",
    ),
    "t5": ("[PAD]", END, UNKNOWN, *(f"<extra_id_{i}>" for i in range(100))),
}  # fmt: skip
END_OF_TEXT = "<|endoftext|>"  # GPT-2's
COVERAGE = 0.9995  # share of the characters of the texts that get a token at least, as in sentencepiece
DIGITS = 5  # of log-probabilities, which differ by rounding errors before they are rounded

Texts = Callable[[], Iterable[list[str]]]  # lists of texts, the same ones at each call


def learn_vocabulary(
    kind: str, texts: Texts, size: int, special: Iterable[str], *, lowercase: bool = False
) -> Tokenizer:
    """Return a tokenizer of at most `size` tokens, special ones included, which come first.

    - wordpiece: as BERT's. Chinese characters and punctuation are words of their own. Texts get [CLS] and [SEP].
    - bpe: on bytes, as GPT-2's: no text has unknown tokens, and decoding returns the text. Nothing is added to texts.
    - unigram: on words with a mark for the space before them, as XLM-R's. Texts get [CLS] and [SEP].

    `special`: [UNK] must be among them, and [CLS] and [SEP], or else </s>, which then stands behind a text. `lowercase`: of WordPiece and Unigram, as their vocabulary cannot
    have both cases then.

    If there are more characters than half of the vocabulary, those without a token of their own are the rarest, up to 0.05% of
    the text; Unigram has one for each. Raises UserError if these do not fit into `size`.
    """
    return {"wordpiece": _wordpiece, "bpe": _bpe, "unigram": _unigram}[kind](
        texts, size, list(special), lowercase
    )


def _wordpiece(texts: Texts, size: int, special: list[str], lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def blank(vocabulary: dict[str, int] | None = None) -> Tokenizer:
        made = Tokenizer(models.WordPiece(vocabulary or {UNKNOWN: 0}, unk_token=UNKNOWN))
        made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        return made

    def learned(first: list[str], alphabet: list[str], most: int) -> dict[str, int]:
        made = blank()
        trainer = trainers.WordPieceTrainer(
            vocab_size=most,
            special_tokens=first,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        made.train_from_iterator(texts(), trainer)
        return made.get_vocab(with_added_tokens=False)

    alphabet = _covering(_characters(texts, blank()), size)
    begun = learned([], alphabet, 0)  # characters, and those that continue a word
    continuing = sorted(set(begun) - set(alphabet))
    _refuse_small(size, len(special) + len(alphabet) + len(continuing))
    made = blank(learned([*special, *continuing], alphabet, size))
    _frame(made)
    return made


def _bpe(texts: Texts, size: int, special: list[str], lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if lowercase:
        raise UserError(
            "lowercase is not for kind bpe, whose tokens are those of the text as it is. Leave it out."
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _refuse_small(size, len(special) + len(alphabet))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts(), trainer)
    return made


def _unigram(texts: Texts, size: int, special: list[str], lowercase: bool) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def blank(model: Any) -> Tokenizer:
        made = Tokenizer(model)
        made.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(Regex(r"\s+"), " "),
                *([normalizers.Lowercase()] if lowercase else []),
            ]
        )
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
        made.decoder = decoders.Metaspace()
        return made

    made = blank(models.Unigram())
    # the mark for a space; and one piece more, as the trainer knows no end if the characters alone fill the vocabulary
    _refuse_small(size, len(special) + len(_characters(texts, made)) + 2)
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token=UNKNOWN, show_progress=False
    )
    made.train_from_iterator(texts(), trainer)
    found = json.loads(made.to_str())["model"]["vocab"]
    pieces = _in_order([(piece, score) for piece, score in found if piece not in special])
    lowest = pieces[-1][1] - 10.0 if pieces else -10.0  # so that no text is read as a special token
    made = blank(
        models.Unigram([*((token, lowest) for token in special), *pieces], special.index(UNKNOWN), False)
    )
    _frame(made)
    return made


def _in_order(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return pieces with rounded scores, best first.

    Characters that no probability was estimated for have scores that rise in steps of 0.0001 from the lowest one on, in
    a random order; all of them get the lowest.
    """
    lowest = min((score for _, score in pieces), default=0.0)
    single = {round((score - lowest) * 1e4, 4): piece for piece, score in pieces if len(piece) == 1}
    rare, step = set[str](), 0
    while step in single:
        rare.add(single[step])
        step += 1
    found = [(piece, round(lowest if piece in rare else score, DIGITS)) for piece, score in pieces]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def _frame(tokenizer: Tokenizer) -> None:
    """Put [CLS] before a text, [SEP] behind it and behind a second one, as BERT does; or </s> behind each, as T5 does."""
    from tokenizers.processors import TemplateProcessing

    bert = tokenizer.token_to_id(CLASS) is not None
    first, last = (f"{CLASS} ", SEPARATOR) if bert else ("", END)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first}$A {last}",
        pair=f"{first}$A {last} $B:{int(bert)} {last}:{int(bert)}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {first.strip() or last, last}],
    )


def _characters(texts: Texts, tokenizer: Tokenizer) -> Counter[str]:
    """Count the characters of texts as a tokenizer sees them, without white space."""
    found: Counter[str] = Counter()
    normalizer: Any = tokenizer.normalizer
    for some in texts():
        found.update(normalizer.normalize_str("\n".join(some)))
    for character in [character for character in found if character.isspace()]:
        del found[character]
    return found


def _covering(characters: Counter[str], size: int) -> list[str]:
    """Return the characters that get a token, in order: all, if they are no more than half of the vocabulary."""
    ranked = sorted(characters.items(), key=lambda pair: (-pair[1], pair[0]))
    wanted, seen, kept = COVERAGE * characters.total(), 0, 0
    for kept, (_, number) in enumerate(ranked, 1):
        seen += number
        if seen >= wanted and kept >= size // 2:
            break
    return sorted(character for character, _ in ranked[:kept])


def _refuse_small(size: int, needed: int) -> None:
    if needed > size:
        raise UserError(
            f"vocab={size:,} is smaller than the alphabet: the special tokens and the characters of these texts need {needed:,}. "
            f"Set vocab to {needed:,} or more, better to twice that, or use kind bpe, which starts from the 256 bytes."
        )


def batches(texts: Iterator[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    """Yield lists of texts of about as many characters."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= characters:
            yield some
            some, size = [], 0
    if some:
        yield some
