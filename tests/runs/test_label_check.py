"""`graftkit data check --labels` and `graftkit data fix`: from suspicious labels to a corrected file."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import KINDS, make_rows, tune_words, write_csv

import graftkit
from graftkit.errors import UserError
from graftkit.runs.fixing import fix

OTHER = {"fruit": "tool", "tool": "fruit"}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, tiny_bert):
    """train.csv with three wrong labels, test.csv with one, and with a row of train.csv; what is found, and its rows."""
    from typer.testing import CliRunner

    from graftkit.cli.main import app

    folder = tmp_path_factory.mktemp("wrong")
    rows = list({row["text"]: row for row in make_rows(240, 1)}.values())[:200]
    texts = [row["text"] for row in rows]
    for row in (10, 33, 60):
        rows[row]["label"] = OTHER[rows[row]["label"]]
    rows[70]["text"] = f"{rows[20]['text']}!"  # nearly the same
    rows[70]["label"] = rows[20]["label"]
    test = [row for row in make_rows(30, 2) if row["text"] not in texts][:20]
    test[4]["label"] = OTHER[test[4]["label"]]
    test[7] = {"text": f" {rows[5]['text']}", "label": rows[5]["label"]}
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "test.csv", test)
    words = ["data", "check", "--labels", "--model", str(tiny_bert), "--train", str(folder / "train.csv"), "--test",
             str(folder / "test.csv"), "--csv", str(folder / "suspects.csv"), "--html", str(folder / "rows.html"), "--json", "train.precision=fp32"]  # fmt: skip
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    return folder, json.loads(done.stdout), rows


def test_wrong_labels_come_first(wrong):
    folder, found, rows = wrong
    suspects = found["suspects"]
    scores = [one["score"] for one in suspects]
    assert scores == sorted(scores, reverse=True) and min(scores) >= 0.5 and max(scores) <= 1
    of_train = [one["row"] for one in suspects if one["data"] == "train"]
    assert {10, 33, 60} <= set(of_train[:16])  # 8% of the rows
    assert any(one["data"] == "test" for one in suspects)
    one = next(one for one in suspects if one["row"] == 33 and one["data"] == "train")
    assert one["file"] == str(folder / "train.csv") and one["line"] == 35 and one["text"] == rows[33]["text"]
    assert one["given"] == rows[33]["label"] and one["suggested"] == OTHER[one["given"]]
    assert len(one["nearest"]) == 3 and 33 not in one["nearest"]
    assert [near["text"] for near in one["nearest_rows"]] == [rows[near]["text"] for near in one["nearest"]]
    assert found["ok"] and "outliers" in found


def test_a_page_shows_what_was_found(wrong, command, tiny_bert, tmp_path):
    folder, found, rows = wrong
    page = (folder / "rows.html").read_text(encoding="utf-8")
    told = (f"Labels that are likely wrong: {len(found['suspects'])}", "Rows in two parts of the data", "Rows that occur twice",
            "train.csv, line 35", rows[33]["text"], "test.csv, line 9, the same as train.csv, line 7")  # fmt: skip
    for text in told:
        assert text in page, text
    near = next(one for one in found["duplicates"] if one["kind"] == "near")
    assert f"similarity {near['similarity']:.3f} to train.csv, line {near['of']['line']}" in page
    bad = write_csv(tmp_path / "train.csv", [*rows[:4], {"text": "", "label": "<i>"}])
    done = command("data", "check", "--train", bad, "--html", tmp_path / "problems.html")
    page = (tmp_path / "problems.html").read_text(encoding="utf-8")
    assert (
        done.status == 1
        and "Problems: 1" in page
        and "is empty" in page
        and "<i>" not in page
        and "Labels to check" not in page
    )
    (tmp_path / "notes.html").write_text("mine")
    refused = command("data", "check", "--train", bad, "--html", tmp_path / "notes.html")
    assert refused.status == 1 and "is not a report of GraftKit" in refused.err and not refused.out
    assert (tmp_path / "notes.html").read_text() == "mine"


def test_leaks_and_near_duplicates(wrong):
    _, found, _ = wrong
    (leak,) = [one for one in found["leaks"] if one["kind"] == "exact"]
    assert (leak["data"], leak["row"], leak["of"]["data"], leak["of"]["row"]) == ("test", 7, "train", 5)
    assert leak["same_label"] and leak["similarity"] == 1
    near = [one for one in found["duplicates"] if one["kind"] == "near"]
    assert (70, 20) in [(one["row"], one["of"]["row"]) for one in near]
    assert all(one["row"] > one["of"]["row"] for one in near)


def test_from_the_csv_to_a_corrected_file(wrong, tmp_path, command):
    folder, found, rows = wrong
    listed = read_csv(folder / "suspects.csv")
    assert [int(one["line"]) for one in listed] == [one["line"] for one in found["suspects"]]
    assert all(one["label"] == one["given"] for one in listed)
    assert listed[0]["nearest"].count("\n") == 2 and listed[0]["nearest"].startswith(("fruit: ", "tool: "))
    for one in listed:
        if one["file"].endswith("train.csv") and one["row"] in ("10", "60"):
            one["label"] = one["suggested"]
        elif one["file"].endswith("train.csv") and one["row"] == "33":
            one["label"] = ""
    write_csv(tmp_path / "corrected.csv", listed)
    before = (folder / "train.csv").read_bytes()
    done = command("data", "fix", "corrected.csv", "--out", "new.csv", "--json")
    assert done.status == 0 and json.loads(done.out)["changed"] == 2 and json.loads(done.out)["left_out"] == 1
    expected = [dict(row) for row in rows]
    for row in (10, 60):
        expected[row]["label"] = OTHER[rows[row]["label"]]
    del expected[33]
    assert read_csv(tmp_path / "new.csv") == expected and (folder / "train.csv").read_bytes() == before
    again = command("data", "fix", "corrected.csv", "--out", "new.csv")
    assert again.status == 1 and "new.csv exists already" in again.err
    shown = command("data", "fix", "corrected.csv", "--out", "test.csv", "--file", folder / "test.csv")
    assert "0 labels changed and 0 rows left out" in shown.out
    assert (tmp_path / "test.csv").read_bytes() == (folder / "test.csv").read_bytes()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"label": "frut"},
            "corrected.csv, line 2: label 'frut' is not among the 2 labels of .*Did you mean 'fruit'",
        ),
        ({"line": "3", "label": "tool"}, "line 3 of .* has the label"),
        ({"sha256": "0", "label": "tool"}, "has changed since its labels were checked"),
        ({"line": "", "label": "tool"}, "has the labels of files in folders .* Move each file"),
        ({"column": "", "label": "tool"}, "are in several columns"),
        ({"column": "lable", "label": "tool"}, "has no column 'lable'"),
        ({"file": "nowhere.csv", "label": "tool"}, "nowhere.csv does not exist"),
    ],
)
def test_corrections_that_cannot_be_applied(wrong, tmp_path, change, told):
    folder, _, _ = wrong
    one = next(
        one for one in read_csv(folder / "suspects.csv") if one["given"] == "fruit" and one["line"] != "3"
    )
    write_csv(tmp_path / "corrected.csv", [one | change])
    with pytest.raises(UserError, match=told):
        fix(tmp_path / "corrected.csv", tmp_path / "new.csv")
    assert not (tmp_path / "new.csv").exists()


def test_a_file_that_changed_since(wrong, tmp_path, command):
    folder, _, _ = wrong
    shutil.copy(folder / "train.csv", tmp_path / "train.csv")
    listed = [one for one in read_csv(folder / "suspects.csv") if one["file"].endswith("train.csv")]
    write_csv(
        tmp_path / "c.csv", [one | {"file": "train.csv", "label": OTHER[one["given"]]} for one in listed]
    )
    with (tmp_path / "train.csv").open("a") as file:
        file.write("the plum,fruit\n")
    done = command("data", "fix", "c.csv", "--out", "new.csv")
    assert done.status == 1 and "train.csv has changed since its labels were checked for c.csv" in done.err
    assert not (tmp_path / "new.csv").exists()


def test_other_mistakes(wrong, tmp_path, command):
    folder, _, _ = wrong
    listed = read_csv(folder / "suspects.csv")
    write_csv(tmp_path / "two.csv", [one | {"label": OTHER[one["given"]]} for one in listed])
    assert "has labels of 2 files" in command("data", "fix", "two.csv", "--out", "new.csv").err
    more = command("data", "fix", "two.csv", "--out", "new.csv", "--file", "train.csv")
    assert "has no labels of 'train.csv'" in more.err
    asked = ("data", "fix", "two.csv", "--out", "new.jsonl", "--file", folder / "train.csv")
    assert "another format" in command(*asked).err
    write_csv(tmp_path / "plain.csv", make_rows(3))
    assert "has no column 'file'" in command("data", "fix", "plain.csv", "--out", "new.csv").err
    train = ("--train", folder / "train.csv")
    assert "needs --labels" in command("data", "check", *train, "--csv", "s.csv").err
    assert "name one with --model" in command("data", "check", *train, "--labels").err
    there = command("data", "check", *train, "--labels", "--csv", "two.csv", "--model", "nothing/here")
    assert there.status == 1 and "two.csv exists already" in there.err


@pytest.mark.parametrize("kind", ["semicolons", "tsv", "jsonl", "json", "parquet"])
def test_every_format_keeps_what_is_not_changed(kind, tmp_path):
    rows = [
        {"text": 'a "quoted", text\nof two lines', "label": 0, "more": "1; 2"},
        {"text": "b", "label": 1, "more": "é"},
    ]
    rows += [{"text": "c", "label": 0, "more": ""}, {"text": "d", "label": 1, "more": "x"}]
    if kind in ("tsv", "semicolons"):
        rows[0]["text"] = "a 'quoted' text"
    ending = {"semicolons": "csv"}.get(kind, kind)
    path, new = tmp_path / f"rows.{ending}", tmp_path / f"new.{ending}"
    lines = [2, 3, 4, 5]
    if kind in ("json", "parquet", "jsonl"):
        lines = [1, 2, 3, 4]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind in ("json", "jsonl"):
        path.write_text(
            json.dumps(rows) if kind == "json" else "".join(f"{json.dumps(row)}\n" for row in rows)
        )
    else:
        mark, start = (";", "\ufeff") if kind == "semicolons" else ("\t", "")
        cells = [
            ["text", "label", "more"],
            *([str(v).replace("; ", " ") for v in row.values()] for row in rows),
        ]
        path.write_bytes((start + "".join(mark.join(line) + "\r\n" for line in cells)).encode())
    from graftkit.runs.fixing import digest_of

    shared = {"file": str(path), "column": "label", "sha256": digest_of(path)}
    listed = [
        {**shared, "line": lines[1], "given": 1, "label": 0},
        {**shared, "line": lines[2], "given": 0, "label": ""},
    ]
    write_csv(tmp_path / "corrected.csv", listed)
    assert fix(tmp_path / "corrected.csv", new)["changed"] == 1
    if kind in ("tsv", "semicolons"):
        before, after = path.read_bytes().split(b"\r\n"), new.read_bytes().split(b"\r\n")
        mark = b";" if kind == "semicolons" else b"\t"
        assert after == [*before[:2], before[2].replace(mark + b"1" + mark, mark + b"0" + mark), *before[4:]]
        return
    expected = [rows[0], {**rows[1], "label": 0}, rows[3]]
    if kind == "parquet":
        assert pyarrow.parquet.read_table(new).to_pylist() == expected
    else:
        text = new.read_text()
        assert (json.loads(text) if kind == "json" else [*map(json.loads, text.splitlines())]) == expected


def test_every_run_tells_of_leaks(tiny_bert, tmp_path, command):
    rows = make_rows(40, 1)
    texts = {row["text"] for row in rows}
    held = [row for row in make_rows(30, 2) if row["text"] not in texts][:12]
    held[3] = {"text": f"{rows[7]['text']}  ", "label": rows[7]["label"]}
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "eval.csv", held)
    words = tune_words(tiny_bert, tmp_path, tmp_path / "run", "train.steps=1")
    done = command(*words)
    told = "LEAK: 1 of 12 evaluation rows is also among the training rows"
    assert done.status == 0 and told in " ".join((done.out + done.err).split())
    assert any(
        told in text for text in json.loads((tmp_path / "run" / "result.json").read_text())["warnings"]
    )
    doubled = [*rows[:20], *rows[:20]]
    run = graftkit.tune(model=str(tiny_bert), train=doubled, method="head()", out=tmp_path / "held",
                        settings={"train.steps": 1, "data.eval": 0.5})  # fmt: skip
    assert "Remove the duplicates" in run.result["warnings"][0]


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("span", "labels of span.. cannot be checked: it answers with a part of a text"),
        ("generate", "labels of generate.. cannot be checked: it trains no head"),
        ("classify(kind='regression')", "its rows have no labels of a fixed set"),
        ("choice", "its rows have no labels of a fixed set"),
    ],
)
def test_tasks_without_classes_are_refused(task, told, tiny_bert):
    rows = [{"text": f"plum {i}", "label": i, "question": "a", "choices": ["x", "y"]} for i in range(9)]
    if task == "choice":
        rows = [row | {"label": i % 2} for i, row in enumerate(rows)]
    with pytest.raises(UserError, match=told):
        graftkit.label_errors(model=str(tiny_bert), task=task, train=rows)


def test_features_that_are_not_finite_name_the_row(tiny_bert, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_bert, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights["encoder.layer.2.output.LayerNorm.bias"][3] = 3e38
    weights["encoder.layer.2.output.LayerNorm.weight"][3] = 3e38
    save_file(weights, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"train \(in memory\), row \d+: .* not finite"):
        graftkit.label_errors(
            model=str(tmp_path / "bad"), train=make_rows(30, 1), settings={"train.precision": "fp32"}
        )


def test_images_and_sets_of_labels(colours, tiny_vit, tiny_bert, tmp_path):
    shutil.copytree(colours / "train", tmp_path / "train")
    moved = sorted((tmp_path / "train" / "red").iterdir())[0]
    moved.rename(tmp_path / "train" / "blue" / f"moved{moved.suffix}")
    found = graftkit.label_errors(model=str(tiny_vit), task="image_classify", train=str(tmp_path / "train"))
    one = next(one for one in found["suspects"] if "moved" in one["file"])
    assert (
        one["line"] is None
        and one["given"] == "blue"
        and one["suggested"] == "red"
        and len(one["nearest"]) == 3
    )
    rows = [
        row | {"label": [row["label"], "x"] if i % 3 else [row["label"]]}
        for i, row in enumerate(make_rows(60, 1))
    ]
    rows[9]["label"] = ["fruit" if "tool" in rows[9]["label"] else "tool"]
    found = graftkit.label_errors(model=str(tiny_bert), task="classify(kind='multi')", train=rows)
    one = next(one for one in found["suspects"] if one["row"] == 9)
    assert one["given"] == rows[9]["label"] and one["suggested"] != one["given"]


def test_words_with_wrong_tags(tiny_bert, tmp_path):
    names = {"fruit": "B-F", "tool": "B-T"}
    rows = []
    for row in make_rows(80, 1):
        words = row["text"].split()
        rows.append(
            {
                "tokens": words,
                "tags": [names[row["label"]] if word in KINDS[row["label"]] else "O" for word in words],
            }
        )
    rows[0] = {
        "tokens": [word for row in rows[1:9] for word in row["tokens"]],
        "tags": [tag for row in rows[1:9] for tag in row["tags"]],
    }
    wrong = {}
    for row in (0, 20, 33):
        at = max(i for i, tag in enumerate(rows[row]["tags"]) if tag != "O")
        wrong[row] = rows[row]["tokens"][at], rows[row]["tags"][at]
        rows[row]["tags"][at] = {"B-F": "B-T", "B-T": "B-F"}[rows[row]["tags"][at]]
    settings = {"data.max_length": 24, "train.precision": "fp32"}  # row 0 is read in parts
    found = graftkit.label_errors(
        model=str(tiny_bert),
        task="tag",
        train=rows,
        test=rows[40:],
        settings=settings,
        html=tmp_path / "rows.html",
    )
    first = [one for one in found["suspects"] if one["data"] == "train"][:10]
    for row, (word, tag) in wrong.items():
        one = next(one for one in first if one["row"] == row and one["word"] == word)
        assert one["given"] != tag and " ".join(rows[row]["tokens"])[one["start"] : one["end"]] == word
        assert len(one["nearest"]) == 3 and one["nearest_rows"][0]["word"] == word
        assert one["nearest_rows"][0]["label"] == tag and word in rows[one["nearest"][0]]["tokens"]
    assert any(pair["data"] == "test" and pair["of"]["row"] == 40 for pair in found["leaks"])
    page = (tmp_path / "rows.html").read_text()
    assert f"<strong>{wrong[20][0]}</strong>" in page and "Labels that are likely wrong" in page


def test_shown_in_the_terminal(wrong, tiny_bert, command):
    folder, found, _ = wrong
    done = command("data", "check", "--labels", "--model", tiny_bert, "--train", folder / "train.csv")
    count = len([one for one in found["suspects"] if one["data"] == "train"])
    assert done.status == 0 and f"Labels that another one fits better: {count}" in done.out
    assert "line 35: " in done.out and ", or " in done.out and "nearly the same as" in done.out
