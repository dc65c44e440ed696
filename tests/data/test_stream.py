"""Files in pieces: the rows, numbers and messages of the whole; answers that are written as they come."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from conftest import FILLER, make_rows, write_csv

from graftkit.data import stream
from graftkit.data.read import read_table
from graftkit.data.stream import stream_table
from graftkit.errors import UserError
from graftkit.runs.predict import Answers, predict, predict_into

pytestmark = pytest.mark.slow

PARTS = {
    "csv": ["a", ",", '"', "\n", "\n", "\r\n", "\r", " ", '""', "a,b\n", "x,y\n", '"x,y"', "é", ";", "\x0b"],
    "tsv": ["a", "\t", '"', "\n", "\n", "\r\n", "\r", " ", "a\tb\n", "é", "\x0b"],
    "jsonl": [
        '{"a": 1}',
        '{"a": "x", "b": 2}',
        "\n",
        "\n",
        "\n",
        "[1]",
        "{",
        '"\\ud800"',
        '{"a": "\\ud800"}',
    ],
}


def told(work):
    try:
        return work()
    except UserError as error:
        return str(error)


def whole(path: Path, **more):
    table = read_table(path, **more)
    return table.columns, table.numbers, table.unit, table.skipped


def joined(path: Path, rows: int = 3, **more):
    columns, numbers, skipped, unit = {}, [], [], ""
    for table in stream_table(path, rows=rows, **more):
        assert len(table) <= rows
        for name, values in table.columns.items():
            columns.setdefault(name, [None] * len(numbers)).extend(values)
        numbers += table.numbers
        skipped += table.skipped
        unit = table.unit
    return columns, numbers, unit, tuple(skipped)


@pytest.mark.parametrize("kind", PARTS)
def test_pieces_are_the_whole(kind, tmp_path, monkeypatch):
    """Random files, broken ones among them: the same rows, lines, left-out rows and errors."""
    monkeypatch.setattr(stream, "BLOCK", 4096)
    draw = random.Random(0)
    path = tmp_path / f"rows.{kind}"
    for number in range(120):
        text = draw.choice(["", "a,b\n", "a\tb\n"]) + "".join(
            draw.choices(PARTS[kind], k=draw.randint(1, 40))
        )
        text *= 600 if number % 40 == 0 else 1
        encoding = draw.choice(["utf-8", "utf-8", "utf-16", "gb18030"])
        path.write_bytes(text.encode(encoding))
        for skip_bad in (False, True):
            given = {"encoding": encoding, "skip_bad": skip_bad}
            assert told(lambda: joined(path, **given)) == told(lambda: whole(path, **given)), repr(text)  # noqa: B023


def test_a_wrong_byte_far_behind_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    lines = [f"{i},some text here\n" for i in range(60_000)]
    raw = ("a,b\n" + "".join(lines)).encode()
    path.write_bytes(raw + b"1,caf\xe9 and so on\n" + raw)
    pieces = stream_table(path)
    next(pieces)
    with pytest.raises(UserError, match=rf"byte 0xe9 at offset {len(raw) + 5} \(line 60002\)"):
        list(pieces)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "stream", "json"])
def test_batches_and_lists(kind, tmp_path):
    rows = [{"text": f"row {i}", "label": ["a", "b"][i % 2], "tokens": ["x"] * (i % 3)} for i in range(20)]
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / f"rows.{'arrow' if kind == 'stream' else kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "stream":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=8)
    else:
        pyarrow.feather.write_feather(table, path, compression="uncompressed", chunksize=6)
    assert joined(path) == whole(path) and len(whole(path)[1]) == 20
    if kind != "json":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert "not a whole" in told(lambda: joined(path)) and "rows." in told(lambda: joined(path))


@pytest.mark.parametrize(
    "name", ["missing.csv", "rows.xlsx", "empty.csv", "blank.jsonl", "header.csv", "plain.txt"]
)
def test_the_same_errors(name, tmp_path):
    for file, text in {"rows.xlsx": "x", "empty.csv": "", "blank.jsonl": " \n", "header.csv": "a,b\n",
                       "plain.txt": "no tab\n"}.items():  # fmt: skip
        (tmp_path / file).write_text(text)
    path = tmp_path / name
    assert told(lambda: joined(path)) == told(lambda: whole(path)) and isinstance(
        told(lambda: whole(path)), str
    )


@pytest.mark.slow
def test_answers_in_pieces_are_those_of_the_whole(finished, rows_folder):
    data = rows_folder / "eval.csv"
    at_once, pieces = predict(finished, data), list(Answers(finished, data, rows=7))
    assert len(pieces) == 40 and [len(p) for p in Answers(finished, data, rows=16).pieces()] == [16, 16, 8]
    for left, right in zip(at_once, pieces):
        assert abs(left.pop("probability") - right.pop("probability")) < 2e-4
        assert left == right
    table = [{"text": "a plum"}, {"text": "the saw"}, {"text": "the pear"}]
    assert [row["row"] for row in Answers(finished, table, rows=2)] == [1, 2, 3]


def bad_file(path: Path, count: int) -> Path:
    """Rows of which every tenth has an empty text."""
    rows = make_rows(count)
    return write_csv(
        path, [{**row, "text": "" if i % 10 == 9 else row["text"]} for i, row in enumerate(rows)]
    )


@pytest.fixture(scope="module")
def lenient(finished, tmp_path_factory) -> Path:
    """The finished run, that leaves bad rows out."""
    import shutil

    run = tmp_path_factory.mktemp("lenient") / "run"
    shutil.copytree(finished, run)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("skip_bad: false", "skip_bad: true"))
    return run


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_answers_are_written_as_they_come(suffix, lenient, tmp_path):
    data, out = bad_file(tmp_path / "rows.csv", 50), tmp_path / f"answers{suffix}"
    done = predict_into(lenient, data, out, rows=8)
    assert done["rows"] == 45 and done["skipped"] == 5 and "line 11" in done["skipped_rows"][0]
    if suffix == ".jsonl":
        found = [json.loads(line) for line in out.read_text().splitlines()]
    elif suffix == ".parquet":
        found = pyarrow.parquet.read_table(out).to_pylist()
    else:
        with out.open(newline="") as file:
            found = list(csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t"))
    expected = predict(lenient, data)
    assert [str(row["row"]) for row in found] == [str(row["row"]) for row in expected]
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [path.name for path in tmp_path.iterdir() if path != data] == [out.name]


def test_pieces_of_bad_rows_alone(lenient, tmp_path):
    rows = [{"text": " ", "label": "fruit"}] * 8
    data = write_csv(tmp_path / "rows.csv", [*rows, *make_rows(4), *rows])
    answers = Answers(lenient, data, rows=4)
    assert [row["row"] for row in answers] == [10, 11, 12, 13] and answers.skipped == 16
    with pytest.raises(UserError, match="no good rows"):
        list(Answers(lenient, write_csv(tmp_path / "bad.csv", rows), rows=4))


def test_nothing_is_left_where_reading_fails_in_the_middle(finished, tmp_path, command):
    data = tmp_path / "rows.csv"
    write_csv(data, make_rows(40))
    data.write_text(data.read_text() + "one field\n")
    with pytest.raises(UserError, match="line 42: 1 field"):
        predict_into(finished, data, tmp_path / "answers.csv", rows=8)
    done = command("predict", finished, "--data", data, "--out", tmp_path / "answers.parquet")
    assert done.status == 1 and "line 42" in done.err
    (tmp_path / "old.jsonl").write_text("kept")
    done = command("predict", finished, "--data", data, "--out", tmp_path / "old.jsonl", "--overwrite")
    assert done.status == 1 and (tmp_path / "old.jsonl").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.jsonl", "rows.csv"]


def test_counts_alone_where_answers_go_into_a_file(finished, rows_folder, tmp_path, command):
    done = command("predict", finished, "--data", rows_folder / "eval.csv", "--out", "a.jsonl", "--json")
    found = json.loads(done.out)
    assert found["rows"] == 40 and found["skipped"] == 0 and "predictions" not in found


def test_cells_are_json_where_they_are_lists(tmp_path):
    from graftkit.report.table import writing

    rows = [{"row": 1, "entities": [{"text": "Zoë", "start": 0}]}, {"row": 2, "entities": []}]
    with writing(tmp_path / "a.csv") as write:
        write(rows)
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [json.loads(row["entities"]) for row in csv.DictReader(file)] == [
            row["entities"] for row in rows
        ]
    for name in ("b.csv", "b.parquet"):
        with pytest.raises(UserError, match=r"\.jsonl"), writing(tmp_path / name) as write:
            write([{"row": 1}])
            write([{"row": "x", "more": 2}])
    assert not (tmp_path / "b.csv").exists() and not (tmp_path / "b.parquet").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(finished, tmp_path, monkeypatch):
    """What Python and NumPy hold while 500 rows and five times as many are answered."""
    import tracemalloc

    def peak(count: int, kind: str) -> int:
        path = tmp_path / f"rows-{count}.{kind}"
        with path.open("w") as file:
            if kind == "csv":
                file.write("text,label\n")
            for i in range(count):
                text = f"{FILLER[i % 12]} plum " * 3
                file.write(f"{text},fruit\n" if kind == "csv" else json.dumps({"text": text}) + "\n")
        tracemalloc.start()
        try:
            done = predict_into(run, path, tmp_path / f"answers-{count}-{kind}.csv", rows=125)
            assert done["rows"] == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    run = shutil.copytree(finished, tmp_path / "run")
    (run / "graft" / "confidence.safetensors").unlink()  # which is fitted to outputs of the model
    # the model would take a minute for so many rows: any answer does
    monkeypatch.setattr("graftkit.runs.predict.run_predict", lambda dataset, *_: [[0.0, 1.0]] * len(dataset))
    monkeypatch.setattr(stream, "BLOCK", 1 << 14)
    for kind in ("csv", "jsonl"):
        peak(125, kind)  # what is loaded once
        small, large = peak(500, kind), peak(2_500, kind)
        assert large < 1.2 * small + 1e5, (kind, small, large)
