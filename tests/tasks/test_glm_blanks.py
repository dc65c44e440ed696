"""Blanks of a GLM: invariants on many draws, a slow reference of the two parts, distributions, and the text put together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from graftkit.tasks.shared.blanks import (
    LONGEST_SPAN,
    MIXTURE,
    MODES,
    Marks,
    Text,
    corrupt,
    draw_spans,
    infill,
    mode_of,
)

pytestmark = pytest.mark.slow

MARKS = Marks(token=1, sentence=2, document=3, start=4, end=5, block=6)
SPECIAL, FIRST = 7, 10  # [SEP], and the least id of a text


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))


def text_of(random: np.random.Generator, sizes: list[list[int]]) -> Text:
    """Documents of sentences of these sizes, each document with a special token before and after it."""
    ids: list[int] = [SPECIAL]
    runs, sentences = [], []
    for document in sizes:
        start = len(ids)
        for size in document:
            sentences.append((len(ids), len(ids) + size))
            ids += random.integers(FIRST, 100, size).tolist()
        runs.append((start, len(ids)))
        ids.append(SPECIAL)
    return Text(np.array(ids), np.array(runs), np.array(sentences))


def any_text(random: np.random.Generator) -> Text:
    documents = random.integers(1, 4)
    return text_of(random, [random.integers(1, 15, random.integers(1, 6)).tolist() for _ in range(documents)])


def slow(ids: list[int], spans: list[tuple[int, int]], mask: int, order: list[int]) -> tuple:
    """Both parts token by token, from the description in the paper (figure 2)."""
    part_a, places, inside = [], {}, {i for start, end in spans for i in range(start, end)}
    for i, token in enumerate(ids):
        if i in dict(spans):
            places[i] = len(part_a)
            part_a.append(mask)
        elif i not in inside:
            part_a.append(token)
    row1, row2, part_b, targets = list(range(len(part_a))), [0] * len(part_a), [], []
    for number in order:
        start, end = spans[number]
        for step in range(end - start + 1):
            part_b.append(MARKS.start if step == 0 else ids[start + step - 1])
            targets.append(ids[start + step] if start + step < end else MARKS.end)
            row1.append(places[start])
            row2.append(step + 1)
    return part_a + part_b, len(part_a), [row1, row2], targets


def test_parts_are_those_of_a_slow_reference() -> None:
    for seed in range(300):
        random = generator(seed)
        text = any_text(random)
        mode = list(MODES)[seed % 3]
        chosen, spans = draw_spans(random, text, mode, 1000)
        order = random.permutation(len(spans))
        made = infill(text.ids, spans, MODES[chosen][1](MARKS), MARKS, order)
        wanted = slow(
            text.ids.tolist(), list(map(tuple, spans.tolist())), MODES[chosen][1](MARKS), order.tolist()
        )
        assert (made.ids.tolist(), made.part_a, made.positions.tolist(), made.targets.tolist()) == wanted


def test_a_written_out_example() -> None:
    """Figure 2 of the paper: x1 to x6, blanks (x3) and (x5, x6), the second first."""
    made = infill(np.arange(11, 17), np.array([[2, 3], [4, 6]]), MARKS.token, MARKS, np.array([1, 0]))
    assert made.ids.tolist() == [11, 12, 1, 14, 1, 4, 15, 16, 4, 13]
    assert made.targets.tolist() == [15, 16, 5, 13, 5]
    assert made.positions.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4, 2, 2], [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]]


@pytest.mark.parametrize("mode", MODES)
def test_what_holds_of_every_draw(mode: str) -> None:
    for seed in range(1000):
        random = generator(seed, 1)
        text = any_text(random)
        most = int(random.integers(1, 9))
        chosen, spans = draw_spans(random, text, mode, most)
        sizes = spans[:, 1] - spans[:, 0]
        share = max(1, int(0.15 * text.tokens))
        assert 1 <= len(spans) <= most and (sizes > 0).all()
        for start, end in spans:  # in one document each, and without special tokens
            assert sum(start >= a and end <= b for a, b in text.runs) == 1
        if chosen == "token":
            assert (sizes <= LONGEST_SPAN).all()
            assert all(b > a for (_, a), (b, _) in pairwise(spans.tolist())), "two spans touch"
            smaller = sizes.sum() - sizes  # without any one of them, too little is left out
            assert smaller.min() < share
            used = [[b - a for a, b in spans.tolist() if start <= a < end] for start, end in text.runs]
            full = all(sum(n) + len(n) >= end - start for n, (start, end) in zip(used, text.runs))
            assert sizes.sum() >= share or len(spans) == most or full
        elif chosen == "sentence":
            assert {tuple(s) for s in spans.tolist()} <= {tuple(s) for s in text.sentences.tolist()}
            assert sizes.sum() - sizes.max() < max(share, 1) or len(spans) == 1
            assert (np.diff(spans[:, 0]) > 0).all()
        else:
            run = next((a, b) for a, b in text.runs if a <= spans[0, 0] < b)
            size = run[1] - run[0]
            assert len(spans) == 1 and max(1, round(0.25 * size)) <= sizes[0] <= size


def assembled(made, mask: int) -> list[int]:
    """The text from its two parts: each blank of part B goes to the mask at its first position."""
    part_a, part_b = made.ids[: made.part_a].tolist(), made.ids[made.part_a :].tolist()
    places = made.positions[0, made.part_a :].tolist()
    found: dict[int, list[int]] = {}
    for token, target, place in zip(part_b, made.targets.tolist(), places):
        blank = found.setdefault(place, [])
        if token == MARKS.start:
            assert not blank
        if target != MARKS.end:
            blank.append(target)
    assert all(part_a[place] == mask for place in found)
    return [t for place, token in enumerate(part_a) for t in found.get(place, [token])]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "mixture"])
def test_the_text_is_what_its_parts_say(mode: str, shuffle: bool) -> None:
    moved = 0
    for seed in range(200):
        random = generator(seed, 2)
        text = any_text(random)
        made = corrupt(random, text, MARKS, mode=mode, shuffle=shuffle)
        masks = {1, 2, 3} & set(made.ids[: made.part_a].tolist())
        assert len(masks) == 1
        assert assembled(made, masks.pop()) == text.ids.tolist()
        places = made.positions[0, made.part_a :]
        moved += bool((np.diff(places) < 0).any())
        # what a token of part B reads is what the one before it was to predict
        inner = made.positions[1, made.part_a :] > 1
        assert (made.ids[made.part_a :][inner] == made.targets[np.flatnonzero(inner) - 1]).all()
    assert (moved > 0) == (shuffle and mode != "document")


def test_a_draw_is_a_function_of_the_generator() -> None:
    text = any_text(generator(3))
    one, same, other = (
        corrupt(generator(seed), text, MARKS, mode="mixture").ids.tolist() for seed in (5, 5, 6)
    )
    assert one == same != other


def test_a_tenth_of_part_b_becomes_the_block_token() -> None:
    blocked = tokens = 0
    for seed in range(300):
        random = generator(seed, 4)
        text = any_text(random)
        made = corrupt(random, text, MARKS, block=0.1)
        plain = made.ids[made.part_a :] != MARKS.start
        blocked += int((made.ids[made.part_a :][plain] == MARKS.block).sum())
        tokens += int(plain.sum())
        assert MARKS.block not in made.ids[: made.part_a] and MARKS.block not in made.targets
    assert blocked / tokens == pytest.approx(0.1, abs=0.025)
    long = text_of(generator(0), [[30, 30, 30]])
    for mode in ("sentence", "document"):
        made = [corrupt(generator(seed), long, MARKS, mode=mode, block=1.0) for seed in range(20)]
        assert not any(MARKS.block in found.ids for found in made)


def test_lengths_and_places_are_distributed_as_they_should() -> None:
    """Poisson(3) without zero has mean 3 / (1 - exp(-3)) = 3.157; each token is as likely to be left out as another."""
    text = text_of(generator(0), [[400]])
    spans = [draw_spans(generator(seed, 7), text, "token", 1000)[1] for seed in range(400)]
    sizes = np.concatenate([found[:, 1] - found[:, 0] for found in spans])
    assert sizes.mean() == pytest.approx(3.157, abs=0.06)
    ones = 3 * np.exp(-3) / (1 - np.exp(-3))
    assert (sizes == 1).mean() == pytest.approx(ones, abs=0.015)
    left = np.zeros(400)
    for found in spans:
        for start, end in found - 1:
            left[start:end] += 1
    quarters = left.reshape(4, 100).mean(axis=1) / len(spans)
    assert quarters == pytest.approx(np.full(4, 0.1535), abs=0.012)


def test_document_mode_covers_a_quarter_to_all_and_is_a_suffix_half_of_the_time() -> None:
    text = text_of(generator(0), [[100]])
    spans = (
        np.concatenate([draw_spans(generator(seed, 8), text, "document", 9)[1] for seed in range(1000)]) - 1
    )
    sizes = spans[:, 1] - spans[:, 0]
    assert sizes.min() == 25 and sizes.max() == 100 and sizes.mean() == pytest.approx(62.5, abs=2)
    inner = sizes < 90
    # of the others a few end there by chance: 1 in (101 - size)
    assert (spans[inner, 1] == 100).mean() == pytest.approx(0.51, abs=0.05)


def test_the_mixture_and_a_text_of_one_sentence() -> None:
    drawn = [mode_of(generator(seed), "mixture") for seed in range(2000)]
    assert [drawn.count(mode) / 2000 for mode in MODES] == pytest.approx(list(MIXTURE), abs=0.03)
    single = text_of(generator(0), [[40]])
    assert draw_spans(generator(1), single, "sentence", 9)[0] == "token"
    assert draw_spans(generator(1), text_of(generator(0), [[20, 20]]), "sentence", 9)[0] == "sentence"


def test_the_shortest_texts() -> None:
    for sizes in ([[1]], [[1], [1]], [[2]], [[1, 1]]):
        for mode in (*MODES, "mixture"):
            made = corrupt(generator(0), text_of(generator(0), sizes), MARKS, mode=mode)
            assert len(made.targets) >= 2
