"""Weights of classes: against torch's weighted losses and scikit-learn's balanced weights, in all tasks with labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_rows
from image_models import fill
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoTokenizer

import graftkit
from graftkit.backbone import Backbone
from graftkit.data.read import read_table
from graftkit.errors import UserError
from graftkit.runs.check import check
from graftkit.tasks.audio_classify.task import AudioClassify
from graftkit.tasks.classify.task import Classify
from graftkit.tasks.image_classify.task import ImageClassify
from graftkit.tasks.tag.task import Tag

LABELS = ("a", "b", "c")
GIVEN = {"a": 5, "c": 0.5}


def whole_loss(task: Any, logits: torch.Tensor, targets: np.ndarray, labels=LABELS) -> torch.Tensor:
    """The mean loss of all training rows."""
    dataset: Any = SimpleNamespace(examples=SimpleNamespace(targets=targets))
    batch: Any = SimpleNamespace(targets=torch.from_numpy(targets))
    return task.learner(dataset, labels, 0.0)(lambda _: logits, batch)["loss"].losses.mean()


@pytest.mark.parametrize("kind", [Classify, ImageClassify, AudioClassify])
@pytest.mark.parametrize("given", [GIVEN, {"b": 2.0}, "balanced"])
def test_one_label_is_weighted_as_by_torch(kind, given):
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 3), np.random.default_rng(0).integers(0, 3, 40)
    if given == "balanced":
        weights = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=targets)).float()
    else:
        weights = torch.tensor([float(given.get(label, 1)) for label in LABELS])
    expected = torch.nn.CrossEntropyLoss(weight=weights)(logits, torch.from_numpy(targets))
    assert torch.allclose(whole_loss(kind(class_weights=given), logits, targets), expected)


@pytest.mark.parametrize("given", [GIVEN, "balanced"])
def test_sets_have_the_positive_weights_of_torch(given):
    torch.manual_seed(0)
    logits = torch.randn(40, 3)
    targets = (np.random.default_rng(0).random((40, 3)) < [0.1, 0.5, 0.0]).astype(np.float32)
    positives = targets.sum(axis=0)
    weights = [5, 1, 0.5] if given is GIVEN else [(40 - n) / n if n else 1 for n in positives]
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights, dtype=torch.float32))(
        logits, torch.from_numpy(targets)
    )
    got = whole_loss(Classify(kind="multi", class_weights=given), logits, targets)
    assert torch.allclose(got, expected)


def test_steps_of_a_scale_are_weighted_by_their_label():
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 2), np.random.default_rng(0).integers(0, 3, 40)
    plain = Classify(kind="ordinal", order=LABELS)
    dataset: Any = SimpleNamespace(examples=SimpleNamespace(targets=targets))
    batch: Any = SimpleNamespace(targets=torch.from_numpy(targets))
    losses = plain.learner(dataset, LABELS, 0.0)(lambda _: logits, batch)["loss"].losses
    weights = torch.tensor([5, 1, 0.5])[targets]
    got = whole_loss(Classify(kind="ordinal", order=LABELS, class_weights=GIVEN), logits, targets)
    assert torch.allclose(got, (losses * weights).sum() / weights.sum())


TAGGED = [
    {"tokens": ["the", "cat", "dog", "is"], "tags": ["O", "B-X", "I-X", "O"]},
    {"tokens": ["old", "apple"], "tags": ["O", "B-Y"]},
    {"tokens": ["saw"], "tags": ["O"]},
]


@pytest.mark.parametrize(("given", "expected"), [
    ({"X": 4}, [1, 4, 4, 1, 1]), ({"X": 4, "I-X": 2, "O": 0.1}, [0.1, 4, 2, 1, 1]), ("balanced", None),
])  # fmt: skip
def test_tags_are_weighted_as_by_torch(tiny_bert, given, expected):
    task = Tag(class_weights=given)
    table, columns = read_table(TAGGED), {"tokens": "tokens", "tags": "tags"}
    labels = task.label_names(table, columns, False)
    assert labels == ("O", "B-X", "I-X", "B-Y", "I-Y")
    examples = task.examples(table, columns, labels, False)
    backbone = Backbone(torch.nn.Linear(1, 1), AutoTokenizer.from_pretrained(tiny_bert))
    dataset = task.dataset(examples, backbone, 32)
    targets = dataset.targets(np.arange(3))
    if expected is None:
        words = targets[targets != -100].numpy()
        present = compute_class_weight("balanced", classes=np.unique(words), y=words)
        expected = [*present, 1.0]  # I-Y has no word
    torch.manual_seed(0)
    logits = torch.randn(*targets.shape, 5)
    batch: Any = SimpleNamespace(targets=targets)
    losses = task.learner(dataset, labels, 0.0)(lambda _: logits, batch)["loss"].losses
    wanted = torch.nn.CrossEntropyLoss(weight=torch.tensor(expected, dtype=torch.float32))(
        logits.transpose(1, 2), targets
    )
    assert torch.allclose(losses.sum() / dataset.units.sum(), wanted)


@pytest.mark.parametrize(("task", "rows", "told"), [
    ("classify(class_weights={'frut': 2})", make_rows(24), ("'frut'", "fruit, tool", "Did you mean 'fruit'?")),
    ("classify(class_weights={'fruit': 0})", make_rows(24), ("'fruit' the weight 0;", "above 0")),
    ("classify(class_weights={'fruit': 'heavy'})", make_rows(24), ("'fruit' the weight 'heavy';",)),
    ("classify(class_weights='balancd')", make_rows(24), ("Did you mean 'balanced'?",)),
    ("classify(kind='multi', class_weights={'frut': 2})", make_rows(24), ("Did you mean 'fruit'?",)),
    ("tag(class_weights={'X': 2, 'B-Z': 3})", TAGGED, ("'B-Z'", "labels of the training rows")),
])  # fmt: skip
def test_weights_that_are_refused_before_a_model_is_loaded(task, rows, told, tmp_path):
    with pytest.raises(UserError) as caught:
        graftkit.tune(model=tmp_path, task=task, train=rows, out=tmp_path / "run")
    assert all(part in str(caught.value) for part in told), caught.value


def test_weights_of_images_name_their_labels(tmp_path):
    problems = check(task="image_classify(class_weights={'bleu': 2})", train=str(fill(tmp_path, 3))).problems
    assert any("Did you mean 'blue'?" in one.text for one in problems)


@pytest.mark.slow
def test_weights_of_ones_own_in_a_run(tiny_bert, tmp_path):
    """A class that weighs much more is answered more often; the run says the weights, and evaluates without them."""
    rows = [{"text": "the apple", "label": "ab"[i % 2]} for i in range(24)]
    run = graftkit.tune(
        model=tiny_bert, task="classify(class_weights={'b': 9})", train=rows, eval=None, method="head()",
        out=tmp_path / "run", settings={"train.steps": 40, "train.lr": 0.1, "train.precision": "fp32"},
    )  # fmt: skip
    answer = run.predict(["the apple"])[0]
    assert answer["label"] == "b" and answer["probability"] == pytest.approx(0.9, abs=0.05)
    assert (
        run.evaluate(rows)["accuracy"] == 0.5 and "b'': 9" in (tmp_path / "run" / "recipe.yaml").read_text()
    )
