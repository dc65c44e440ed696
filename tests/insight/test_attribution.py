"""Attribution on models whose answers are known, against formulas, captum and plain references."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from graftkit.backbone import Backbone
from graftkit.data.source import Batch
from graftkit.data.words import assign, split_words
from graftkit.engine.forward import Forward
from graftkit.errors import UserError
from graftkit.insight.attribution import _first_fitting, check_by_deletion, check_method
from graftkit.insight.attribution_gradients import gradient_x_input, integrated_gradients
from graftkit.insight.attribution_inputs import RowInput, Unfit
from graftkit.insight.attribution_maps import attention, grad_cam
from graftkit.tasks.explained import Aim, grid, log_odds, slices
from graftkit.tasks.span.aims import odds_of_spans

SIDE = 16  # pixels; cells of 4


class Images:
    """One image as a dataset."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.truncated = values, 0

    def batch(self, rows: np.ndarray, device=None) -> Batch:
        return Batch(self, rows, device)  # type: ignore[arg-type]

    def inputs(self, rows: np.ndarray, at) -> dict[str, torch.Tensor]:
        return {"pixels": self.values.expand(len(rows), -1, -1, -1)}

    def call(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch.inputs["pixels"])

    def where(self, row: int) -> str:
        return "image"


TASK = SimpleNamespace(
    graded=lambda outputs: log_odds(outputs.log_softmax(-1)),
    divide=lambda dataset, row, backbone, inputs: grid(inputs["pixels"], None, "pixels"),
    chosen=lambda grades: int(grades.argmax()),
)


def row_of(model: nn.Module, values: torch.Tensor, index: int = 1, odds: bool = True) -> RowInput:
    graft = SimpleNamespace(model=model.eval(), backbone=Backbone(model))
    forward = Forward(graft, torch.device("cpu"), "fp32")  # type: ignore[arg-type]
    return RowInput(forward, TASK, Images(values), Aim(0, (index,), {"label": "yes"}, odds))  # type: ignore[arg-type]


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2))


@pytest.fixture
def curved() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(392, 3)
    )  # fmt: skip


def test_a_linear_model_gives_its_terms(linear):
    """The log-odds of two classes are linear, with the difference of the rows of W."""
    values = image()
    row = row_of(linear, values)
    weight = (linear[1].weight[1] - linear[1].weight[0]).detach().reshape(1, 3, SIDE, SIDE)
    assert torch.allclose(gradient_x_input(row), weight * values, atol=1e-6)
    mean = values.mean((2, 3), keepdim=True)
    wanted = weight * (values - mean)
    for steps in (1, 7):  # one step is enough where the gradient is the same everywhere
        assert torch.allclose(integrated_gradients(row, steps), wanted, atol=1e-6)
    cells = wanted[0].sum(0).reshape(4, 4, 4, 4).sum((1, 3)).flatten()
    assert np.allclose(row.by_part(wanted), cells.numpy(), atol=1e-5)


def test_integrated_gradients_are_complete(curved):
    row = row_of(curved, image(), index=2)
    found = integrated_gradients(row, 50)
    change = float((row(row.values) - row(row.absent)).detach())
    assert abs(change) > 0.01 and float(found.sum()) == pytest.approx(change, abs=1e-4)
    points = (torch.arange(1000) + 0.5) / 1000  # a plain sum over the line
    at = (row.absent + points[:, None, None, None] * (row.values - row.absent)).requires_grad_()
    gradient = torch.autograd.grad(row(at).sum(), at)[0].mean(0, keepdim=True)
    assert torch.allclose(found, gradient * (row.values - row.absent), atol=1e-5)


def test_gradients_are_those_of_captum(curved):
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    row = row_of(curved, image(), index=0)

    def scores(values):
        logits = curved(values)
        return logits[:, 0] - logits[:, 1:].logsumexp(-1)

    wanted = attr.IntegratedGradients(scores).attribute(
        row.values, row.absent, n_steps=50, method="gausslegendre"
    )
    assert torch.allclose(integrated_gradients(row, 50), wanted.float(), atol=1e-5)
    wanted = attr.InputXGradient(scores).attribute(row.values.clone().requires_grad_())
    assert torch.allclose(gradient_x_input(row), wanted, atol=1e-6)


def test_grad_cam_of_a_mean_and_a_linear_layer():
    """There it is the class activation map: the feature maps weighted by the layer, divided by their size."""
    torch.manual_seed(2)
    convs = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(5, 7, 3, stride=2, padding=1)
    )
    model = nn.Sequential(convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2))
    row = row_of(model, image())
    weight = model[3].weight[1] - model[3].weight[0]
    maps = (convs(row.values) * weight[None, :, None, None]).sum(1, keepdim=True).relu() / 16
    wanted = nn.functional.interpolate(maps, size=(SIDE, SIDE), mode="bilinear")[:, 0]
    got = grad_cam(row)
    assert got.max() > 0 and torch.allclose(got, wanted, atol=1e-6)


class Bright(nn.Module):
    """Says yes the surer, the more pixels of an image are bright."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.classifier = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1.0, 1, 1], [0.1, -0.1, 0.2]])[..., None, None])
            self.conv.bias.copy_(torch.tensor([-4.0, 0.0]))
            self.classifier.weight.copy_(torch.tensor([[0.0, 0], [60, 0]]))
            self.classifier.bias.copy_(torch.tensor([0.0, -1.0]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.conv(pixels).relu().mean((2, 3)))


def test_a_planted_patch_comes_first_and_deletion_reacts():
    values = 0.1 * image()
    values[:, :, 8:12, 4:8] = 3.0  # cell 9 of 16
    row = row_of(Bright(), values)
    assert row.parts[9]["box"] == [4, 8, 8, 12]
    grades = row.aimed(row.without([(), range(16), [9]]))
    value, empty, without = map(float, grades)
    assert value > 3 and without < -0.5 and empty == pytest.approx(float(row(row.absent).detach()))
    for method in ("gradient_x_input", "integrated_gradients", "grad_cam"):
        scores = row.by_part(_first_fitting(row, method, 20)[1])
        assert scores.argmax() == 9, method
        done = check_by_deletion(row, scores, value, empty)
        assert done["holds"] and done["without_top"] < 0.4 < 0.9 < done["without_random"], method
        assert (
            done["log_odds"]["before"] == pytest.approx(value, abs=1e-3)
            and done["log_odds"]["without_top"] < 0
        )
        assert 1 <= done["parts"] <= 3 and done["best_without_top"] == 0
    elsewhere = np.zeros(16)
    elsewhere[[0, 5, 10]] = 3, 2, 1
    wrong = check_by_deletion(row, elsewhere, value, empty)
    assert wrong["parts"] == 3 and not wrong["holds"] and wrong["best_without_top"] == 1
    assert check_by_deletion(row, scores, value, empty) == done  # the same draws
    nothing = check_by_deletion(row, -np.abs(scores) - 1, value, empty)
    assert nothing["parts"] == 0 and not nothing["holds"]


def test_attention_is_that_of_the_paper(finished):
    """Against loops over the layers and heads of the plain model, equations 5 and 6 of Chefer et al. 2021."""
    from graftkit.libraries import attention_of, set_attention
    from graftkit.runs.explain import _examples
    from graftkit.runs.predict import Answers, load_run

    answers = Answers(finished, ["my new hammer was here"])
    run = load_run(answers.run, exact=True)
    dataset = run.task.dataset(_examples(answers, None), run.backbone, run.max_length)
    row = RowInput(run.forward, run.task, dataset, Aim(0, (1,), {"label": run.labels[1]}))
    model = run.graft.model
    before = attention_of(model)
    got = attention(row)[0, :, 0]
    assert attention_of(model) == before
    set_attention(model, "eager")
    output = model(**row.inputs, output_attentions=True)
    (output.logits[0, 1] - output.logits[0, 0]).backward(inputs=list(output.attentions))
    relevance = torch.eye(7)
    for layer in output.attentions:
        heads = [(layer.grad[0, h] * layer[0, h]).clamp(min=0).detach() for h in range(4)]
        relevance = relevance + sum(heads) / 4 @ relevance
    set_attention(model, before)
    assert torch.allclose(got, relevance[0] - torch.eye(7)[0], atol=1e-5)  # the head reads the class token
    with pytest.raises(Unfit, match=r"grad_cam explains images by feature maps, but .* reads tokens"):
        grad_cam(row)


def test_log_odds_where_probabilities_are_close_to_one():
    logits = torch.tensor([[40.0, 1.0, -3.0], [0.3, 0.1, 0.2]])
    wide = logits.double()
    others = torch.stack([wide[:, [j for j in range(3) if j != k]].logsumexp(-1) for k in range(3)], 1)
    assert torch.allclose(log_odds(logits.log_softmax(-1)), (wide - others).float(), rtol=1e-5)
    ends = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(3))
    start, end = ends[..., 0].double().softmax(-1), ends[..., 1].double().softmax(-1)
    both = start[:, :, None] * end[:, None, :]
    assert torch.allclose(odds_of_spans(ends), torch.logit(both).float(), atol=1e-5)


def test_words_own_their_tokens():
    text = "don't wait, ok"
    words = split_words(text)  # don ' t wait , ok
    spans, owners = assign(words, [(0, 0), (0, 2), (2, 5), (6, 10), (10, 14), (0, 0)])
    assert [text[a:b] for a, b in spans] == ["don't", "wait", ", ok"]  # a token over several words joins them
    assert owners == [-1, 0, 0, 1, 2, -1]


def test_parts_of_sounds_leave_the_padding_out():
    values = torch.arange(1.0, 101.0)[None]
    cut = slices(values, 0, 80, 0.8, "samples")
    assert len(cut.parts) == 20 and cut.parts[-1] == {"start": 0.76, "end": 0.8}
    assert (cut.owners[80:] == -1).all() and cut.owners[79] == 19
    assert (cut.absent[0, :80] == 0).all() and torch.equal(cut.absent[0, 80:], values[0, 80:])
    features = torch.randn(1, 5, 30)  # (bands, frames)
    cut = slices(features, 1, 30, 1.0, "features")
    assert cut.owners.shape == (1, 30) and torch.allclose(cut.absent[0, :, 0], features[0].mean(1))


def test_methods_that_do_not_fit(linear):
    with pytest.raises(UserError, match=r"method 'grad_cams' is unknown .* Did you mean 'grad_cam'"):
        check_method("grad_cams", 50)
    with pytest.raises(UserError, match="steps is 0; it must be between 1 and 1,000"):
        check_method(None, 0)
    row = row_of(linear, image())
    with pytest.raises(Unfit, match="grad_cam needs feature maps"):
        grad_cam(row)
    with pytest.raises(
        Unfit, match="attention is for texts and images of patches, but Sequential reads no patches"
    ):
        attention(row)
    assert _first_fitting(row, None, 2)[0] == "integrated_gradients"
