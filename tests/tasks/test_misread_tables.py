"""Tables that could be read as something they are not: vectors, lists and files without a header."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_rows

from graftkit.data.columns import find_columns
from graftkit.data.read import read_table
from graftkit.errors import UserError
from graftkit.runs.check import check
from graftkit.tasks.classify.task import Classify

VECTORS = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]] * 6


def table_of(labels: list) -> tuple:
    table = read_table([{"text": f"text {i}", "labels": label} for i, label in enumerate(labels)])
    return table, {"text": "text", "label": "labels"}


def names(task: Classify, labels: list, skip_bad: bool = False) -> tuple[str, ...]:
    return task.label_names(*table_of(labels), skip_bad)


@pytest.mark.parametrize("form", [
    list, tuple, np.array, lambda row: [bool(value) for value in row], lambda row: [float(value) for value in row], str,
    lambda row: ";".join(map(str, row)),
])  # fmt: skip
def test_vectors_are_no_sets_of_the_labels_0_and_1(form):
    rows = [form(row) for row in VECTORS]
    with pytest.raises(
        UserError, match=r"row 1.*value (0|False) more than once.*3 values of 0 and 1.*indicators="
    ):
        names(Classify(kind="multi"), rows)


@pytest.mark.parametrize("form", [list, np.array, str])
def test_indicators_name_the_places_of_vectors(form):
    task = Classify(kind="multi", indicators=["cat", "old", "new"])
    table, _ = table_of([form(row) for row in VECTORS])
    columns = task.used(find_columns(table, task.columns, {}), {}, table)
    labels = task.label_names(table, columns, False)
    assert labels == ("cat", "old", "new")
    assert task.examples(table, columns, labels, False).targets.tolist() == VECTORS


@pytest.mark.parametrize("bad", [[1, 0], [1, 0, 2], None, "cat"])
def test_a_vector_of_another_form_is_a_bad_row(bad):
    task = Classify(kind="multi", indicators=["cat", "old", "new"])
    table, columns = table_of([*VECTORS, bad])
    with pytest.raises(UserError, match=r"row 25: column 'labels' is .*a list of 3 values"):
        task.examples(table, columns, ("cat", "old", "new"), False)
    assert len(task.examples(table, columns, ("cat", "old", "new"), True)) == 24


def test_columns_of_indicators_win_over_a_column_of_labels():
    task = Classify(kind="multi", indicators=["cat", "old"])
    table = read_table(
        [{"text": "a", "labels": "x", "cat": 1, "old": 0}, {"text": "b", "labels": "y", "cat": 0, "old": 1}]
    )
    columns = task.used(find_columns(table, task.columns, {}), {}, table)
    assert columns == {"text": "text"}
    assert task.examples(table, columns, ("cat", "old"), False).targets.tolist() == [[1, 0], [0, 1]]


def test_a_label_twice_in_a_set_is_a_bad_row():
    table, columns = table_of([["a", "b"], ["b"], ["a", "c", "a"], "b; b"])
    task = Classify(kind="multi")
    with pytest.raises(UserError, match=r"row 3: column 'labels' has 'a' more than once"):
        task.examples(table, columns, ("a", "b", "c"), False)
    kept = task.examples(table, columns, ("a", "b", "c"), True)
    assert len(kept) == 2 and len(kept.skipped) == 2


@pytest.mark.parametrize("several", [[1, 0, 0], ["a"], {"a": 1}, np.array([0, 1])])
def test_a_list_is_no_label(several):
    labels = [*("a", "b") * 10, several]
    with pytest.raises(
        UserError, match=r"row 21: column 'labels' is a (list|mapping).*one label is expected"
    ):
        names(Classify(), labels)
    assert names(Classify(), labels, skip_bad=True) == ("a", "b")
    table, columns = table_of(labels)
    assert len(Classify().examples(table, columns, ("a", "b"), True)) == 20


@pytest.mark.parametrize(("first", "seen"), [
    ("the apple is new,fruit", "'fruit' is also the value of"),
    ("a very long text about one rare thing,rare", "reads like one of its texts"),
    ("short,3", "'3' is a number"),
])  # fmt: skip
def test_a_file_without_a_header(tmp_path, first, seen):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([first, *(f"{row['text']},{row['label']}" for row in make_rows(30))]))
    problems = [one.text for one in check(train=path).problems]
    assert len(problems) == 1 and seen in problems[0] and "seems to have no header" in problems[0]
    head = first.split(",")
    named = check(train=path, settings={"data.columns": dict(zip(("text", "label"), head))})
    assert named.ok, "who names the columns says that it is a header"


def test_names_that_are_none_of_the_rows_stay_names(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "\n".join(["what was said,kind", *(f"{row['text']},{row['label']}" for row in make_rows(30))])
    )
    assert check(train=path).ok
