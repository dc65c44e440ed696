"""The measures behind `graftkit fit`, each against an independent reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from graftkit.data.sounds import Sound
from graftkit.data.words import words_of
from graftkit.insight.baselines import bag_of_words, most_frequent
from graftkit.insight.gap import distance_of, not_better, sounds_of
from graftkit.insight.knn import directions, nearest, neighbours_vote
from graftkit.insight.logme import logme
from graftkit.insight.probe import figure, folds_of, out_of_fold
from graftkit.insight.targets import PENALTY, Classes, Numbers, Sets


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(0)
    numbers = draw.integers(0, 3, 120)
    features = draw.normal(size=(120, 8)).astype(np.float32) * 3 + 5
    features[:, :3] += 4 * np.eye(3, dtype=np.float32)[numbers]
    features[:, 7] = 2.0  # constant
    return features, Classes(numbers, 3)


@pytest.mark.parametrize("width", [6, 40])
def test_logme_is_the_maximum_of_the_evidence(width):
    """The evidence is the density of targets that are normal with covariance F F' / alpha + 1 / beta."""
    from scipy.optimize import minimize
    from scipy.stats import multivariate_normal

    draw = np.random.default_rng(width)
    features = draw.normal(size=(25, width)).astype(np.float32) * 3
    table = np.eye(2)[draw.integers(0, 2, 25)] + 0.3 * features[:, :2]

    def evidence(values, column):
        covariance = features @ features.T / np.exp(values[0]) + np.eye(25) / np.exp(values[1])
        return -multivariate_normal.logpdf(table[:, column], cov=covariance) / 25

    best = [-minimize(evidence, [0.0, 0.0], (column,), method="Nelder-Mead").fun for column in (0, 1)]
    assert logme(features, table) == pytest.approx(np.mean(best), abs=2e-3)
    assert logme(features * 100, table) == pytest.approx(logme(features, table), abs=1e-3)


def test_the_probe_is_scikit_learns_pipeline_on_the_same_folds(data):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, targets = data
    folds = folds_of(targets)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=300, tol=1e-3))
    wanted = cross_val_predict(
        model, features, targets.numbers, cv=PredefinedSplit(folds), method="predict_proba"
    )
    assert np.allclose(out_of_fold(features, targets, folds), wanted, atol=5e-3)
    table = np.array([np.bincount(targets.numbers[folds == fold], minlength=3) for fold in range(5)])
    assert np.ptp(table, axis=0).max() <= 1  # each fold has its share of each class


def test_nearest_rows_are_scikit_learns(data, monkeypatch):
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import StandardScaler, normalize

    import graftkit.insight.knn as module

    features, targets = data
    monkeypatch.setattr(module, "CELLS", 1000)  # in several parts
    unit = directions(features)
    assert np.allclose(unit, normalize(StandardScaler().fit_transform(features)), atol=1e-5)
    rows, near = nearest(unit, unit, 10, themselves=True)
    far, wanted = NearestNeighbors(n_neighbors=11, metric="cosine").fit(unit).kneighbors(unit)
    assert np.allclose(near, 1 - far[:, 1:], atol=1e-5) and (rows == wanted[:, 1:]).mean() > 0.99
    votes = neighbours_vote(features, targets)
    assert np.allclose(votes.sum(1), 1, atol=1e-5)
    weights = np.exp(near[3] / 0.07)
    assert votes[3, 1] == pytest.approx(
        weights[targets.numbers[rows[3]] == 1].sum() / weights.sum(), abs=1e-4
    )


def test_metrics_are_scikit_learns():
    from sklearn.metrics import accuracy_score, f1_score, r2_score

    draw = np.random.default_rng(1)
    scores = draw.random((60, 4))
    once = np.ones((1, 60))
    numbers = draw.integers(0, 4, 60)
    assert Classes(numbers, 4).measure(scores, once)[0] == pytest.approx(
        accuracy_score(numbers, scores.argmax(1))
    )
    sets = (draw.random((60, 4)) > 0.6).astype(np.float32)
    assert Sets(sets).measure(scores, once)[0] == pytest.approx(f1_score(sets, scores > 0.5, average="micro"))
    values = draw.normal(size=60)
    assert Numbers(values).measure(scores, once)[0] == pytest.approx(r2_score(values, scores[:, 0]))
    weights = draw.integers(0, 3, 60)
    again = np.repeat(np.arange(60), weights)  # a resample is its rows, repeated
    assert Numbers(values).measure(scores, weights[None].astype(float))[0] == pytest.approx(
        r2_score(values[again], scores[again, 0])
    )


def test_a_bag_of_words_reads_words_and_not_chance():
    draw = np.random.default_rng(2)
    numbers = draw.integers(0, 2, 100)
    texts = [f"x{draw.integers(9)} {('red', 'blue')[n]} y{draw.integers(9)}" for n in numbers]
    targets = Classes(numbers, 2)
    folds = folds_of(targets)
    scores = bag_of_words(texts, None, targets, folds)
    assert figure(scores, targets).value > 0.95
    assert not not_better(scores, most_frequent(targets), targets, "the most frequent answer")
    told = not_better(most_frequent(targets), scores, targets, "a bag of words")
    assert len(told) == 1 and "worse than a bag of words" in told[0]
    chance = draw.random((100, 2))
    assert "not clearly better" in not_better(chance, most_frequent(targets), targets, "the most frequent")[0]
    assert bag_of_words(["?!"] * 100, None, targets, folds) is None


def test_words_of_scripts_without_blanks():
    assert words_of("Don't pay 20€, 聊天吧 now") == ["Don", "t", "pay", "20", "聊", "天", "吧", "now"]


def test_the_distance_of_batch_normalization():
    from torch import nn

    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        model[0].bias.zero_()
    images = torch.randn(50, 1, 5, 5)
    model[1].running_mean.copy_(torch.tensor([0.0, 0.0]))
    model[1].running_var.copy_(torch.tensor([1.0, 4.0]))
    model[3].running_mean.fill_(0.4)
    moved = images - images.mean() + 3.0  # three standard deviations in each channel

    class Rows:
        def __len__(self):
            return 50

        def batch(self, rows, device):
            return moved[rows]

    forward = SimpleNamespace(graft=SimpleNamespace(model=model), device=torch.device("cpu"))
    calls = type("Calls", (), {"__call__": lambda self, batch: model(batch), **vars(forward)})()
    first = distance_of(calls, Rows())
    with torch.no_grad():
        states = model[2](model[1].eval()(model[0](moved)))
        wanted = ((states.mean((0, 2, 3)) - 0.4).abs() / (1 + 1e-5) ** 0.5).mean()
    assert first == pytest.approx(max(3.0, float(wanted)), abs=1e-3)
    assert distance_of(SimpleNamespace(graft=SimpleNamespace(model=model[0])), Rows()) is None


def test_recordings_below_the_rate_of_the_model():
    def warnings(*rates: int) -> list[str]:
        sounds = [Sound(np.zeros(8), rate, 8, 1, False, b"") for rate in rates]
        return sounds_of(SimpleNamespace(sounds=sounds, front=SimpleNamespace(rate=16000)))  # type: ignore[arg-type]

    (told,) = warnings(8000, 8000, 44100)
    assert "8,000 samples a second" in told and "above 4,000 Hz" in told
    assert warnings(8000, 44100, 44100) == warnings(12000) == [] and sounds_of(SimpleNamespace()) == []  # type: ignore[arg-type]
