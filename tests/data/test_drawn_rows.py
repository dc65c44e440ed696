"""Rows drawn for learning curves: nested, by class, the same for a seed."""

from __future__ import annotations

import itertools
from collections import Counter

from graftkit.data.split import draw_per_class, draw_rows

LABELS = [*"a" * 60, *"b" * 30, *"c" * 10]


def test_fewer_rows_are_among_more():
    draws = [set(draw_rows(LABELS, count, 7)) for count in (3, 10, 50, 100)]
    assert all(one < other for one, other in itertools.pairwise(draws))
    assert {LABELS[row] for row in draws[0]} == set("abc")  # one of each class first
    counts = Counter(LABELS[row] for row in draws[2])
    assert all(abs(counts[name] - share) <= 2 for name, share in (("a", 30), ("b", 15), ("c", 5)))
    assert draw_rows(LABELS, 10, 7) == draw_rows(LABELS, 10, 7) != draw_rows(LABELS, 10, 8)


def test_rows_per_class_are_nested_too():
    few, more = (draw_per_class(LABELS, count, 1) for count in (2, 5))
    assert set(few) < set(more) and few == sorted(few)
    assert Counter(LABELS[row] for row in more) == {"a": 5, "b": 5, "c": 5}
