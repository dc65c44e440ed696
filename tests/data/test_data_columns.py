"""Columns: what the recipe names, what is found by name, what is found by type, and when it is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from graftkit.data.columns import Column, find_again, find_columns
from graftkit.data.read import Table, read_table
from graftkit.errors import UserError

SHARED = Path(os.environ.get("GRAFTKIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
BANKING = SHARED / "data" / "banking77"

TEXT = Column("text", ("sentence", "content", "premise"), "text")
PAIR = Column("text_pair", ("sentence2", "hypothesis"), "text", required=False)
LABEL = Column("label", ("labels", "category", "class"), "label")
WANTED = (TEXT, PAIR, LABEL)

UTTERANCES = [f"a rather long question about card number {row}" for row in range(8)]
INTENTS = ["card", "pin"] * 4


def table(**columns: list) -> Table:
    count = len(next(iter(columns.values())))
    return Table(columns, "train.csv", list(range(2, count + 2)), "line")


def message(given: Table, named=None, wanted=WANTED) -> str:
    with pytest.raises(UserError) as caught:
        find_columns(given, wanted, named or {})
    return str(caught.value)


@pytest.mark.skipif(not BANKING.is_dir(), reason=f"no banking77 under {SHARED}")
def test_banking77_by_alias_and_by_type():
    given = read_table(BANKING / "train.csv")
    expected = {"text": "text", "label": "category"}
    assert find_columns(given, WANTED, {}) == expected
    bare = (Column("text", (), "text"), Column("label", (), "label"))
    assert find_columns(given, bare, {}) == expected
    renamed = Table(
        {"q": given.columns["text"], "y": given.columns["category"]}, given.source, given.numbers, "line"
    )
    assert find_columns(renamed, bare, {}) == {"text": "q", "label": "y"}


def test_named_columns_win():
    given = table(text=UTTERANCES, other=UTTERANCES, label=INTENTS, class_=INTENTS)
    named = {"text": "other", "label": "class_"}
    assert find_columns(given, WANTED, named) == named
    assert find_columns(given, WANTED, {"text_pair": "other"}) == {
        "text": "text",
        "text_pair": "other",
        "label": "label",
    }


def test_a_named_column_that_is_absent():
    assert message(table(text=UTTERANCES, label=INTENTS), {"label": "lable"}) == (
        "column 'lable' is not in train.csv (columns: text, label). Did you mean 'label'?"
    )


def test_an_unknown_key_and_a_column_named_twice():
    given = table(text=UTTERANCES, label=INTENTS)
    told = message(given, {"lable": "label"})
    assert "'lable'" in told and "text, text_pair, label" in told and told.endswith("Did you mean 'label'?")
    assert "both 'text' and 'text_pair'" in message(given, {"text": "text", "text_pair": "text"})


def test_names_and_aliases_in_any_case():
    given = table(Sentence=UTTERANCES, SENTENCE2=UTTERANCES, Class=INTENTS, category=INTENTS)
    assert find_columns(given, WANTED, {}) == {
        "text": "Sentence",
        "text_pair": "SENTENCE2",
        "label": "category",
    }
    assert find_columns(table(TEXT=UTTERANCES, text=UTTERANCES, label=INTENTS), WANTED, {})["text"] == "text"
    assert "'TEXT' and 'Text'" in message(table(TEXT=UTTERANCES, Text=UTTERANCES, label=INTENTS))


def test_a_name_goes_before_another_columns_alias():
    pair = Column("content", (), "text")
    assert find_columns(table(content=UTTERANCES, sentence=INTENTS), (TEXT, pair), {}) == {
        "text": "sentence",
        "content": "content",
    }


@pytest.mark.parametrize(
    "labels",
    [
        INTENTS,
        [0, 1] * 4,
        [True, False] * 4,
        ["0", "1"] * 4,
        ["card", None] * 4,
        [1.0, 0.0] * 4,
        ["", "x"] * 4,
    ],
)
def test_by_type(labels):
    given = table(y=labels, q=UTTERANCES, score=[row / 7 for row in range(8)], row=list(range(8)))
    assert find_columns(given, WANTED, {}) == {"text": "q", "label": "y"}


def test_by_type_with_one_of_them_known():
    given = table(q=UTTERANCES, y=INTENTS)
    assert find_columns(given, WANTED, {"text": "q"}) == {"text": "q", "label": "y"}
    assert find_columns(given, WANTED, {"label": "y"}) == {"text": "q", "label": "y"}
    assert find_columns(given, (TEXT,), {}) == {"text": "q"}
    assert find_columns(given.take([0, 1]), WANTED, {}) == {"text": "q", "label": "y"}


def test_a_repeated_text_is_no_label():
    assert find_columns(table(q=[UTTERANCES[0]] * 8, y=INTENTS), WANTED, {}) == {"text": "q", "label": "y"}


def test_more_than_one_would_do():
    told = message(table(q=UTTERANCES, y=INTENTS, z=[0, 1] * 4))
    assert "label of train.csv could be 'y' or 'z' (columns: q, y, z)" in told
    assert "data.columns={text: ..., label: ...}" in told
    told = message(table(q=UTTERANCES, r=UTTERANCES, y=INTENTS), {"label": "y"})
    assert "text of train.csv could be 'q' or 'r'" in told and "data.columns={text: ..., label: y}" in told


def test_none_would_do():
    told = message(table(q=UTTERANCES, ids=list(range(8)), boxes=[[1]] * 8))
    assert "no column of train.csv looks like the label (columns: q, ids, boxes)" in told
    assert "no column of train.csv looks like the text" in message(table(y=[0, 1] * 4), wanted=(TEXT,))
    assert "looks like" in message(table(q=[None, None], y=["", ""]))


def test_an_optional_column_is_never_found_by_type():
    given = table(text=UTTERANCES, label=INTENTS, q=UTTERANCES)
    assert find_columns(given, WANTED, {}) == {"text": "text", "label": "label"}


def test_who_names_the_text_wants_no_pair():
    given = table(a=UTTERANCES, hypothesis=UTTERANCES, label=INTENTS)
    assert find_columns(given, WANTED, {"text": "a"}) == {"text": "a", "label": "label"}
    assert find_columns(given, WANTED, {"label": "label"})["text_pair"] == "hypothesis"


def test_the_columns_of_a_run_in_another_table():
    again = find_again(
        table(hypothesis=UTTERANCES, sentence=UTTERANCES, class_=INTENTS),
        WANTED,
        {"text": "a", "label": "class_"},
    )
    assert again == {"text": "sentence", "label": "class_"}
    with pytest.raises(UserError, match="Rename the columns"):
        find_again(table(label=INTENTS), WANTED, {"text": "a", "label": "label"}, leave_out=("label",))
    pair = {"text": "a", "text_pair": "b", "label": "label"}
    with pytest.raises(UserError, match="no column 'text_pair'"):
        find_again(table(a=UTTERANCES, other=UTTERANCES, label=INTENTS), WANTED, pair)


def test_of_two_texts_none_is_found_by_type():
    wanted = (Column("question", ("query",), "text"), Column("context", (), "text"))
    given = table(review=UTTERANCES, rating=["bad"] * len(UTTERANCES))
    with pytest.raises(
        UserError, match=r"no column of .* looks like the question \(columns: review, rating\)"
    ):
        find_again(given, wanted, {"question": "question", "context": "context"})
