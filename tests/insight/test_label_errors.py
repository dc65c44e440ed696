"""Labels that are likely wrong, near duplicates and outliers, from features; cleanlab is the reference."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from graftkit.errors import UserError
from graftkit.insight import knn, labels, near
from graftkit.insight.probe import FOLDS, deal


def clusters(
    rows: int = 300, classes: int = 4, width: int = 12, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Features around a centre for each class, and the classes."""
    draw = np.random.default_rng(seed)
    targets = np.arange(rows) % classes
    centres = draw.normal(0, 1.2, (classes, width))
    return (centres[targets] + draw.normal(0, 1, (rows, width))).astype(np.float32), targets


def flipped(targets: np.ndarray, classes: int, count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    rows = draw.choice(len(targets), count, replace=False)
    new = targets.copy()
    new[rows] = (targets[rows] + draw.integers(1, classes, count)) % classes
    return new, rows


def test_flipped_labels_come_first_with_their_old_label():
    values, targets = clusters()
    given, rows = flipped(targets, 4, 15)
    judged = labels.judge(labels.out_of_fold(values, given, 4), given)
    first = np.argsort(-judged.scores)[:24]
    assert len(np.intersect1d(first, rows)) >= 13
    assert (judged.suggested[rows] == targets[rows]).sum() >= 13
    assert judged.scores.min() >= 0 and judged.scores.max() <= 1
    again = labels.out_of_fold(values, given, 4)
    assert np.array_equal(again, labels.out_of_fold(values, given, 4))  # the folds have a seed


def test_no_row_is_judged_by_itself():
    """The probabilities of a row stay the same whatever its own label is, if the folds do."""
    values, targets = clusters(60, 2)
    before = labels.out_of_fold(values, targets, 2)
    folds = deal(targets)
    row = 7
    inside = folds == folds[row]
    expected = labels.fitted(values[~inside], targets[~inside], values[inside], 2)
    assert np.array_equal(before[inside], expected)
    counts = np.array([np.bincount(targets[folds == fold], minlength=2) for fold in range(FOLDS)])
    assert np.ptp(counts, axis=0).max() <= 1  # as many of each class in each fold


def test_they_are_scikit_learns_probabilities():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    values, targets = clusters(120, 3)
    values[:, 3] = 2.5  # a constant feature
    model = make_pipeline(StandardScaler(), LogisticRegression(C=labels.STRENGTH, max_iter=1000))
    expected = model.fit(values[:90], targets[:90]).predict_proba(values[90:])
    got = labels.fitted(values[:90], targets[:90], values[90:], 3)
    assert np.allclose(got, expected, atol=2e-3)


def test_a_class_without_rows_in_some_folds():
    values, targets = clusters(40, 2)
    targets[5] = 3  # one row of its class, and none of class 2
    found = labels.out_of_fold(values, targets, 4)
    assert np.allclose(found.sum(1), 1, atol=1e-5) and (found[:, 2] == 0).all() and found[5, 3] == 0
    with pytest.raises(UserError, match="fewer than two of the 2 labels have two rows"):
        labels.out_of_fold(values[:2], np.array([0, 1]), 2)


def test_sets_of_labels():
    values, targets = clusters(240, 3)
    sets = np.eye(3, dtype=np.float32)[targets]
    sets[:, 2] = sets[:, 0]  # the first label brings the third
    sets[11, 1], sets[0, 2] = 1 - sets[11, 1], 1 - sets[0, 2]
    judged = labels.judge(labels.out_of_fold(values, sets, 3), sets)
    assert judged.scores.shape == (240,) and 0 in np.argsort(-judged.scores)[:10]
    assert judged.suggested[0].tolist() == [1, 0, 1] and sets[0].tolist() == [1, 0, 0]


def test_the_order_is_cleanlabs():
    if importlib.util.find_spec("cleanlab") is None:
        pytest.skip("cleanlab is not installed; pip install cleanlab")
    from cleanlab.rank import get_label_quality_scores

    values, targets = clusters()
    given, _ = flipped(targets, 4, 20)
    found = labels.out_of_fold(values, given, 4)
    for method, own in (
        ("self_confidence", labels.self_confidence),
        ("normalized_margin", labels.normalized_margin),
    ):
        assert np.allclose(get_label_quality_scores(given, found, method=method), own(found, given))
    two, pair = (
        labels.out_of_fold(values, given % 2, 2),
        given % 2,
    )  # with two labels all scores have one order
    theirs = get_label_quality_scores(pair, two, method="self_confidence")
    assert np.array_equal(np.argsort(theirs), np.argsort(-labels.judge(two, pair).scores))


def test_neighbours_are_those_of_all_cosines(monkeypatch):
    values, _ = clusters(90)
    ways = near.centred(values, values.mean(0))
    cosines = ways @ ways.T
    np.fill_diagonal(cosines, -2)
    monkeypatch.setattr(knn, "CELLS", 90 * 7)  # several blocks
    found = near.neighbours(ways, ways, 4, itself=True)
    assert np.array_equal(found.rows, np.argsort(-cosines, axis=1)[:, :4])
    assert np.allclose(found.cosines, -np.sort(-cosines, axis=1)[:, :4], atol=1e-6)
    assert near.neighbours(ways[:3], ways, 1).rows[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("Is there a limit to my top-up?", "is there a limit to my top up", True),
        ("How are exchange rates determined?", "How are the exchange rates determined?", True),
        ("What currencies can I hold?", "What currencies can I use?", False),
        ("card", "a", False),
    ],
)
def test_near_texts_are_nearly_the_same(left, right, expected):
    assert near.alike((left,), (right,), 0.95) is expected
    ways = np.array([[1.0, 0.0], [0.95, np.sqrt(1 - 0.95**2)], [-1, 0]], np.float32)
    found = near.neighbours(ways, ways, 2, itself=True)
    pairs = near.near_pairs(found, [(left,), (right,), (left,)], [(left,), (right,), (left,)])
    assert [pair[:2] for pair in pairs] == ([(0, 1), (1, 0)] if expected else [])


def test_near_images_are_nearly_the_same(tmp_path):
    from PIL import Image

    from graftkit.data.images import look_at

    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 255, (6, 6, 3), np.uint8)
    image = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg", quality=80)
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "c.png")
    a, b, c = look_at([str(tmp_path / name) for name in ("a.png", "b.jpg", "c.png")], ["a", "b", "c"])
    assert near.alike((a,), (b,), 0.99) and not near.alike((a,), (c,), 0.99)


def test_near_recordings_are_equally_long():
    from graftkit.data.sounds import Sound

    one, same, longer = (
        Sound("", rate, samples, 1, False, b"") for rate, samples in ((8000, 800), (16000, 1601), (8000, 900))
    )
    assert near.alike((one,), (same,), 0.999) and not near.alike((one,), (longer,), 0.999)
    assert not near.alike((one,), (same,), 0.98)


def test_outliers_are_far_from_all():
    values, _ = clusters(200, 2, seed=3)
    values[17] = -8 * values[17][::-1]
    ways = near.centred(values, values.mean(0))
    ways[17] = np.linalg.svd(ways)[2][-1]  # a direction that no row has
    found = near.outliers(near.neighbours(ways, ways, itself=True))
    assert found and found[0][0] == 17 and len(found) < 10
