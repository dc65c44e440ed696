"""`graftkit tokenizer`: train a tokenizer on a corpus, measure it beside another one, and save it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graftkit import claims
from graftkit.backbone.folder import PROCESSOR_FILES, refuse_faults, refuse_strange_files
from graftkit.backbone.source import find_source
from graftkit.claims import held
from graftkit.data.corpora import Corpus, open_corpus
from graftkit.data.corpora.cleaning import fingerprint
from graftkit.data.corpora.writing import Encoder
from graftkit.data.vocabularies import END, END_OF_TEXT, KINDS, SPECIAL, UNKNOWN, batches, learn_vocabulary
from graftkit.errors import UserError, first_line, listing, nearest
from graftkit.files import assembling, write_json
from graftkit.report.console import Console, count

REPORT = "tokenizer_report.json"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", REPORT)
HELD_OUT = 20  # one text of so many is measured on, and not trained on
MEASURED = 4_000_000  # characters at most
LONG = 1 << 16  # characters of a document from which on its lines are taken one by one
NAMES = {
    "[PAD]": "pad_token",
    UNKNOWN: "unk_token",
    "[CLS]": "cls_token",
    "[SEP]": "sep_token",
    "[MASK]": "mask_token",
    END: "eos_token",
}


def train_tokenizer(
    train: Any,
    *,
    kind: str,
    vocab: int,
    out: str | Path,
    special: str = "bert",
    lowercase: bool = False,
    compare: str | None = None,
    column: str | None = None,
    documents: str = "auto",
    encoding: str = "utf-8",
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a tokenizer on a corpus and write a folder that `AutoTokenizer.from_pretrained` loads.

    Args:
        train: text files, JSON lines, Parquet files, folders of these, or a list of them.
        kind: 'wordpiece' as BERT's, 'bpe' on bytes as GPT-2's, or 'unigram' as XLM-R's.
        vocab: the size of the vocabulary, special tokens included.
        out: the folder to write.
        special: 'bert' for [PAD] [UNK] [CLS] [SEP] [MASK]; 'glm' also for the tokens of blank infilling; 't5' for [PAD] </s>
            [UNK] and 100 sentinels. 'bpe' has <|endoftext|> too.
        lowercase: make texts lower case, for 'wordpiece' and 'unigram'.
        compare: a model folder or hub id, or a folder with a tokenizer, that is measured on the same texts.
        column, documents, encoding: as for `open_corpus`.
        overwrite: replace a tokenizer that is in the folder.

    Returns a dict: `tokenizer` (the folder), `kind`, `vocab` (tokens reached), `asked`, `bytes_per_token`,
    `characters_per_token`, `unknown_share` (unknown tokens of all tokens), `held_out` (whether the texts that were measured
    were held out: a twentieth of the corpus, unless it is a handful of texts), `texts`, `warnings`, `seconds`, and `compare`
    with the same figures. The same corpus gives the same tokenizer.

    Raises UserError for a vocabulary that has no place for the characters, and as `open_corpus` does.
    """
    begun = time.perf_counter()
    console = console or Console(quiet=True)
    _check(kind, vocab, special)
    folder = Path(out).expanduser()
    _refuse_used(folder, overwrite)
    other = None if compare is None else load_tokenizer(compare)
    corpus = open_corpus(train, column=column, documents=documents, encoding=encoding)
    tokens = SPECIAL[special] + ((END_OF_TEXT,) if kind == "bpe" else ())
    texts, held_out = _held_out(corpus)
    made = _learn(corpus, kind, vocab, tokens, lowercase, held_out)
    found = {"tokenizer": str(folder), "kind": kind, **_figures(made, vocab, texts, held_out)}
    if other is not None:
        found["compare"] = {"model": compare, "vocab": len(other), **measure(other, texts)}
    found["seconds"] = round(time.perf_counter() - begun, 3)
    with held(folder, str(folder)), assembling(folder, FILES, FILES[:1]) as part:
        _refuse_used(folder, overwrite)
        _save(made, tokens, part)
        write_json(
            part / REPORT, {key: value for key, value in found.items() if key not in ("tokenizer", "seconds")}
        )
    _show(console, found)
    return found


def _check(kind: str, vocab: int, special: str) -> None:
    for name, value, known in (("kind", kind, KINDS), ("special", special, tuple(SPECIAL))):
        if value not in known:
            raise UserError(f"{name} {value!r} is none of {listing(known)}.{nearest(str(value), known)}")
    if vocab < 1:
        raise UserError(
            f"vocab={vocab} is not a size of a vocabulary. Set it to some thousands, such as 8000."
        )


def _refuse_used(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the tokenizer.")
    names = sorted(
        path.name for path in folder.iterdir() if path.name != claims.LOCK and not claims.is_leftover(path)
    )
    if names and REPORT not in names:
        raise UserError(
            f"{folder} holds files that are not of this command ({listing(names, 4)}); name another folder."
        )
    if foreign := [name for name in names if name not in FILES]:
        raise UserError(f"{folder} holds more than a tokenizer ({listing(foreign, 4)}); name another folder.")
    if names and not overwrite:
        raise UserError(f"{folder} holds a tokenizer; replace it with --overwrite, or name another folder.")


def _pieces(corpus: Corpus) -> Iterator[str]:
    """Yield documents, and the lines of long ones."""
    for text in corpus.documents():
        if len(text) < LONG:
            yield text
        else:
            yield from (line for line in text.split("\n") if line.strip())


def _is_held_out(text: str) -> bool:
    return fingerprint(text) % HELD_OUT == 0


def _held_out(corpus: Corpus) -> tuple[list[str], bool]:
    """Return the texts to measure on, and whether they are held out from training.

    Which text is held out depends on itself alone, so repeated texts are all on one side. Raises UserError if there is no
    text.
    """
    first: list[str] = []
    held: list[str] = []
    size = 0
    for text in _pieces(corpus):
        if len(first) < HELD_OUT:
            first.append(text)
        if size < MEASURED and _is_held_out(text):
            held.append(text)
            size += len(text)
    if not first:
        raise UserError(
            f"{listing((file.path for file in corpus.files), 4)} has no document with text. Name others."
        )
    return (held, True) if held and len(first) >= HELD_OUT else (first, False)


def _learn(
    corpus: Corpus, kind: str, vocab: int, tokens: Sequence[str], lowercase: bool, held_out: bool
) -> Any:
    def texts() -> Iterator[list[str]]:
        return batches(text for text in _pieces(corpus) if not (held_out and _is_held_out(text)))

    try:
        return learn_vocabulary(kind, texts, vocab, tokens, lowercase=lowercase)
    except UserError:
        raise
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the library raises no other class
        raise UserError(
            f"a tokenizer of kind {kind} cannot be trained on {listing((file.path for file in corpus.files), 4)}: "
            f"{first_line(error)}. Give more text, or another kind."
        ) from None


def _figures(made: Any, asked: int, texts: Sequence[str], held_out: bool) -> dict[str, Any]:
    reached, warnings = made.get_vocab_size(), []
    if reached < asked:
        warnings.append(
            f"the corpus has no more than {reached:,} tokens of this kind, so the vocabulary has {reached:,} instead of {asked:,}"
        )
    if not held_out:
        warnings.append(
            "the corpus is too small to hold texts out, so the figures are those of texts that were trained on"
        )
    return {
        "vocab": reached, "asked": asked, **measure(made, texts), "held_out": held_out, "texts": len(texts),
        "warnings": warnings,
    }  # fmt: skip


def measure(tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """Return bytes and characters per token, and the share of unknown tokens, without special tokens."""
    encoder = Encoder.of(tokenizer)
    tokens = unknown = 0
    for some in batches(iter(texts)):
        for found in encoder.call(some):
            tokens += len(found)
            unknown += 0 if encoder.unknown is None else found.count(encoder.unknown)
    total = max(tokens, 1)
    return {
        "bytes_per_token": sum(len(text.encode()) for text in texts) / total,
        "characters_per_token": sum(map(len, texts)) / total,
        "unknown_share": unknown / total,
    }


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a folder, of a model folder or of a hub id. Raises `UserError` if there is none."""
    from transformers import AutoTokenizer

    path = Path(name).expanduser()
    if path.is_dir() and any((path / file).exists() for file in PROCESSOR_FILES[1:]):
        refuse_strange_files(path)
        refuse_faults(path, [file for file in PROCESSOR_FILES if (path / file).exists()])
        folder: Path | None = path
    else:
        folder = find_source(name).folder
    if folder is None:
        raise UserError(
            f"{name!r} is no model of transformers, so it has no tokenizer. Name a folder with a tokenizer."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"the tokenizer of {name!r} cannot be loaded: {first_line(error)}. Restore it from a copy."
        ) from None


def _save(made: Any, tokens: Sequence[str], folder: Path) -> None:
    """Write the files of transformers."""
    from transformers import PreTrainedTokenizerFast

    named = {NAMES[token]: token for token in tokens if token in NAMES}
    if END_OF_TEXT in tokens:
        named |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    others = [token for token in tokens if token not in named.values()]
    pairs = ["token_type_ids"] if "cls_token" in named and made.num_special_tokens_to_add(True) else []
    PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, additional_special_tokens=others,
        model_input_names=["input_ids", *pairs, "attention_mask"], **named,
    ).save_pretrained(folder)  # fmt: skip


def _show(console: Console, found: dict[str, Any]) -> None:
    console.heading(f"{found['tokenizer']}: {found['kind']}, {count(found['vocab'])} tokens")
    rows = [["this one", found]] + (
        [[found["compare"]["model"], found["compare"]]] if "compare" in found else []
    )
    console.table(
        ["tokenizer", "vocabulary", "bytes per token", "characters per token", "unknown"],
        [
            [
                str(name), count(some["vocab"]), f"{some['bytes_per_token']:.2f}", f"{some['characters_per_token']:.2f}",
                f"{some['unknown_share']:.2%}",
            ]
            for name, some in rows
        ],
    )  # fmt: skip
    which = "held-out texts" if found["held_out"] else "texts"
    console.line(f"measured on {count(found['texts'])} {which}")
    for warning in found["warnings"]:
        console.line(f"warning: {warning}")
