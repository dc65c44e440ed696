"""The output layer and its loss in pieces, against torch's cross-entropy of all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graftkit.tasks.shared.linear_cross_entropy import (
    BEST,
    LABEL,
    MEAN,
    Form,
    Sizes,
    linear_cross_entropy,
)

ROWS, WIDTH, VOCABULARY = 23, 12, 101
PIECES = Sizes(logits=80, rows=10, kept=0)
FORMS = {"plain": Form(), "scaled": Form(0.3), "capped": Form(1.7, 2.5)}


def given(bias: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    offset = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True) if bias else None
    targets = torch.randint(VOCABULARY, (ROWS,))
    targets[[2, 15]] = -100
    return hidden, weight, offset, targets  # type: ignore[return-value]


def logits_of(hidden, weight, bias, form):
    logits = form.scale * F.linear(hidden, weight, bias)
    return logits if form.cap is None else form.cap * torch.tanh(logits / form.cap)


@pytest.mark.parametrize("sizes", [PIECES, Sizes(10**6, 10**6, 10**6)], ids=["pieces", "whole"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_those_of_cross_entropy(form, smoothing, sizes):
    """Rows weigh differently, so that no gradient is right for one sum of the rows only."""
    if smoothing and form == "capped":
        with pytest.raises(ValueError, match="mean of capped logits"):
            linear_cross_entropy(*given(False)[:2], given(False)[3], form=FORMS[form], mean=True)
        return
    hidden, weight, bias, targets = given(bias=True)
    weights = torch.rand(ROWS)
    scores = linear_cross_entropy(hidden, weight, targets, bias, FORMS[form], smoothing > 0, sizes)
    losses = -(1 - smoothing) * scores[:, LABEL]
    if smoothing:
        losses = losses - smoothing * scores[:, MEAN]
    (losses * weights).sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = logits_of(*doubles, FORMS[form])
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    (expected * weights).sum().backward()
    assert torch.allclose(losses.double(), expected, atol=1e-5)
    for one, other in zip((hidden, weight, bias), doubles):
        assert torch.allclose(one.grad.double(), other.grad, atol=2e-5 * float(other.grad.abs().max()))
    right = (scores[:, LABEL] >= scores[:, BEST])[targets >= 0]
    assert torch.equal(right, (logits.argmax(-1) == targets)[targets >= 0])
    assert torch.allclose(
        scores[:, BEST].double(), logits.log_softmax(-1).amax(-1) * (targets >= 0), atol=1e-5
    )


def test_frozen_weights_have_no_gradient_and_the_logits_are_computed_once(monkeypatch):
    hidden, weight, _, targets = given(bias=False)
    weight = weight.detach()
    sizes = []
    product = torch.Tensor.__matmul__

    def counted(left, right):
        found = product(left, right)
        sizes.append(found.numel() if right.shape[1] != WIDTH else 0)
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    linear_cross_entropy(hidden, weight, targets, sizes=PIECES)[:, LABEL].sum().backward()
    monkeypatch.undo()
    assert sum(sizes) == ROWS * VOCABULARY and max(sizes) <= PIECES.logits
    plain = hidden.detach().clone().requires_grad_()
    F.cross_entropy(plain @ weight.T, targets, reduction="sum").backward()
    assert torch.allclose(-hidden.grad, plain.grad, atol=1e-5) and weight.grad is None


def test_a_frozen_input_leaves_the_gradient_of_the_weight():
    hidden, weight, _, targets = given(bias=False)
    linear_cross_entropy(hidden.detach(), weight, targets, sizes=PIECES)[:, LABEL].sum().backward()
    other = weight.detach().clone().requires_grad_()
    F.cross_entropy(hidden.detach() @ other.T, targets, reduction="sum").backward()
    assert torch.allclose(-weight.grad, other.grad, atol=1e-5)


def test_products_have_the_type_of_autocast():
    hidden, weight, bias, targets = given(bias=True)
    frozen = weight.detach().bfloat16()
    whole = frozen.float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = linear_cross_entropy(hidden, frozen, targets, bias, sizes=PIECES)
    scores[:, LABEL].sum().backward()
    plain = hidden.detach().clone().requires_grad_()
    expected = F.cross_entropy(F.linear(plain, whole, bias.detach()), targets, reduction="none")
    expected.sum().backward()
    assert scores.dtype == hidden.grad.dtype == torch.float32
    assert torch.allclose(-scores[:, LABEL], expected, atol=0.05)
    assert not torch.allclose(-scores[:, LABEL], expected, atol=1e-5), "computed in fp32"
    assert torch.allclose(-hidden.grad, plain.grad, atol=0.03 * float(plain.grad.abs().max()))


def test_tied_weights_and_no_targets():
    torch.manual_seed(0)
    table = nn.Embedding(VOCABULARY, WIDTH)
    ids = torch.randint(VOCABULARY, (9,))

    def gradient(loss):
        table.zero_grad()
        loss(table(ids) * 0.5).backward()
        return table.weight.grad.clone()

    ours = gradient(lambda h: -linear_cross_entropy(h, table.weight, ids, sizes=PIECES)[:, LABEL].sum())
    theirs = gradient(lambda h: F.cross_entropy(h @ table.weight.T, ids, reduction="sum"))
    assert torch.allclose(ours, theirs, atol=1e-5)
    none = linear_cross_entropy(table(ids)[:0], table.weight, ids[:0])
    none.sum().backward()
    assert none.shape == (0, 2) and torch.isfinite(table.weight.grad).all()
