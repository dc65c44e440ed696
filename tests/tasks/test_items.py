"""What is wrong with an item of a list that is handed to `predict` is told with its position."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graftkit.errors import UserError
from graftkit.runs.predict import Answers
from graftkit.tasks.choice import Choice
from graftkit.tasks.classify.task import Classify
from graftkit.tasks.generate.task import Generate
from graftkit.tasks.shared.items import check_items
from graftkit.tasks.span.task import Span
from graftkit.tasks.tag.rows import Unfit, read_sentence


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
@pytest.mark.parametrize(("item", "told"), [
    (None, r"item 2 of 3 is missing \(None\)"), (math.nan, r"item 2 of 3 is missing \(nan\)"),
    (np.float32("nan"), r"item 2 of 3 is missing \(nan\)"), (3, "item 2 of 3 is the number 3, not an? "),
    (2.5, "item 2 of 3 is the number 2.5"), (True, "item 2 of 3 is the number True"),
    ({"text": "x"}, "item 2 of 3 is a dict, but the first is a str"),
])  # fmt: skip
def test_items(modality, item, told):
    with pytest.raises(UserError, match=told):
        check_items(["a", item, "b"], modality)


def test_missing_values_of_pandas():
    pandas = pytest.importorskip("pandas")
    for missing in (pandas.NA, pandas.NaT):
        with pytest.raises(UserError, match="item 2 of 2 is missing"):
            check_items(["a", missing], "text")


def test_items_that_are_good():
    check_items(["a", "b"], "text")
    check_items([("a", "b"), ["c", "d"]], "text")
    check_items([{"text": "a"}, {"text": "b"}], "text")
    check_items([np.zeros((2, 2)), "a.png", b"bytes"], "image")
    check_items([(np.zeros(3), 8000)], "audio")


PAIR = {"text": "a", "text_pair": "b"}
CHOICES = {"question": "q", "choices": "c"}


@pytest.mark.parametrize(("task", "columns", "items", "told"), [
    (Classify(), PAIR, [("a", "b"), ("a", None)], r"the second text of pair 2 of 2 is missing \(None\)"),
    (Classify(), PAIR, [("a", "b"), (math.nan, "b")], "the first text of pair 2 of 2 is missing"),
    (Classify(), PAIR, [("a", "b"), (3, "b")], "the first text of pair 2 of 2 is the number 3, .*'3'"),
    (Classify(), PAIR, [("a", "b"), ("a", " ")], "the second text of pair 2 of 2 is empty"),
    (Classify(), PAIR, [("a", "b"), ("a", ["b"])], "the second text of pair 2 of 2 is a list"),
    (Classify(), PAIR, [("a", "b"), ("a", "b", "c")], "item 2 of 2 has 3 texts; it must have two"),
    (Classify(), PAIR, [("a", "b"), "a"], "item 2 of 2 is a str, but the first is a tuple"),
    (Choice(), CHOICES, [("q", ["a", "b"]), ("q", ["a", None])], "the choice 2 of item 2 of 2 is missing"),
    (Choice(), CHOICES, [("q", ["a", "b"]), (7, ["a", "b"])], "the question of item 2 of 2 is the number 7"),
    (Choice(), CHOICES, [("q", ["a", "b"]), ("q", "a")], "item 2 of 2 must be a question and a list of choices"),
    (Choice(), {"choices": "c"}, [["a", "b"], ["a", 1.5]], "the choice 2 of item 2 of 2 is the number 1.5"),
    (Span(), {"question": "q", "context": "c"}, [("a", "b"), ("a", None)], "the context of pair 2 of 2"),
    (Generate(), {"messages": "m"}, [[{"role": "user", "content": "a"}], "b"], "item 2 of 2 is a str"),
])  # fmt: skip
def test_what_is_within_items(task, columns, items, told):
    with pytest.raises(UserError, match=told):
        task.given(items, columns)


@pytest.mark.parametrize("token", [None, math.nan])
def test_a_missing_token(token):
    with pytest.raises(Unfit, match="token 2 of 2"):
        read_sentence(["a", token])


def test_a_run_tells_it(finished):
    for items, told in ((["a", None], "item 2 of 2 is missing"), (["a", 5], "item 2 of 2 is the number 5")):
        with pytest.raises(UserError, match=told):
            Answers(finished, items)
