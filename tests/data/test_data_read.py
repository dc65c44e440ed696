"""Reading tables: each format against an independent reader or a table written out, mistakes by message."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from graftkit.data.read import SUFFIXES, Table, read_table
from graftkit.data.split import hold_out
from graftkit.errors import UserError

SHARED = Path(os.environ.get("GRAFTKIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
BANKING = SHARED / "data" / "banking77"
ROWS = {"text": ["a card", "a PIN"], "label": ["card", "pin"]}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def message(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_table(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.skipif(not BANKING.is_dir(), reason=f"no banking77 under {SHARED}")
@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_banking77_is_read_as_pandas_reads_it(name):
    table = read_table(BANKING / name)
    frame = pandas.read_csv(BANKING / name, dtype=str, keep_default_na=False)
    assert table.columns == {column: frame[column].tolist() for column in frame.columns}
    assert len(table) == len(frame)
    lines = (BANKING / name).read_text(encoding="utf-8").split("\n")
    for row in range(0, len(table), 97):
        start = table.columns["text"][row].split("\n")[0].replace('"', '""')
        assert start in lines[table.numbers[row] - 1]


def test_csv_is_read_as_pandas_reads_it_whatever_its_texts_hold(tmp_path):
    draw = random.Random(0)
    texts = ["".join(draw.choices('ab ,;"\n\té卡', k=draw.randrange(1, 12))) + "." for _ in range(300)]
    frame = pandas.DataFrame({"text": texts, "label": [str(row % 3) for row in range(300)]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = read_table(tmp_path / "t.csv")
    assert table.columns == {"text": texts, "label": frame["label"].tolist()}
    assert table.numbers == [2 + row + sum(text.count("\n") for text in texts[:row]) for row in range(300)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'text,label\na card,card\n\n"a PIN",pin\n'),
        ("t.csv", "text;label\na card;card\n\na PIN;pin"),
        ("t.csv", "text\tlabel\na card\tcard\n\na PIN\tpin\n"),
        ("T.TSV", "text\tlabel\na card\tcard\n\na PIN\tpin"),
        ("t.tab", 'text\tlabel\n"a card"\tcard\n\na PIN\tpin\n'),
        ("t.txt", "text\tlabel\na card\tcard\n\na PIN\tpin\n"),
    ],
)
def test_each_text_format_gives_the_same_table(tmp_path, name, content, mark, end):
    path = written(tmp_path, name, (mark + content).replace("\n", end))
    table = read_table(path)
    assert table == Table(ROWS, str(path), [2, 4], "line")
    assert table.where(1) == f"{path}, line 4"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.json"])
def test_json_lines(tmp_path, name, mark):
    lines = '{"text": "a card", "label": "card"}\n\n{"text": "a\u2028PIN", "other": 1}\n'
    table = read_table(written(tmp_path, name, mark + lines))
    assert table.columns == {
        "text": ["a card", "a\u2028PIN"],
        "label": ["card", None],
        "other": [None, 1],
    }
    assert (table.numbers, table.unit) == ([1, 3], "line")


def test_json_list_and_single_object(tmp_path):
    rows = [dict(zip(ROWS, values)) for values in zip(*ROWS.values())]
    table = read_table(written(tmp_path, "t.json", json.dumps(rows, indent=2)))
    assert (table.columns, table.numbers, table.unit) == (ROWS, [1, 2], "row")
    assert read_table(written(tmp_path, "o.json", '{"text": "a"}')).columns == {"text": ["a"]}
    assert "keys: data" in message(written(tmp_path, "d.json", json.dumps({"data": rows})))


def test_parquet_and_arrow(tmp_path):
    frame = pandas.DataFrame({**ROWS, "count": [1, None]}).iloc[::-1].iloc[::-1]
    arrow = pyarrow.Table.from_pandas(frame.set_index(pandas.Index([5, 9])))
    folder = tmp_path / "part=1"
    folder.mkdir()
    pyarrow.parquet.write_table(arrow, folder / "t.parquet")
    pyarrow.feather.write_feather(arrow, folder / "t.feather")
    with pyarrow.ipc.new_stream(folder / "t.arrow", arrow.schema) as stream:
        stream.write_table(arrow)
    for name in ("t.parquet", "t.feather", "t.arrow"):
        table = read_table(folder / name)
        assert table.columns == {**ROWS, "count": [1.0, None]}
        assert table.where(1) == f"{folder / name}, row 2"


def test_objects_in_memory():
    import datasets

    labelled = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, 0, -1]},
        features=datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        ),
    )
    assert read_table(labelled).columns["label"] == ["yes", "no", None]
    frame = pandas.DataFrame({"text": ["a", None], "label": [1, 2]}, index=[7, 8])
    assert read_table(frame).columns == {"text": ["a", None], "label": [1, 2]}
    given = {"text": ["a", "b"], "label": (1, 2)}
    table = read_table(given, name="train")
    assert table.where(0) == "train (in memory), row 1"
    table.columns["text"][0] = "changed"
    assert given["text"] == ["a", "b"]
    assert read_table([{"text": "a"}, {"label": 1}]).columns == {"text": ["a", None], "label": [None, 1]}
    split = datasets.DatasetDict({"train": labelled, "test": labelled})
    assert "splits: train, test" in message(split)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ([], "has no rows"),
        ({}, "has no rows"),
        ([{}], "no columns"),
        ([{"a": 1}, 2], "row 2: expected an object with named values, not a number"),
        ([{0: 1}], "not a string"),
        ({"a": [1], "b": [1, 2]}, "differ in length (a 1, b 2)"),
        ({"a": "text"}, "column 'a': a str where a list"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "columns 1 and 2 are both named 'a'"),
        (pandas.DataFrame([[1, 2]]), "not a string"),
        (3, "is a int. Hand over a path, a list of dicts"),
    ],
)
def test_objects_that_are_no_table(source, told):
    assert told in message(source)


def test_take_keeps_the_numbers(tmp_path):
    table = read_table(written(tmp_path, "t.csv", "a\n1\n\n2\n3\n")).take([2, 0])
    assert (table.columns, table.numbers, len(table)) == ({"a": ["3", "1"]}, [5, 2], 2)


def test_tsv_quotes(tmp_path):
    fields = ['"a ""b"" c"', '6" pipe', '"open', '"a" and "b"', '"', '"""', '""', "'x'"]
    table = read_table(written(tmp_path, "t.tsv", "a\tb\n" + "".join(f"{field}\t1\n" for field in fields)))
    assert table.columns["a"] == ['a "b" c', '6" pipe', '"open', '"a" and "b"', '"', '"""', "", "'x'"]


def test_long_field(tmp_path):
    assert len(read_table(written(tmp_path, "t.csv", f"a,b\n{'x' * 300_000},1\n")).columns["a"][0]) == 300_000


BAD_ROWS = [
    ("t.csv", "text,label\na,b\nc,d,e\nf,g\n", 3, "3 fields where the header has 2 (columns: text, label)"),
    ("t.csv", "text,label\na,b\nc\nf,g\n", 3, "1 field where the header has 2"),
    ("t.csv", 'text,label\n"a",b\n"c,d\nf,g\n', 3, "double quote opened here"),
    ("t.csv", 'text,label\na,b\n"c"x,d\nf,g\n', 3, "double quote opened here"),
    ("t.csv", 'text,label\na,b\nc,"d\nf,g\n', 3, "double quote opened here"),
    ("t.tsv", "text\tlabel\na\tb\nc\nf\tg\n", 3, "1 field where the header has 2"),
    (
        "t.jsonl",
        '{"text": "a"}\n\n{"text": "c"\n{"text": "f"}\n',
        3,
        "not JSON: Expecting ',' delimiter at column 13",
    ),
    (
        "t.jsonl",
        '{"text": "a"}\n\n["c"]\n{"text": "f"}\n',
        3,
        "expected an object with named values, not a list",
    ),
    (
        "t.json",
        '{"text": "a"}\n\n"c"\n{"text": "f"}\n',
        3,
        "expected an object with named values, not a string",
    ),
    ("t.jsonl", '{"text": "a"}\n\n{"text": "\\ud83d"}\n{"text": "f"}\n', 3, "surrogate"),
    ("t.jsonl", '{"text": "a"}\n\n' + "[" * 100_000 + '\n{"text": "f"}\n', 3, "not JSON"),
]


@pytest.mark.parametrize(("name", "content", "line", "told"), BAD_ROWS)
def test_a_bad_row_is_named_or_left_out(tmp_path, name, content, line, told):
    path = written(tmp_path, name, content)
    raised = message(path)
    assert raised.startswith(f"{path}, line {line}: ") and told in raised and "data.skip_bad=true" in raised
    table = read_table(path, skip_bad=True)
    assert table.columns["text"] == ["a", "f"]
    assert len(table.skipped) == 1
    assert table.skipped[0].startswith(f"{path}, line {line}: ") and told in table.skipped[0]


def test_a_quote_is_found_behind_a_good_field_of_several_lines(tmp_path):
    content = 'text,note,label\na,b,c\n"one\ntwo","open,x\nd,e,f\n'
    assert message(written(tmp_path, "t.csv", content)).startswith(f"{tmp_path / 't.csv'}, line 4: ")
    content = 'text,label\n"one\ntwo","th""ree"\n"open,x\nd,"e"\n'
    assert message(written(tmp_path, "t.csv", content)).startswith(f"{tmp_path / 't.csv'}, line 4: ")
    content = 'text,label\na,b\n"one\n2,3\nfour"\n'
    assert "a double quote makes lines 3 to 5 one row" in message(written(tmp_path, "t.csv", content))


def test_many_open_quotes_cost_only_their_rows(tmp_path):
    lines = [f'"open {row},x' if row % 10 == 0 else f"good {row},x" for row in range(1000)]
    table = read_table(written(tmp_path, "t.csv", "text,label\n" + "\n".join(lines) + "\n"), skip_bad=True)
    assert len(table.skipped) == 100
    assert table.columns["text"] == [f"good {row}" for row in range(1000) if row % 10]


def test_all_rows_bad(tmp_path):
    path = written(tmp_path, "t.csv", "a,b\n1\n2\n")
    told = message(path, skip_bad=True)
    assert "no good row: all 2 are bad" in told and f"{path}, line 2" in told


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("text,text", "line 1 (the header): columns 1 and 2 are both named 'text'"),
        (",text", "column 1 of 2 has no name (pandas"),
        ("text, ", "column 2 of 2 has no name"),
        ('text,"label', "line 1: the double quote opened here"),
    ],
)
@pytest.mark.parametrize("skip_bad", [True, False])
def test_bad_header(tmp_path, header, told, skip_bad):
    assert told in message(written(tmp_path, "t.csv", f"{header}\n1,2\n"), skip_bad=skip_bad)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf\n"])
def test_empty_file(tmp_path, suffix, content):
    told = message(written(tmp_path, f"t{suffix}", content))
    assert "is empty" in told or (suffix in (".parquet", ".arrow", ".feather") and "is not a whole" in told)


@pytest.mark.parametrize(
    ("name", "content"), [("t.csv", "text,label\n"), ("t.tsv", "text\tlabel"), ("t.json", "[]")]
)
def test_no_rows(tmp_path, name, content):
    told = message(written(tmp_path, name, content))
    assert "has no rows" in told
    assert ("columns: text, label" in told) == (name != "t.json")


def test_missing_file_folder_and_suffix(tmp_path):
    path = written(tmp_path, "train.csv", "a,b\n1,2\n")
    assert message(tmp_path / "trian.csv").endswith("trian.csv does not exist. Did you mean 'train.csv'?")
    assert "there is no folder" in message(tmp_path / "absent" / "train.csv")
    assert message(tmp_path).endswith("is a folder where a file should be. Name one of its files: train.csv")
    assert "(.csv, .tsv," in message(written(tmp_path, "train.xlsx", "a"))
    assert "no ending" in message(written(tmp_path, "train", "a"))
    assert "no tab in its first line" in message(written(tmp_path, "train.txt", "a text\n"))
    assert "cannot be read" in message(str(path) + "\0")
    assert "cannot be read" in message("x" * 5000 + ".csv")


def test_permission(tmp_path, monkeypatch):
    path = written(tmp_path, "t.csv", "a\n1\n")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert message(path).startswith(
        f"{path} may not be read by this user: change its permissions (chmod u+r)"
    )


CHINESE = "text,label\n" + "我的银行卡还没有到，请帮忙查一下,card\n" * 3
FRENCH = "text,label\nla carte n'est pas arrivée à l'hôtel où naïvement,card\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            CHINESE.encode("gb18030"),
            "byte 0xce at offset 11 (line 2) cannot be decoded. Perhaps data.encoding=gb18030",
        ),
        (
            FRENCH.encode("cp1252"),
            "Perhaps data.encoding=cp1252, which reads it as 'arte n'est pas arrivée",
        ),
        (FRENCH.encode("cp1252") + b"\x81 ,x\n", "data.encoding=latin-1"),
        ((CHINESE * 2).encode() + b"\xe6\x88,x\n", "The rest of the file is UTF-8"),
        (CHINESE.encode("utf-16"), "starts with the byte-order mark of utf-16. Set data.encoding=utf-16"),
        (CHINESE.encode("utf-32"), "data.encoding=utf-32"),
        ("text,label\na,b\n".encode("utf-16-le"), "looks like utf-16-le"),
        ("text,label\na,b\n".encode("utf-16-be"), "looks like utf-16-be"),
        (bytes(range(256)) * 4, "binary"),
        (b"\0" * 100, "not a text file"),
    ],
)
def test_other_encodings(tmp_path, content, told):
    assert told in message(written(tmp_path, "t.csv", content))


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("gb18030", ""),
        ("gb18030", "\ufeff"),
        ("big5", ""),
        ("utf-16", ""),
        ("utf-16-le", "\ufeff"),
        ("utf-8-sig", ""),
        ("UTF8", "\ufeff"),
    ],
)
def test_named_encoding(tmp_path, encoding, mark):
    path = written(tmp_path, "t.csv", (mark + "text,label\n卡,b\n").encode(encoding))
    assert read_table(path, encoding=encoding).columns == {"text": ["卡"], "label": ["b"]}


def test_wrong_or_unknown_encoding(tmp_path):
    path = written(tmp_path, "t.csv", CHINESE)
    assert "Try data.encoding=utf-8" in message(path, encoding="ascii")
    assert "Did you mean 'gb18030'?" in message(path, encoding="gb18003")
    for name in ("hex", "undefined", "", "\0"):
        assert "encoding" in message(path, encoding=name)


def test_broken_parquet_and_json_list(tmp_path):
    for suffix in (".parquet", ".arrow", ".feather"):
        assert "is not a whole" in message(written(tmp_path, f"t{suffix}", b"PAR1 nothing PAR1"))
    pyarrow.parquet.write_table(pyarrow.table(ROWS), tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    assert "is not a whole Parquet file" in message(written(tmp_path, "cut.parquet", whole[:-20]))
    told = message(written(tmp_path, "t.json", '[\n{"a": 1},\n{"a": }\n]'))
    assert "line 3: the list is not JSON: Expecting value at column 7" in told
    assert "row 2: expected an object" in message(written(tmp_path, "t.json", '[{"a": 1}, 3]'))


def test_hold_out_is_stratified_and_the_same_for_a_seed():
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 10 + ["alone"]
    train, held = hold_out(labels, 0.2, seed=3)
    assert sorted(train + held) == list(range(101)) and train == sorted(train) and held == sorted(held)
    assert [sum(labels[row] == name for row in held) for name in ("a", "b", "c", "alone")] == [12, 6, 2, 0]
    assert (train, held) == hold_out(labels, 0.2, seed=3) != hold_out(labels, 0.2, seed=4)


@pytest.mark.parametrize(
    "labels",
    [[0, 0], [0, 0, 1], [1.5, 2.5, 3.5, 0.1], [[1], [2]], [None, None, "a"], list("aabbccdd")],
)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_hold_out_leaves_rows_on_both_sides(labels, share):
    train, held = hold_out(labels, share, seed=0)
    assert train and held and sorted(train + held) == list(range(len(labels)))
    if isinstance(labels[0], str):
        assert {labels[row] for row in train} == set(labels)


def test_hold_out_takes_the_share_of_many_small_classes():
    labels = [row // 3 for row in range(300)]
    assert len(hold_out(labels, 0.1, seed=0)[1]) == 30
    assert max(hold_out(labels, 0.1, seed=0)[1]) > 200


def test_hold_out_never_takes_the_only_row_of_a_class():
    train, held = hold_out(["a", "b", "c", "d", "e", "e"], 0.5, seed=0)
    assert len(held) == 1 and held[0] in (4, 5) and len(train) == 5


@pytest.mark.parametrize(
    "labels, share",
    [([], 0.5), ([1], 0.5), ([0, 1], 0.5), (list("abcd"), 0.1), ([1, 1], 0.0), ([1, 1], 1), ([1, 1], -1)],
)
def test_hold_out_refuses(labels, share):
    with pytest.raises(UserError):
        hold_out(labels, share, seed=0)


def test_halves_of_surrogate_pairs_are_bad_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 fine", "label": 0}\n{"text": "\\uD83D alone", "label": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: .*half of a surrogate pair \(.ud83d\)"):
        read_table(str(path))
    table = read_table(str(path), skip_bad=True)
    assert table.columns["text"] == ["\U0001f600 fine"] and len(table.skipped) == 1
