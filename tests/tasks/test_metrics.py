"""Figures of classification against scikit-learn, and what their intervals are worth."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn import metrics as sk

import graftkit
from graftkit.tasks.classify.form import of_steps
from graftkit.tasks.classify.multi import of_sets
from graftkit.tasks.classify.number import of_numbers
from graftkit.tasks.shared.metrics import calibration, classification, confusion, of_choices
from graftkit.tasks.span.metrics import figures
from graftkit.tasks.tag.entities import accuracy_of, entity_scores, tag_scores

LABELS = ("a", "b", "c", "d")


def drawn(count: int, seed: int, right: float = 0.7, classes: int = 4):
    random = np.random.default_rng(seed)
    targets = random.integers(0, classes, count)
    logits = random.normal(size=(count, classes))
    logits[np.arange(count), targets] += 4.0 * (random.random(count) < right)
    return logits.astype(np.float32), targets


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("count", [7, 200])
def test_figures_equal_scikit_learn(count, classes):
    logits, targets = drawn(count, count + classes, classes=classes)
    found = classification(logits, targets, LABELS[:classes])
    predicted = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(targets, predicted))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["loss"] == pytest.approx(
        sk.log_loss(targets, probabilities, labels=range(classes)), rel=1e-5
    )
    table = sk.classification_report(
        targets,
        predicted,
        labels=range(classes),
        target_names=LABELS[:classes],
        output_dict=True,
        zero_division=0,
    )
    for label in LABELS[:classes]:
        ours, theirs = found["per_class"][label], table[label]
        assert [ours["precision"], ours["recall"], ours["f1"]] == pytest.approx(
            [theirs["precision"], theirs["recall"], theirs["f1-score"]]
        )
        assert ours["rows"] == theirs["support"]


def test_a_class_without_rows_is_left_out_of_macro_f1_as_in_scikit_learn():
    logits = np.eye(4, dtype=np.float32)[[0, 1, 1, 0]]
    targets = np.array([0, 1, 0, 0])
    found = classification(logits, targets, LABELS)
    assert found["macro_f1"] == pytest.approx(sk.f1_score(targets, logits.argmax(1), average="macro"))
    assert found["per_class"]["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0}


def test_intervals_hold_their_point_and_are_the_same_each_time():
    logits, targets = drawn(300, 1)
    found = classification(logits, targets, LABELS)
    for name in ("accuracy", "macro_f1"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low < found[name] < high <= 1
    assert found == classification(logits, targets, LABELS)
    normal = 1.96 * (found["accuracy"] * (1 - found["accuracy"]) / 300) ** 0.5
    low, high = found["accuracy_interval"]
    assert (high - low) / 2 == pytest.approx(normal, rel=0.12)


@pytest.mark.slow
def test_the_interval_covers_the_true_accuracy_about_95_times_in_100():
    true, covered = 0.8, 0
    random = np.random.default_rng(0)
    for _ in range(200):
        right = random.random(250) < true
        logits = np.eye(2, dtype=np.float32)[np.where(right, 0, 1)]
        low, high = classification(logits, np.zeros(250, dtype=int), ("a", "b"))["accuracy_interval"]
        covered += low <= true <= high
    assert 180 <= covered <= 199


@pytest.mark.slow
def test_the_interval_of_macro_f1_is_that_of_a_plain_bootstrap():
    logits, targets = drawn(150, 5)
    predicted, random = logits.argmax(1), np.random.default_rng(9)
    plain = []
    for _ in range(400):
        rows = random.integers(0, 150, 150)
        plain.append(sk.f1_score(targets[rows], predicted[rows], average="macro"))
    low, high = classification(logits, targets, LABELS)["macro_f1_interval"]
    assert [low, high] == pytest.approx(np.percentile(plain, [2.5, 97.5]).tolist(), abs=0.02)


def test_large_logits_give_a_finite_loss():
    found = classification(
        np.array([[1e4, -1e4], [1e4, -1e4]], dtype=np.float32), np.array([0, 0]), LABELS[:2]
    )
    assert found["loss"] == 0.0


@pytest.mark.parametrize(("classes", "rows", "megabytes"), [(77, 3000, 20), (1000, 5000, 100)])
def test_many_classes_take_little_memory(classes, rows, megabytes):
    import tracemalloc

    from graftkit.tasks.shared.metrics import _bootstrap

    random = np.random.default_rng(0)
    targets = random.integers(0, classes, rows)
    predictions = np.where(random.random(rows) < 0.9, targets, random.integers(0, classes, rows))
    tracemalloc.start()
    accuracies, macro_f1s = _bootstrap(targets, predictions, classes, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < megabytes * 1e6
    assert accuracies.mean() == pytest.approx((targets == predictions).mean(), abs=0.005)
    assert macro_f1s.shape == (1000,) and 0.5 < macro_f1s.min() <= macro_f1s.max() <= 1


def without_intervals(found: dict) -> dict:
    drawn = ("confusion", "calibration")  # not random, but as large
    return {n: value for n, value in found.items() if not n.endswith("_interval") and n not in drawn}


def test_without_intervals_nothing_is_drawn(monkeypatch):
    random = np.random.default_rng(0)
    logits, targets = random.normal(size=(20, 3)), random.integers(0, 3, 20)
    losses = random.random(20)
    chunks_of = [[(0, 1, "x")], [(2, 4, "y")], []]
    cases = [
        lambda more: of_choices(logits.argmax(1), targets, losses, LABELS[:3], **more),
        lambda more: of_steps(logits.argmax(1), targets, 3, **more),
        lambda more: of_numbers(logits[:, 0], losses, **more),
        lambda more: of_sets(logits, logits > 0.3, LABELS[:3], 0.5, **more),
        lambda more: figures(losses > 0.5, losses, losses > 0.2, True, **more),
        lambda more: entity_scores(chunks_of, chunks_of[::-1], ["x", "y"], **more),
        lambda more: tag_scores([targets], [logits.argmax(1)], LABELS[:3], **more),
        lambda more: accuracy_of(np.array([1, 2]), np.array([3, 4]), **more),
    ]
    whole = [case({}) for case in cases]
    assert all(any(name.endswith("_interval") for name in found) for found in whole)

    def draw(*values):
        raise AssertionError("resamples were drawn")

    monkeypatch.setattr(np.random, "default_rng", draw)
    for case, found in zip(cases, whole):
        assert repr(case({"intervals": False})) == repr(without_intervals(found))


@pytest.mark.slow
def test_evaluations_have_intervals_where_their_weights_are_kept(tiny_bert, rows_folder, tmp_path):
    run = graftkit.tune(
        model=str(tiny_bert), task="classify", train=str(rows_folder / "train.csv"), eval=0.3, out=tmp_path / "run",
        settings={"train.epochs": 6.0, "train.lr": 1.0, "train.precision": "fp32"},
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best, kept = None, []
    for line in (line for line in lines if line["kind"] == "evaluation"):
        order = (line["accuracy"], -line["loss"])
        kept.append(best is None or order > best)
        best = max(best or order, order)
        assert ("accuracy_interval" in line) == kept[-1]
    assert len(kept) == 6 and not all(kept)
    assert {"accuracy_interval", "macro_f1_interval"} <= set(run.metrics)
    assert all("accuracy_interval" in line for line in lines if line["kind"] == "final")


def test_confusion_is_that_of_scikit_learn():
    from sklearn.metrics import confusion_matrix

    random = np.random.default_rng(0)
    targets, answers = random.integers(0, 40, 600), random.integers(0, 40, 600)
    answers = np.where(random.random(600) < 0.3, targets, answers)
    cells = confusion(answers, targets, 40)
    made = np.zeros((40, 40), int)
    for target, answer, count in cells:
        made[target, answer] = count
    wanted = confusion_matrix(targets, answers, labels=range(40))
    np.fill_diagonal(wanted, 0)
    assert (made == wanted).all() and all(cell[2] > 0 for cell in cells)
    assert [cell[2] for cell in cells] == sorted((cell[2] for cell in cells), reverse=True)
    many = confusion(random.integers(0, 900, 5000), random.integers(0, 900, 5000), 900)
    assert len(many) == 1000


def test_calibration_is_that_of_scikit_learn():
    from sklearn.calibration import calibration_curve

    random = np.random.default_rng(1)
    confidences = random.random(2000) ** 0.5
    correct = random.random(2000) < confidences**2
    found = calibration(confidences, correct)
    right, mean = calibration_curve(correct, confidences, n_bins=10)
    assert np.allclose([one[4] for one in found["bins"]], right) and np.allclose(
        [one[3] for one in found["bins"]], mean
    )
    counts = np.histogram(confidences, np.linspace(0, 1, 11))[0]
    assert [one[2] for one in found["bins"]] == counts[counts > 0].tolist()
    wanted = sum(abs(correct[one].mean() - confidences[one].mean())
                 * len(one) for one in (np.flatnonzero((confidences * 10).astype(int) == i) for i in range(10)) if len(one))  # fmt: skip
    assert found["error"] == pytest.approx(wanted / 2000)
    sure = calibration(np.array([1.0, 0.0, np.nan]), np.array([True, False, True]))
    assert sure == {"error": 0.0, "bins": [[0.0, 0.1, 1, 0.0, 0.0], [0.9, 1.0, 1, 1.0, 1.0]]}
