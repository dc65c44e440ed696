"""Padding, joining and caching of rows by indexing: equal to a loop over the rows, without one."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from language_models import tokenizer

from graftkit.data.encode import Encoded
from graftkit.data.packing import positions
from graftkit.data.ragged import Ragged, mask, pad
from graftkit.data.read import Table
from graftkit.data.source import Pass
from graftkit.engine.kept import Kept
from graftkit.tasks.base import Examples
from graftkit.tasks.generate.data import GenerateDataset, PromptedDataset, Written

LENGTHS = [3, 0, 5, 1, 4, 2, 5]


def vectors(lengths=LENGTHS, seed=0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 200, length).astype(np.int32) for length in lengths]


def calls(function: Callable[[], object]) -> int:
    """How many calls, of Python and of C functions, `function` makes."""
    count = 0

    def seen(frame, event, what):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def looped(rows: list[np.ndarray], fill: int, left: bool = False) -> np.ndarray:
    width = max(map(len, rows))
    around = [np.full(width - len(row), fill, dtype=np.int64) for row in rows]
    return np.stack(
        [np.concatenate([a, r] if left else [r, a]).astype(np.int64) for a, r in zip(around, rows)]
    )


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("chosen", [[0], [4, 1, 4], [6, 5, 3, 2], list(range(7)), [1]])
def test_rows_padded_and_joined(chosen, left):
    rows = vectors()
    ragged = Ragged(rows)
    assert len(ragged) == 7 and all(np.array_equal(a, b) for a, b in zip(ragged, rows))
    picked = [rows[i] for i in chosen]
    assert np.array_equal(ragged.padded(np.array(chosen), 9, left=left), looped(picked, 9, left))
    assert np.array_equal(pad(picked, 9, left=left), looped(picked, 9, left))
    assert np.array_equal(ragged.joined(np.array(chosen)), np.concatenate(picked))
    ones = [np.ones(len(row), dtype=np.int64) for row in picked]
    assert np.array_equal(mask(ragged.lengths[chosen], left=left), looped(ones, 0, left))


def test_positions_begin_anew():
    assert positions([3, 1, 0, 2]).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_values_come_back(dtype):
    lengths = np.array([3, 1, 5, 2, 4])
    states = torch.randn(5, 5, 4).to(dtype)
    kept = Kept(lengths, ragged=True)
    for rows in ([2, 0], [4, 1, 3]):
        kept.put(np.array(rows), states[rows][:, : lengths[rows].max()])
    found = kept.get(np.array([3, 0, 4]))
    wanted = states[[3, 0, 4], :4].clone()
    wanted[0, 2:], wanted[1, 3:] = 0, 0
    assert found.dtype == dtype and torch.equal(found, wanted)


def dataset(kind: str, count: int):
    rows = [
        Written(ids, np.arange(len(ids)) > 1, prompt)
        for ids, prompt in zip(vectors([4, 6, 3, 5] * (count // 4)), vectors([2, 5, 1, 7] * (count // 4), 1))
    ]
    table = Table({"text": ["a"] * count}, "rows", list(range(count)), "row")
    examples = Examples(table, {"text": ["a"] * count}, ["b"] * count)
    if kind == "both":
        return PromptedDataset(examples, rows, tokenizer(), start=3), rows
    groups = [[i, i + 1] for i in range(0, count, 2)] if kind == "packed" else None
    return GenerateDataset(examples, rows, tokenizer(), groups), rows


@pytest.mark.parametrize("kind", ["plain", "packed", "both"])
def test_batches_of_a_language_model(kind):
    data, rows = dataset(kind, 8)
    groups = [[rows[2 * i], rows[2 * i + 1]] if kind == "packed" else [rows[i]] for i in (3, 0, 1)]
    ids = [np.concatenate([row.ids for row in group]) for group in groups]
    at = np.array([3, 0, 1])
    found, shift = data.inputs(at, Pass()), 0 if kind == "both" else 1
    if kind == "both":
        assert np.array_equal(found["input_ids"], looped([group[0].prompt for group in groups], 0))
        before = [np.concatenate([[3], row[:-1]]) for row in ids]
        assert np.array_equal(found["decoder_input_ids"], looped(before, 0))
    else:
        assert np.array_equal(found["input_ids"], looped(ids, 0))
    if kind == "packed":
        width = max(map(len, ids))
        numbers = [
            np.concatenate([np.arange(n) for n in (*(len(row.ids) for row in group), width - len(all_ids))])
            for group, all_ids in zip(groups, ids)
        ]
        assert np.array_equal(found["position_ids"], np.stack(numbers))
    learned = [np.flatnonzero(np.concatenate([row.learned for row in group])) for group in groups]
    rows_of, places = data.places(at)
    assert rows_of.tolist() == [i for i, found in enumerate(learned) for _ in found]
    assert places.tolist() == (np.concatenate(learned) - shift).tolist()
    assert data.labels(at).tolist() == np.concatenate([a[b] for a, b in zip(ids, learned)]).tolist()


@pytest.mark.parametrize("kind", ["plain", "packed", "both"])
def test_a_larger_batch_makes_no_more_calls(kind):
    data, _ = dataset(kind, 64)

    def make(count: int) -> int:
        rows = np.arange(count)
        return calls(lambda: (data.inputs(rows, Pass()), data.places(rows), data.labels(rows)))

    make(2)
    assert make(32) == make(4)


def test_padding_and_cache_make_no_more_calls_for_more_rows():
    rows = Ragged(vectors([3, 5, 2, 4] * 16))
    encoded = Encoded(
        {"input_ids": rows, "attention_mask": rows.like(np.ones_like(rows.values))}, rows.lengths, 0, {}
    )
    kept = Kept(rows.lengths, ragged=True)
    kept.put(np.arange(64), torch.randn(64, 5, 4))
    for work in (
        lambda count: encoded.pad(np.arange(count)),
        lambda count: kept.put(np.arange(count), torch.zeros(count, 5, 4)),
        lambda count: kept.get(np.arange(count)),
    ):
        work(2)
        assert calls(lambda work=work: work(64)) == calls(lambda work=work: work(4))
