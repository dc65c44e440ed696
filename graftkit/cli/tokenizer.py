"""The command that trains a tokenizer."""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli.options import Json, console_of, emit


def tokenizer(
    train: Annotated[
        list[str],
        typer.Option(help="text file, JSON lines, Parquet, or a folder of these; may be given several times"),
    ],
    kind: Annotated[
        str, typer.Option(help="wordpiece (as BERT), bpe (on bytes, as GPT-2) or unigram (as XLM-R)")
    ],
    vocab: Annotated[int, typer.Option(help="tokens of the vocabulary, special ones included")],
    out: Annotated[str, typer.Option(help="folder to write")],
    special: Annotated[
        str, typer.Option(help="special tokens: bert, glm for blank infilling, t5 for span corruption")
    ] = "bert",
    lowercase: Annotated[bool, typer.Option("--lowercase", help="make texts lower case")] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="measure the tokenizer of a model folder or hub id on the same texts"
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="column with the text in JSON lines and Parquet; default: text")
    ] = None,
    documents: Annotated[
        str, typer.Option(help="how text files are split: auto, paragraphs, lines or file")
    ] = "auto",
    encoding: Annotated[str, typer.Option(help="encoding of text files and JSON lines")] = "utf-8",
    overwrite: Annotated[bool, typer.Option(help="replace the tokenizer in the folder")] = False,
    as_json: Json = False,
) -> None:
    """Train a tokenizer on a corpus, and measure it on a held-out part.

    The folder is loaded by AutoTokenizer of transformers. Bytes and characters per token and the share of unknown tokens are
    shown, with --compare beside those of another tokenizer.
    """
    from graftkit.runs.tokenizer import train_tokenizer

    found = train_tokenizer(
        train, kind=kind, vocab=vocab, out=out, special=special, lowercase=lowercase, compare=compare, column=column,
        documents=documents, encoding=encoding, overwrite=overwrite, console=console_of(as_json),
    )  # fmt: skip
    emit(as_json, found)
