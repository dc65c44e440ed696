"""Labels that look alike get a warning, and stay separate labels."""

from __future__ import annotations

import json

import graftkit
from graftkit.runs.check import check
from graftkit.tasks.shared.alike import alike


def test_what_makes_labels_alike():
    said = {
        "labels 'spam' and 'Spam' differ only in case.": ["spam", "Spam"],
        "labels 'café' and 'cafe\u0301' look the same (accents composed and decomposed).": ["café", "cafe\u0301"],
        "labels 'very bad' and 'very  bad' differ only in whitespace, or in characters that look alike.": ["very bad", "very  bad"],
        "labels 'a b' and 'a\xa0b' differ": ["a b", "a\xa0b"],
        "labels 'spam' and 'spam\u200b' differ": ["spam", "spam\u200b"],
        "labels 'A b', 'a b' and 'a\xa0B' differ only in case and in whitespace": ["A b", "a b", "a\xa0B"],
    }  # fmt: skip
    for warning, labels in said.items():
        (found,) = alike(["other", *labels])
        assert found.replace("\\xa0", "\xa0").replace("\\u200b", "\u200b").startswith(warning)
    assert alike(["spam", "ham", "spams", "sp am", "1", "10", "é", "e"]) == []


def test_many_groups_are_counted():
    labels = [form for i in range(8) for form in (f"x{i}", f"X{i}")]
    assert len(alike(labels)) == 6 and alike(labels)[-1] == "3 more groups of labels look alike."


def test_they_are_told_by_the_check_and_by_a_run(tiny_bert, tmp_path):
    rows = [{"text": f"the cat {'very ' * (i % 7)}", "label": ("spam", "Spam")[i % 2]} for i in range(24)]
    told = "labels 'Spam' and 'spam' differ only in case."
    assert told in [one.text for one in check(train=rows).warnings]
    sets = [{"text": row["text"], "labels": [row["label"], "x"]} for row in rows]
    assert told in [one.text for one in check(train=sets, task="classify(kind='multi')").warnings]
    run = graftkit.tune(
        model=tiny_bert, train=rows, method="head()", out=tmp_path / "run", settings={"train.steps": 1}
    )
    assert told in run.result["warnings"]
    assert told in json.loads((tmp_path / "run" / "plan.json").read_text())["warnings"]
