"""Corpora are read as a stream, in parts that have together each document once; bad files are one clear error each."""

from __future__ import annotations

import gzip
import json
import os
import random

import pyarrow
import pyarrow.parquet
import pytest
from corpora import make_documents

from graftkit import UserError
from graftkit.data.corpora import corpus as corpus_files
from graftkit.data.corpora import open_corpus, reading
from graftkit.data.corpora.cleaning import Counts, clean, fingerprint


def by_parts(corpus) -> list[str]:
    counts = Counts()
    parts = [part for shard in corpus.shards() for part in shard]
    return [text for part in parts for text in corpus.reading.read(part, counts)]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(corpus_files, "SMALLEST_SHARD", 500)


def test_every_form_gives_the_same_documents(tmp_path, small_shards) -> None:
    documents = make_documents(200)
    flat = [text.replace("\n", " ") for text in documents]
    draw = random.Random(0)
    gaps = ["\n\n", "\n \n", "\r\n\r\n", "\n\n\n\n", "\n\u3000\n\n"]
    (tmp_path / "paragraphs.txt").write_text(
        "".join(text + draw.choice(gaps[:4]) for text in documents), newline=""
    )
    (tmp_path / "lines.txt").write_text("\n".join(flat) + "\n")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in documents))
    table = pyarrow.table({"text": pyarrow.array([None, *documents]).dictionary_encode(), "id": range(201)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=17)
    (tmp_path / "files").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "files" / f"{number:03d}.txt").write_text(text)
    (tmp_path / "wide.txt").write_text("\n\n".join(documents), encoding="utf-16")
    (tmp_path / "chinese.txt").write_text(
        "\n\n".join(documents).replace("é", "e").replace("Ü", "U"), encoding="gb18030"
    )

    for name in ("paragraphs.txt", "rows.jsonl", "rows.parquet", "files"):
        corpus = open_corpus(tmp_path / name)
        assert list(corpus.documents()) == documents, name
        assert len(corpus.shards()) > 8 and by_parts(corpus) == documents, name
    corpus = open_corpus(tmp_path / "lines.txt")
    assert corpus.reading.documents == "lines"
    assert list(corpus.documents()) == by_parts(corpus) == flat
    assert (
        by_parts(open_corpus(tmp_path / "wide.txt", encoding="utf-16", documents="paragraphs")) == documents
    )
    plain = [text.replace("é", "e").replace("Ü", "U") for text in documents]
    corpus = open_corpus(tmp_path / "chinese.txt", encoding="gb18030")
    assert by_parts(corpus) == list(corpus.documents()) == plain


@pytest.mark.parametrize("how", ["paragraphs", "lines"])
def test_parts_of_any_size_have_each_document_once(how, tmp_path, monkeypatch) -> None:
    draw = random.Random(5)
    for round_ in range(20):
        path = tmp_path / f"{round_}.txt"
        path.write_bytes(
            b"".join(draw.choices([b"ab\n", b"\n", b" \n", b"c", "é\n".encode(), b"\r\n"], k=60))
        )
        whole = list(open_corpus(path, documents=how).documents())
        for size in (1, 2, 3, 7, 20, 59):
            monkeypatch.setattr(corpus_files, "SMALLEST_SHARD", size)
            assert by_parts(open_corpus(path, documents=how)) == whole
    text = path.read_text().replace("\r", "")
    if how == "lines":
        assert whole == [line.strip() for line in text.split("\n") if line.strip()]


def test_folders_are_sorted_and_other_files_left_alone(tmp_path) -> None:
    for name in ("b/2.txt", "a.jsonl", "b/10.txt", ".hidden/x.txt", "notes.md", "b/.y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "of ' + name + '"}')
    (tmp_path / "empty.txt").touch()
    corpus = open_corpus([tmp_path])
    assert [file.name for file in corpus.files] == ["a.jsonl", "b/10.txt", "b/2.txt"]
    assert next(corpus.documents()) == "of a.jsonl"


def test_cleaning_counts_what_it_leaves_out(tmp_path) -> None:
    counts = Counts()
    assert clean("\ufeff a\x00b\r\nc\rd\u2028\ud800e\ufffd\x9f ", counts) == "ab\nc\nd\ne"
    assert counts == Counts(undecodable=2, control=3)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "good \\ud800"}\n{"text": "caf\xe9 caf\xc3\xa9"}\n{"text": null}\n{"text": " "}\n'
    )
    corpus = open_corpus(path)
    counts = Counts()
    part = reading.Part(str(path), "json lines", path.stat().st_size)
    assert list(corpus.reading.read(part, counts)) == ["good", "caf café"]
    assert counts == Counts(undecodable=2, control=0, empty=2)


def test_fingerprints_ignore_case_white_space_and_forms() -> None:
    assert fingerprint("Ｔｈｅ  Cat\n sat") == fingerprint("the cat sat") != fingerprint("the cats at")
    assert fingerprint("STRASSE") == fingerprint("straße")


def bad_files() -> dict:
    png = b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(3000)
    rows = b'{"text": "a"}\n'
    return {
        "nothing.txt": (b"", "the corpus is empty"),
        "picture.txt": (png, "binary file"),
        "packed.jsonl": (gzip.compress(random.Random(0).randbytes(3000)), "binary file"),
        "zeros.txt": (b"a\0b\0\0\0\0\0" * 20, "zero bytes"),
        "wide.txt": ("some text of words".encode("utf-16"), "utf-16"),
        "latin.txt": (
            ("é à ö ü ß ç ñ " * 20).encode("latin-1"),
            "is not utf-8: .* cannot be decoded. Perhaps",
        ),
        "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        "table.csv": (b"text\na\n", "has the ending '.csv'"),
        "no_ending": (b"text\na\n", "has no ending"),
        "other.jsonl": (b'{"txet": "a"}\n', "no column 'text' .*txet.*Did you mean 'txet'"),
        "list.jsonl": (b"[1]\n", "not an object"),
        "number.jsonl": (b'{"text": 3}\n', "column 'text' is 3, not a text"),
        "late.jsonl": (rows * 3 + b'{"text": }\n', "late.jsonl, line 4: not JSON"),
        "later.jsonl": (rows * 3 + b'{"tex": "a"}\n', "line 4: the row has no column 'text'"),
        "broken.parquet": (b"PAR1" + b"x" * 50, "parquet"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files(name: str, tmp_path) -> None:
    content, message = bad_files()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(open_corpus(tmp_path / name).documents())


def test_other_mistakes(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a")
    table = pyarrow.table({"text": [[1]], "body": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    mistakes = [
        (lambda: open_corpus(tmp_path / "b.txt"), "b.txt does not exist"),
        (lambda: open_corpus([]), "no file is named"),
        (lambda: open_corpus([tmp_path / "a.txt", tmp_path / "a.txt"]), "named twice"),
        (lambda: open_corpus(tmp_path / "a.txt", documents="line"), "Did you mean 'lines'"),
        (lambda: open_corpus(tmp_path / "a.txt", encoding="utf-9"), "not a known text encoding"),
        (lambda: open_corpus(tmp_path / "a.parquet"), "holds list.*, not texts"),
        (lambda: open_corpus(tmp_path / "a.parquet", column="bdy"), "Did you mean 'body'"),
        (lambda: open_corpus(tmp_path / "none"), "does not exist"),
    ]
    for act, message in mistakes:
        with pytest.raises(UserError, match=message):
            act()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file with one of the endings"):
        open_corpus(tmp_path / "empty")


@pytest.mark.parametrize("how", ["lines", "paragraphs", "file", "json"])
def test_a_line_of_50_megabytes(how, tmp_path) -> None:
    path = tmp_path / ("long.jsonl" if how == "json" else "long.txt")
    start = b'{"text": "a"}\n{"text": "' if how == "json" else b"first\nx"
    path.write_bytes(start + b"word " * 20_000)
    os.truncate(path, 50_000_000)  # the rest takes no place on the disk
    message = (
        "50,000,000 bytes" if how == "file" else "long.*, line 2: a document of more than 10,000,000 bytes"
    )
    with pytest.raises(UserError, match=message):
        list(open_corpus(path, documents="auto" if how == "json" else how).documents())


def test_a_file_that_changes_while_it_is_read(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    corpus = open_corpus(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    with pytest.raises(UserError, match="has changed"):
        list(corpus.documents())


def test_a_small_parquet_file_that_stands_for_too_much(tmp_path) -> None:
    text = pyarrow.array(["a" * 9_000_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int8()), text)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet has .* too many for its size"):
        list(open_corpus(tmp_path / "t.parquet").documents())
