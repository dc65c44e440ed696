"""Losses and figures of sets of labels, labels with an order, and numbers: against formulas and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as theirs

from graftkit.tasks.base import Batch, Dataset, Examples
from graftkit.tasks.classify.form import chances_of_steps, median, of_steps
from graftkit.tasks.classify.multi import of_sets
from graftkit.tasks.classify.number import of_numbers
from graftkit.tasks.classify.task import Classify

LABELS = ("a", "b", "c", "d")


def dataset_of(targets: np.ndarray) -> Dataset:
    """A dataset that holds targets and nothing else."""

    class Bare(Dataset):
        def targets(self, rows):
            return torch.from_numpy(targets[rows])

    return Bare(Examples(None, {}, targets), np.ones(len(targets)))


def losses(task: Classify, logits: torch.Tensor, targets: np.ndarray, smoothing: float = 0.0) -> torch.Tensor:
    dataset = dataset_of(targets)
    learn = task.learner(dataset, LABELS, smoothing)
    return learn(lambda _: logits, Batch(dataset, np.arange(len(targets))))["loss"].losses


def random_sets(seed: int, rows: int = 60) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, 4)).astype(np.float32)
    return logits, random.random((rows, 4)) < (0.5, 0.2, 0.1, 0.3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_figures_of_sets_are_those_of_scikit_learn(seed, threshold):
    logits, targets = random_sets(seed)
    chosen = 1 / (1 + np.exp(-logits)) > threshold
    found = of_sets(logits, targets, LABELS, threshold)
    nan = {"zero_division": np.nan}
    assert found["accuracy"] == found["exact_match"] == theirs.accuracy_score(targets, chosen)
    assert found["f1"] == pytest.approx(theirs.f1_score(targets, chosen, average="micro"))
    assert found["macro_f1"] == pytest.approx(theirs.f1_score(targets, chosen, average="macro", **nan))
    assert found["label_accuracy"] == pytest.approx(1 - theirs.hamming_loss(targets, chosen))
    table = theirs.precision_recall_fscore_support(targets, chosen, zero_division=0)
    for i, label in enumerate(LABELS):
        row = found["per_class"][label]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx(
            tuple(part[i] for part in table[:3])
        )
        assert row["rows"] == table[3][i]
    low, high = found["f1_interval"]
    assert low < found["f1"] < high
    for name in ("f1", "macro_f1", "accuracy"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low <= found[name] <= high <= 1


def test_figures_of_sets_where_labels_are_absent():
    """A label that neither occurs nor is answered has no part in the mean; where none does, all is right."""
    targets = np.array([[1, 0, 0, 0], [1, 0, 0, 0]], bool)
    right = np.where(targets, 3.0, -3.0).astype(np.float32)
    assert of_sets(right, targets, LABELS, 0.5)["macro_f1"] == 1
    wrong = right.copy()
    wrong[0, 2] = 3
    assert of_sets(wrong, targets, LABELS, 0.5)["macro_f1"] == pytest.approx(0.5)
    nothing = of_sets(np.full((3, 4), -2, np.float32), np.zeros((3, 4), bool), LABELS, 0.5)
    assert nothing["f1"] == nothing["macro_f1"] == nothing["accuracy"] == 1
    assert all(row["f1"] == 0 == row["rows"] for row in nothing["per_class"].values())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_sets_is_that_of_transformers(smoothing):
    from transformers import BertConfig, BertForSequenceClassification

    logits, targets = random_sets(1, 6)
    logits, wanted = torch.from_numpy(logits), torch.from_numpy(targets.astype(np.float32))
    got = losses(Classify(kind="multi"), logits, wanted.numpy(), smoothing)
    wanted = wanted * (1 - smoothing) + smoothing / 2
    expected = torch.nn.BCEWithLogitsLoss()(logits, wanted)
    assert got.mean() == pytest.approx(float(expected))
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=4,
        problem_type="multi_label_classification",
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[1, 2]]), labels=wanted[:1])
    ours = losses(Classify(kind="multi"), output.logits, wanted[:1].numpy())
    assert float(output.loss) == pytest.approx(float(ours))


def test_chances_of_steps():
    """P(y = k) = (1 - f_k) f_0 ... f_(k-1), which sum to 1; Shi, Cao and Raschka 2021, equations 4 and 5."""
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    f = logits.sigmoid()
    wanted = torch.stack(
        [1 - f[:, 0], f[:, 0] * (1 - f[:, 1]), f[:, 0] * f[:, 1] * (1 - f[:, 2]), f.prod(dim=1)], dim=1
    )
    chances = chances_of_steps(logits).exp()
    assert torch.allclose(chances, wanted) and torch.allclose(chances.sum(1), torch.ones(5).double())
    above = f.cumprod(dim=1)
    assert (median(chances.log()) == (above > 0.5).sum(1)).all()
    far = chances_of_steps(torch.tensor([[200.0, -200.0, 0.0], [-300.0, 0.0, 0.0]]))
    assert torch.isfinite(far).all() and far.argmax(1).tolist() == [1, 0]


def test_the_loss_of_steps_is_the_sum_of_its_questions():
    """-log P(y) is the binary cross-entropy of each question that is asked on the way to y."""
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    targets = np.arange(8) % 4
    got = losses(Classify(kind="ordinal"), logits, targets)
    for row, target in enumerate(targets):
        asked = min(target + 1, 3)
        answers = torch.tensor([1.0] * target + [0.0] * (asked - target))
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        assert got[row] == pytest.approx(
            float(entropy(logits[row, :asked], answers, reduction="sum")), abs=1e-5
        )
    assert torch.isfinite(
        losses(Classify(kind="ordinal", class_weights="balanced"), logits, targets, 0.1)
    ).all()


@pytest.mark.parametrize("seed", range(4))
def test_figures_of_steps_are_those_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    targets = random.integers(0, 4, 80)
    predictions = np.clip(targets + random.integers(-1, 2, 80), 0, 3)
    found = of_steps(predictions, targets, 5)
    assert found["mean_absolute_error"] == pytest.approx(theirs.mean_absolute_error(targets, predictions))
    kappa = theirs.cohen_kappa_score(targets, predictions, weights="quadratic")
    assert found["quadratic_weighted_kappa"] == pytest.approx(kappa)
    for name in ("mean_absolute_error", "quadratic_weighted_kappa"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high


def test_kappa_of_one_class_is_nothing_beyond_chance():
    same = np.full(5, 2)
    assert of_steps(same, same, 4)["quadratic_weighted_kappa"] == 0
    assert of_steps(same, same, 4)["mean_absolute_error"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_figures_of_numbers_are_those_of_scikit_learn_and_scipy(seed):
    from scipy import stats

    random = np.random.default_rng(seed)
    targets = np.round(random.normal(1000, 3, 70), 1)  # with equal ones
    values = np.round(targets + random.normal(0, 2, 70), 1)
    found = of_numbers(values, targets)
    assert found["loss"] == pytest.approx(theirs.mean_squared_error(targets, values))
    assert found["mean_absolute_error"] == pytest.approx(theirs.mean_absolute_error(targets, values))
    assert found["r2"] == pytest.approx(theirs.r2_score(targets, values))
    assert found["pearson"] == pytest.approx(stats.pearsonr(values, targets)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(values, targets)[0])
    for name in ("loss", "mean_absolute_error", "pearson"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high


def test_figures_of_numbers_that_never_change():
    targets = np.array([1.0, 2.0, 3.0])
    flat = of_numbers(np.full(3, 2.0), targets)
    assert (
        flat["pearson"] == flat["spearman"] == flat["r2"] == 0 and np.isfinite(flat["pearson_interval"]).all()
    )
    assert of_numbers(np.full(3, 1.5), np.full(3, 1.5))["r2"] == 1
    assert of_numbers(np.array([1.0]), np.array([3.0]))["loss"] == 4


def test_the_loss_of_numbers_is_in_deviations():
    targets = np.array([10.0, 14.0])
    got = losses(Classify(kind="regression", center=12.0, scale=4.0), torch.tensor([[0.0], [1.0]]), targets)
    assert got.tolist() == pytest.approx([0.25, 0.25])
