"""What people read of rows and mistakes."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

from graftkit import report
from graftkit.report.card import model_card
from graftkit.report.summary import mistake, statistics_lines
from graftkit.report.values import Subject
from graftkit.tasks.base import Task


def test_mistakes_in_words():
    row = {
        "where": "a/b.csv, line 3",
        "text": "a  long\ntext",
        "expected": ["x", "y"],
        "answer": "",
        "loss": 1.5,
    }
    assert mistake(row) == ("a/b.csv, line 3", "a long text", "x, y", "nothing")
    of_span = {
        "where": "q 1",
        "id": "7",
        "question": "who?",
        "expected": "x",
        "answer": "y",
        "f1": 0.5,
        "loss": 1.0,
    }
    assert mistake(of_span)[1] == "who?"
    long = mistake({"where": "w", "text": "x" * 500, "expected": None, "answer": {"label": "z"}})
    assert len(long[1]) == 120 and long[1].endswith("...") and long[2:] == ("nothing", "z")


def test_statistics_in_words():
    lengths = {"unit": "tokens", "sum": 1200, "mean": 12.0, "longest": 64}
    part = {
        "rows": 100, "lengths": lengths, "truncated": 1, "labels": {"a": 10, "b": 90}, "counted": "entities",
        "notes": ["tags are BIOES"], "windows": 120, "moved": 0,
        "answers": {"unit": "characters", "mean": 12.345, "longest": 1234},
    }  # fmt: skip
    assert statistics_lines(part) == [
        ("rows", "100"), ("sizes", "1,200 tokens, 12.0 a row, longest 64"), ("truncated", "1 row"),
        ("labels", "2: 10 (a) to 90 (b) entities each"),
        ("also", "windows 120, answers (characters) mean 12.35 longest 1,234"), ("note", "tags are BIOES"),
    ]  # fmt: skip
    also = {"rows": 9, "lengths": lengths, "truncated": 0, "labels": {"a": 1, "b": 1}}
    told = statistics_lines(also | {"choices": {"3": 0, "4": 1200}, "values": {"mean": 0.5, "lowest": 0.0}})
    assert ("labels", "2: 1 each") in told
    assert ("also", "choices: 4 (1,200), values: mean 0.5 lowest 0") in told
    assert ("labels", "2: 5 rows each") in statistics_lines(
        {"rows": 10, "lengths": lengths, "truncated": 0, "labels": {"a": 5, "b": 5}}
    )


def test_a_plan_and_a_card_say_what_the_rows_are_like(finished, tiny_bert, rows_folder, command):
    done = command("plan", "--model", tiny_bert, "--train", rows_folder / "train.csv", "data.eval=null")
    assert done.status == 0, done.err
    for told in ("longest", "48 training rows each", "padding"):
        assert told in done.out, told
    card = (finished / "README.md").read_text()
    assert "| train | 96 |" in card and "48 rows each" in card and "text in column `text`" in card


def test_few_rows_that_choose_the_weights_are_told(tiny_bert, rows_folder, command):
    words = ["plan", "--model", tiny_bert, "--train", rows_folder / "train.csv"]
    for more, told in (
        (["data.eval=0.1"], True),
        (["data.eval=0.1", "train.evaluate_every=end"], False),
        (["data.eval=null"], False),
        (["data.eval=0.6"], False),
    ):
        done = command(*words, *more)
        assert (
            done.status == 0 and ("rows are too few to select the best weights reliably" in done.out) == told
        ), more


def test_reports_are_made_of_plain_values():
    """They import the errors, the files below them and how a recipe is read, and no live object of a run, not even for type checkers."""
    folder = Path(report.__path__[0])
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("graftkit"):
                assert str(node.module).startswith(
                    (
                        "graftkit.report",
                        "graftkit.errors",
                        "graftkit.claims",
                        "graftkit.files",
                        "graftkit.recipe.values",
                    )
                ), path
            assert not (isinstance(node, ast.Name) and node.id == "TYPE_CHECKING"), path


SUBJECT = Subject(
    model="folder/model", model_class="SomeModel", plain=True, exports=True, task="watch()", task_name="watch",
    method="lora()", headline=("accuracy",), predict="--data FILE", data="films.csv", rows=12, skipped=1,
    columns={"film": "clip"}, labels=("a|b", "c"), batch_size=4, optimizer="adamw()",
    seed=3,
)  # fmt: skip
RESULT = {
    "run": "runs/x", "metrics": {}, "trained_parameters": 10, "total_parameters": 1000, "steps": 3, "precision": "fp32",
    "seconds": 2.0, "peak_memory_bytes": 5, "device": "cpu", "unused_parameters": [], "zero_gradient_parameters": [],
}  # fmt: skip


def test_a_card_of_any_subject():
    card = model_card(SUBJECT, RESULT, {}, [], {})
    assert "graftkit predict runs/x --data FILE\n" in card and "film in column `clip`" in card
    assert "12 training rows of `films.csv`" in card and "1 bad rows were skipped" in card
    assert "labels (2): a\\|b, c" in card and "SomeModel.from_pretrained('folder/model')" in card
    assert "3 steps of 4 rows with adamw(), fp32" in card
    assert "graftkit export runs/x" in card and "no rows to evaluate" in card
    own = replace(SUBJECT, model="package.module:make", plain=False, exports=False, method="", labels=())
    card = model_card(own, RESULT, {}, [], {})
    assert "from package.module import make" in card and "model = make().model" in card
    assert "graftkit export" not in card and "with the unmodified model" in card and "- task: watch" in card


def test_a_task_that_says_nothing_of_its_input_is_answered_from_files():
    assert Task().predict_arguments({"film": "clip"}) == "--data FILE"
    assert Task().made_up({"film": "clip"}, ("a", "b")) is None
