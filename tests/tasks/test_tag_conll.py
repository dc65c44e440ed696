"""Files of CoNLL: columns, comments, documents, and lines that are malformed."""

from __future__ import annotations

import pytest

from graftkit.data.conll import conll_pieces, read_conll
from graftkit.errors import UserError


def write(folder, text: str, name: str = "a.conll") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


TABS = "It\tO\n's\tO\n\t\nNew\tB-loc\nYork\tI-loc\n\n\n#tag\tO\n#\tO\nB\tB-loc\n"


def test_tokens_and_tags(tmp_path):
    for text in (TABS, TABS.replace("\n", "\r\n"), "\ufeff" + TABS, TABS + "\n\ufeff", TABS.rstrip("\n")):
        table = read_conll(write(tmp_path, text))
        assert table.columns["tokens"] == [["It", "'s"], ["New", "York"], ["#tag", "#", "B"]]
        assert table.columns["tags"] == [["O", "O"], ["B-loc", "I-loc"], ["O", "O", "B-loc"]]
        assert table.numbers == [1, 4, 8] and table.where(1).endswith("a.conll, line 4")


def test_columns_between_and_documents(tmp_path):
    text = "-DOCSTART- -X- O O\n\n# a comment\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n-DOCSTART- -X- O O\n\nPeter NNP I-NP I-PER\n"
    path = write(tmp_path, text, "eng.iob")
    table = read_conll(path)
    assert table.columns == {"tokens": [["EU", "rejects"], ["Peter"]], "tags": [["I-ORG", "O"], ["I-PER"]]}
    assert table.numbers == [4, 8]
    assert read_conll(path, tag_column=2).columns["tags"] == [["NNP", "VBZ"], ["NNP"]]
    assert read_conll(path, token_column=-1, tag_column=1).columns["tokens"] == [["I-ORG", "O"], ["I-PER"]]
    with pytest.raises(UserError, match="has 4 columns, so tag_column=5 does not exist"):
        read_conll(path, tag_column=5)
    with pytest.raises(UserError, match="token_column and tag_column are both column 4 of 4"):
        read_conll(path, token_column=4)


def test_universal_dependencies(tmp_path):
    lines = ["# sent_id = 1", "# text = Vámonos al mar", "1-2\tVámonos" + "\t_" * 8, "1\tVamos\tir\tVERB" + "\t_" * 6,
             "2\tnos\tnosotros\tPRON" + "\t_" * 6, "2.1\tnada\t_\tX" + "\t_" * 6, "3\tmar\tmar\tNOUN" + "\t_" * 6]  # fmt: skip
    table = read_conll(write(tmp_path, "\n".join(lines) + "\n", "es.conllu"))
    assert table.columns == {"tokens": [["Vamos", "nos", "mar"]], "tags": [["VERB", "PRON", "NOUN"]]}


def test_one_column_has_tokens_alone(tmp_path):
    assert read_conll(write(tmp_path, "It\nis\n\nso\n")).columns == {"tokens": [["It", "is"], ["so"]]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tO\nb\nc\tO\n", "line 2: 1 column, but the other lines have 2 (separated by tabs)"),
        ("a\tO\nb\tx\tO\nc\tO\n", "line 2: 3 columns, but the other lines have 2"),
        ("a\tO\n\tO\nc\tO\n", "line 2: there is no token in column 1"),
        ("a O\nb c O\nd O\n", "line 2: 3 columns, but the other lines have 2 (separated by spaces)"),
        ("a\tO\n#b\nc\tO\n", "line 2: 1 column, but"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, message):
    path = write(tmp_path, text + "\nd\tO\n".replace("\t", " " if "\t" not in text else "\t"))
    with pytest.raises(UserError) as caught:
        read_conll(path)
    assert message in str(caught.value) and "data.skip_bad=true" in str(caught.value)
    table = read_conll(path, skip_bad=True)
    assert table.columns["tokens"] == [["d"]] and message in table.skipped[0]


@pytest.mark.parametrize("text", ["", "\n\n", "-DOCSTART- O\n\n", "# nothing\n"])
def test_a_file_without_sentences(tmp_path, text):
    with pytest.raises(UserError, match="has no sentences"):
        read_conll(write(tmp_path, text))


def test_texts_in_a_file_for_tokens(tmp_path):
    with pytest.raises(UserError, match="for whole texts use a file of JSON lines"):
        read_conll(write(tmp_path, "a b c\nd e\nf g h\n", "a.txt"))
    with pytest.raises(UserError, match="does not exist"):
        read_conll(str(tmp_path / "none.conll"))


def test_pieces_hold_the_same(tmp_path):
    text = "".join(f"w{i}\tO\nx\tB-a\n\n" + ("bad\n\n" if i == 4 else "") for i in range(7))
    path = write(tmp_path, text)
    whole = read_conll(path, skip_bad=True)
    pieces = list(conll_pieces(path, "utf-8", True, (1, -1), 3))
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    assert [row for piece in pieces for row in piece.columns["tokens"]] == whole.columns["tokens"]
    assert [number for piece in pieces for number in piece.numbers] == whole.numbers
    assert [message for piece in pieces for message in piece.skipped] == list(whole.skipped)
