"""`graftkit data check`: all problems of all files at once, with file and row, and what else should be known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_rows, write_csv
from task_cases import CASES, material

import graftkit
from graftkit.errors import UserError


@pytest.fixture
def bad(tmp_path):
    """train.csv, eval.csv and test.csv with several things wrong in each."""
    rows = make_rows(60, 1)
    rows[3]["text"], rows[9]["label"] = "", " "
    rows[12] = dict(rows[11])
    rows[14] = {"text": rows[13]["text"], "label": rows[12]["label"]}
    rows[14]["label"] = "tool" if rows[13]["label"] == "fruit" else "fruit"
    rows[20]["text"] = "the plum " * 60
    write_csv(tmp_path / "train.csv", [*rows, {"text": "the cat", "label": "animal"}])
    with (tmp_path / "train.csv").open("a") as file:
        file.write("only one\nx,y,z\n")
    write_csv(tmp_path / "eval.csv", [{"number": 1, "label": "fruit"}, {"number": 2, "label": "tool"}])
    test = make_rows(20, 2)
    test[2]["label"], test[7]["text"], test[5] = "frut", "", dict(rows[0])
    write_csv(tmp_path / "test.csv", test)
    return tmp_path


def places(findings: list[dict], name: str) -> list[str]:
    return [one["place"] for one in findings if one["data"] == name]


def test_all_problems_of_all_files_at_once(bad, tiny_bert, command):
    words = ["data", "check", "--model", tiny_bert]
    words += [word for name in ("train", "eval", "test") for word in (f"--{name}", bad / f"{name}.csv")]
    done = command(*words, "--json")
    found = json.loads(done.out)
    assert done.status == 1 and not found["ok"]
    assert places(found["problems"], "train") == ["line 5", "line 11", "line 63", "line 64"]
    assert places(found["problems"], "test") == ["line 4", "line 9"]
    (of_eval,) = [one for one in found["problems"] if one["data"] == "eval"]
    assert "no column" in of_eval["text"] and "eval.csv" in of_eval["text"]
    assert "Did you mean 'fruit'" in next(p["text"] for p in found["problems"] if p["place"] == "line 4")
    texts = [(one["data"], one["place"], one["text"]) for one in found["warnings"]]
    assert ("train", "line 14", "the same as line 13.") in texts
    assert any(place == "line 16" and "but here the label is" in text for _, place, text in texts)
    assert any(
        name == "test" and place == "line 7" and "train.csv, line 2" in text for name, place, text in texts
    )
    for told in ("1 of 59 rows are longer than 64 tokens", "animal", "macro F1"):
        assert any(told in text for _, _, text in texts), told
    assert found["rows"]["train"]["good"] == 59 and found["rows"]["test"]["bad"] == 2
    # no statistics of eval, whose column is missing; those of train count each label
    assert (
        set(found["statistics"]) == {"train", "test"}
        and found["statistics"]["train"]["labels"]["animal"] == 1
    )
    shown = command(*words)
    assert shown.status == 1 and "line 63: 1 field" in shown.out and "7 problems" in shown.out
    assert not list(bad.glob("run*"))


def test_nothing_wrong(rows_folder, tiny_bert, command):
    done = command("data", "check", "--train", rows_folder / "train.csv", "--test", rows_folder / "eval.csv")
    assert done.status == 0 and "no problems" in done.out and "96 good rows" in done.out
    found = graftkit.check(model=str(tiny_bert), train=make_rows(40), settings={"data.eval": 0.25})
    assert found.ok and found.statistics["train"]["rows"] == 30 and found.statistics["eval"]["rows"] == 10


def test_each_file_is_read_whatever_is_wrong_with_others(rows_folder, tmp_path, command):
    (tmp_path / "eval.csv").write_bytes(b"text,label\ncaf\xe9,fruit\n")
    done = command("data", "check", "--train", tmp_path / "nowhere.csv", "--eval", tmp_path / "eval.csv",
                   "--test", tmp_path / "test.xlsx", "--json")  # fmt: skip
    found = json.loads(done.out)
    assert [one["data"] for one in found["problems"]] == ["train", "eval", "test"] and done.status == 1
    assert "does not exist" in found["problems"][0]["text"] and "byte 0xe9" in found["problems"][1]["text"]


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        ([{"text": "a", "label": "x"}] * 3, {}, "only one class"),
        ([{"text": "a", "label": ""}] * 3, {}, "has no labels"),
        ([{"text": "", "label": "x"}, {"text": " ", "label": "y"}], {}, "column 'text' is empty"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], {"data.eval": 0.5}, "each class has only one row"),
        (make_rows(9), {"data.columns": {"text": "sentence"}}, "'sentence' is not in"),
        (make_rows(9), {"model": "nothing/here"}, "nothing/here"),
        (make_rows(9), {"model": "bert", "method": "lora(sites='nothing') + head()"}, "nothing"),
    ],
)  # fmt: skip
def test_problems_of_the_whole(rows, settings, told, tiny_bert):
    settings = {key: str(tiny_bert) if value == "bert" else value for key, value in settings.items()}
    found = graftkit.check(train=rows, settings={"data.eval": None, **settings})
    assert not found.ok and any(told in one.text for one in found.problems), found.problems


def test_a_recipe_that_is_wrong_itself(rows_folder):
    with pytest.raises(UserError, match="lable"):
        graftkit.check(train=rows_folder / "train.csv", settings={"data.lable": "x"})


def test_only_some_are_shown(tmp_path, command):
    rows = [{"text": "" if i % 2 else f"plum {i}", "label": "x" if i % 4 else "y"} for i in range(100)]
    done = command("data", "check", "--train", write_csv(tmp_path / "t.csv", rows))
    assert done.status == 1 and "and 30 more" in done.out and done.out.count("is empty") == 20
    found = json.loads(command("data", "check", "--train", tmp_path / "t.csv", "--json").out)
    assert len(found["problems"]) == 50


def test_strong_imbalance(tmp_path):
    rows = [{"text": f"plum {i}", "label": "x" if i else "y"} for i in range(50)]
    found = graftkit.check(train=rows)
    assert any("98.0%" in one.text for one in found.warnings)


def spoil(case: str, train: Path) -> str:
    """Make one row of a task's training rows bad; what is told of it."""
    if case == "image":
        (train / "red" / "0.png").write_bytes((train / "red" / "0.png").read_bytes()[:60])
        return "0.png"
    if case == "audio":
        next((train / "low").iterdir()).write_bytes(b"")
        return ".wav"
    if case == "span":
        data = json.loads(train.read_text())
        data["data"][1]["paragraphs"][0]["qas"][0]["answers"][0] = {
            "text": "no such words",
            "answer_start": 0,
        }
        train.write_text(json.dumps(data))
        return "no such words"
    lines = train.read_text().splitlines()
    row = json.loads(lines[4])
    row |= {"tags": ["O"]} if case == "tag" else {"completion": " "}
    train.write_text("\n".join([*lines[:4], json.dumps(row), *lines[5:]]) + "\n")
    return "line 5"


@pytest.mark.parametrize("case", ["tag", "span", "image", "audio", "generate"])
def test_every_task(case, tiny_bert, tmp_path):
    model, train = material(case, tmp_path, tiny_bert)
    task = CASES[case][0].partition("(")[0]
    given = {"task": task, "train": train, "settings": {"data.eval": 0.25}}
    found = graftkit.check(model=str(model), **given)
    assert found.ok, found.problems
    assert set(found.statistics) == {"train", "eval"} and found.statistics["train"]["rows"] > 0
    told = spoil(case, train)
    found = graftkit.check(**given)
    assert [told in f"{one.place} {one.text}" for one in found.problems] == [True], found.problems
    assert found.rows["train"]["bad"] == 1
