"""Temperature, sets of labels and unknown rows, on outputs that are made up."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from graftkit.errors import UserError
from graftkit.files import read_tensors, write_tensors
from graftkit.insight import confidence_file
from graftkit.insight.confidence import (
    Confidence,
    calibration_error,
    fit,
    fit_temperature,
    limit_of,
    scores_of,
    sets_of,
)
from graftkit.insight.confidence_evidence import Evidence
from graftkit.insight.confidence_known import Known, fit_known, reference_rows

ABOUT = {"checksums": {"graft.safetensors": "abc"}}


def rows(n: int = 2000, labels: int = 5, temperature: float = 2.5, seed: int = 0) -> Evidence:
    """Logits that are right if they are divided by `temperature`."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, labels)).astype(np.float32) * 2
    chances = torch.from_numpy(logits).softmax(1).numpy()
    targets = (chances.cumsum(1) < random.random((n, 1))).sum(1).clip(0, labels - 1)
    return Evidence(logits * temperature, targets, None)


def by_lbfgs(loss) -> float:
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log], lr=0.1, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(log.exp())
        value.backward()
        return value

    optimizer.step(closure)
    return float(log.detach().exp())


def test_the_temperature_minimises_the_likelihood():
    seen = rows()
    logits, targets = torch.from_numpy(seen.logits).double(), torch.from_numpy(seen.targets)
    rest = 1 / (len(targets) + 2)
    wanted = by_lbfgs(lambda t: functional.cross_entropy(logits / t, targets, label_smoothing=rest))
    got = fit_temperature(seen.logits, seen.targets)
    assert got == pytest.approx(wanted, rel=1e-3) and got == pytest.approx(2.5, rel=0.1)
    assert calibration_error(seen, got) < 0.03 < calibration_error(seen)


def test_independent_labels_share_a_temperature():
    random = np.random.default_rng(1)
    logits = random.normal(size=(800, 3)).astype(np.float32)
    targets = (random.random((800, 3)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    hot, rest = torch.from_numpy(logits / 3).double(), 1 / 802
    soft = torch.from_numpy(targets).double() * (1 - rest) + rest / 2
    wanted = by_lbfgs(lambda t: functional.binary_cross_entropy_with_logits(hot / t, soft))
    assert fit_temperature(logits / 3, targets) == pytest.approx(wanted, rel=1e-3)
    found = fit(Evidence(logits / 3, targets, None), sets=False)
    assert found.after < found.before and found.scores is None


def test_rows_that_are_all_right_do_not_make_it_certain():
    logits = np.tile(np.array([[3.0, 0, 0]], np.float32), (30, 1))
    found = fit(Evidence(logits, np.zeros(30, np.int64), None), sets=True)
    assert 0.3 < found.temperature < 1
    few = fit(Evidence(logits[:10], np.zeros(10, np.int64), None), sets=True)
    assert few.temperature == 1 and few.scores is not None and len(few.scores) == 10


def test_outputs_that_are_not_finite_are_refused():
    seen = rows(30)
    seen.logits[3, 1] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fit(seen, sets=True)


def test_sets_hold_the_right_label_as_often_as_asked():
    first, second = rows(3000), rows(3000, seed=1)
    found = fit(first, sets=True)
    assert found.scores is not None and (np.diff(found.scores) >= 0).all()
    for coverage in (0.8, 0.9, 0.95):
        limit = limit_of(found.scores, coverage)
        k = int(np.ceil(3001 * coverage))
        assert limit == np.sort(scores_of(first.logits, first.targets, found.temperature))[k - 1].astype(
            np.float32
        )
        sets = sets_of(second.logits, found.temperature, limit)
        inside = np.mean([target in labels for target, labels in zip(second.targets.tolist(), sets)])
        assert abs(inside - coverage) < 0.025
        chances = torch.from_numpy(second.logits / found.temperature).softmax(1).numpy()
        for labels, row in zip(sets[:50], chances):
            assert labels == sorted(labels, key=lambda i: -row[i])  # the most likely first
            assert set(labels) - {int(row.argmax())} == set(np.flatnonzero(1 - row <= limit)) - {
                int(row.argmax())
            }


def test_against_mapie():
    mapie = pytest.importorskip("mapie.classification", reason="mapie is not installed: pip install mapie")
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Ready(ClassifierMixin, BaseEstimator):
        classes_ = np.arange(5)

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return torch.from_numpy(np.asarray(x)).double().softmax(1).numpy()

        def predict(self, x):
            return self.predict_proba(x).argmax(1)

        def __sklearn_is_fitted__(self):
            return True

    first, second = rows(500, temperature=1.0), rows(300, temperature=1.0, seed=1)
    other = mapie.SplitConformalClassifier(Ready(), confidence_level=0.9, conformity_score="lac", prefit=True)
    other.conformalize(first.logits, first.targets)
    _, wanted = other.predict_set(second.logits)
    limit = limit_of(np.sort(scores_of(first.logits, first.targets, 1.0)), 0.9)
    got = np.zeros((300, 5), bool)
    for row, labels in zip(got, sets_of(second.logits, 1.0, limit)):
        row[labels] = True
    wanted = wanted[:, :, 0]
    some = wanted.any(1)  # sets of mapie may be empty
    assert some.mean() > 0.95 and (got[some] == wanted[some]).all()


@pytest.mark.parametrize("coverage", [1, 1.0, 0, -0.5, float("nan"), True])
def test_a_coverage_that_no_set_has(coverage):
    with pytest.raises(UserError, match=r"coverage is .*, but must be above 0 and below 1"):
        limit_of(np.linspace(0, 1, 50), coverage)


def test_too_few_rows_for_a_coverage():
    with pytest.raises(UserError, match=r"coverage of 0\.95 needs at least 19 evaluation rows, but 18"):
        limit_of(np.linspace(0, 1, 18), 0.95)
    assert limit_of(np.linspace(0, 1, 19), 0.95) == 1


def test_unknown_rows_are_far_from_those_of_their_label():
    random = np.random.default_rng(0)
    centers = random.normal(size=(3, 8))
    labels = np.arange(150) % 3
    near = (centers[labels] + random.normal(size=(150, 8)) * 0.2).astype(np.float32)
    logits = np.eye(3, dtype=np.float32)[labels]
    known, note = fit_known(
        Evidence(logits[:90], labels[:90], near[:90]), Evidence(logits[90:], labels[90:], near[90:])
    )
    assert known is not None and not note and known.of(near[90:], logits[90:]).mean() >= 0.95
    far = random.normal(size=(40, 8)).astype(np.float32)
    assert known.of(far, logits[:40]).mean() < 0.2
    unit = near / np.linalg.norm(near, axis=1, keepdims=True)
    for row in range(90, 100):  # by hand: the mean of the two nearest of its label
        close = np.sort(unit[:90][labels[:90] == labels[row]] @ unit[row])[-2:].mean()
        assert known.similarity(near[row : row + 1], logits[row : row + 1])[0] == pytest.approx(
            close, abs=2e-3
        )
    assert (known.similarity(near[:1], np.roll(logits[:1], 1)) < 0.9).all()  # of another label: far
    alone = Known(known.vectors[:1], known.labels[:1], 0.0)  # one row, and labels without any
    assert alone.similarity(near[:3], logits[:3]) == pytest.approx(unit[:3] @ unit[0], abs=2e-3)


def test_few_rows_tell_of_no_share():
    seen = Evidence(np.eye(3, dtype=np.float32), np.arange(3), np.eye(3, dtype=np.float32))
    known, note = fit_known(seen, seen)
    assert known is None and "3 evaluation rows are too few" in note


def test_rows_that_are_kept_are_bounded_and_of_all_labels():
    labels = np.array([0] * 900 + [1] * 5 + [2] * 95)
    kept = reference_rows(labels, 60, 16)
    assert len(kept) == 60 == len(set(kept)) and (np.diff(kept) > 0).all()
    assert np.bincount(labels[kept]).tolist() == [28, 5, 27] or np.bincount(labels[kept])[1] == 5
    assert len(reference_rows(labels, 10**9, 100_000)) == 40  # 4 million values
    assert np.array_equal(kept, reference_rows(labels, 60, 16))


def a_confidence() -> Confidence:
    random = np.random.default_rng(0)
    known = Known(random.normal(size=(6, 4)).astype(np.float16), np.arange(6, dtype=np.int32) % 3, 0.5)
    scores = np.sort(random.random(40)).astype(np.float32)
    return Confidence(1.25, 40, 0.1, 0.05, scores, known, "a note")


def test_it_is_read_as_it_was_written(tmp_path):
    assert confidence_file.read(tmp_path, ABOUT) is None
    written = a_confidence()
    confidence_file.write(tmp_path, ABOUT, written)
    found = confidence_file.read(tmp_path, ABOUT)
    assert found is not None and found.known is not None and written.known is not None
    assert np.array_equal(found.scores, written.scores) and np.array_equal(
        found.known.vectors, written.known.vectors
    )
    same = (found.temperature, found.rows, found.before, found.after, found.note, found.known.threshold)
    assert same == (1.25, 40, 0.1, 0.05, "a note", 0.5)
    confidence_file.write(tmp_path, ABOUT, Confidence(1.5, 9, 0.1, 0.1))
    found = confidence_file.read(tmp_path, ABOUT)
    assert found is not None and found.scores is None and found.known is None


def test_a_file_of_another_graft_is_refused(tmp_path):
    confidence_file.write(tmp_path, ABOUT, a_confidence())
    with pytest.raises(UserError, match=r"confidence.safetensors was fitted for another graft"):
        confidence_file.read(tmp_path, {"checksums": {"graft.safetensors": "abd"}})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temperature": 1e9}, "no calibration gives"),
        ({"temperature": "hot"}, "not a file that graftkit wrote"),
        ({"rows": None}, "not a file that graftkit wrote"),
        ({"before": float("inf")}, "no calibration gives"),
        ({"threshold": "high"}, "no calibration gives"),
        ({"scores": torch.tensor([0.5, 0.2])}, "no calibration gives"),
        ({"scores": torch.tensor([0.5, 7.0])}, "no calibration gives"),
        ({"labels": torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32)}, "no calibration gives"),
        ({"vectors": torch.zeros(6, 4)}, "no calibration gives"),
        ({"more": torch.zeros(1)}, "no calibration gives"),
    ],
)  # fmt: skip
def test_strange_values_are_refused(tmp_path, change, told):
    confidence_file.write(tmp_path, ABOUT, a_confidence())
    path = tmp_path / "confidence.safetensors"
    tensors, metadata = read_tensors(path)
    facts = json.loads(metadata["confidence"])
    for name, value in change.items():
        (tensors if isinstance(value, torch.Tensor) else facts)[name] = value
    write_tensors(path, tensors, {"confidence": json.dumps(facts), "graft": metadata["graft"]})
    with pytest.raises(UserError, match=told):
        confidence_file.read(tmp_path, ABOUT)


def test_a_damaged_file_is_told(tmp_path):
    confidence_file.write(tmp_path, ABOUT, a_confidence())
    path = tmp_path / "confidence.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged"):
        confidence_file.read(tmp_path, ABOUT)
