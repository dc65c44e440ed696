"""Products that are written out for speed are those that autograd would take."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from graftkit.backbone.weights import add_product, scale_columns, scale_product

pytestmark = pytest.mark.sampled


def plain_scale_product(y, x, weight, gain, bias, scale):
    return gain * (y - bias + scale * x @ weight.T) + bias


CASES = {
    "add_product": (add_product, lambda y, x, w, s: y + s * x @ w.T, [(2, 9, 4), (2, 9, 3), (4, 3)], (0.7,)),
    "add_product_of_rank_17": (
        add_product, lambda y, x, w, s: y + s * x @ w.T, [(2, 9, 4), (2, 9, 17), (4, 17)], (0.7,),
    ),
    "add_product_and_bias": (
        lambda y, x, w, b, s: add_product(y, x, w, s, b),
        lambda y, x, w, b, s: y + s * x @ w.T + b,
        [(2, 9, 4), (2, 9, 3), (4, 3), (4,)],
        (0.7,),
    ),
    "scale_product": (
        scale_product, plain_scale_product, [(2, 300, 4), (2, 300, 3), (4, 3), (4,), (4,)], (0.7,),
    ),
    "scale_columns": (scale_columns, lambda x, gain: x * gain, [(2, 300, 4), (4,)], ()),
}  # fmt: skip


def values(shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).div_(2).add_(0.5).requires_grad_()
        for s in shapes
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_values_and_gradients_are_those_of_the_plain_expression(name):
    fast, plain, shapes, more = CASES[name]
    mine, theirs = values(shapes), values(shapes)
    ours, wanted = fast(*mine, *more), plain(*theirs, *more)
    torch.testing.assert_close(ours, wanted)
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    (ours * weights).sum().backward()
    (wanted * weights).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(fast(*mine, *more), wanted)


def test_a_scaled_product_without_a_bias_and_with_frozen_parts():
    y, x, weight, gain, _ = values(CASES["scale_product"][2])
    out = scale_product(y.detach(), x, weight, gain, None, 0.7)
    torch.testing.assert_close(out, gain * (y + 0.7 * x @ weight.T))
    out.sum().backward()
    assert y.grad is None and x.grad is not None


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients(name):
    fast, _, shapes, more = CASES[name]
    small = values([tuple(min(n, 3) if n == 300 else n for n in shape) for shape in shapes])

    def function(*tensors):
        return fast(*tensors, *more)

    assert gradcheck(function, small) and gradgradcheck(function, small)


def test_what_comes_out_may_be_changed_in_place():
    y, x, weight, gain, bias = values(CASES["scale_product"][2])
    other = [t.detach().clone().requires_grad_() for t in (y, x, weight, gain, bias)]
    scale_product(y, x, weight, gain, bias, 0.7).relu_().sum().backward()
    plain_scale_product(*other, 0.7).relu().sum().backward()
    torch.testing.assert_close(gain.grad, other[3].grad)
    x, gain = values([(4, 3), (3,)])
    scale_columns(x, gain).mul_(2).sum().backward()
    torch.testing.assert_close(gain.grad, 2 * x.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_the_types_stay_those_of_the_plain_products(dtype):
    x, gain = torch.randn(2, 5, 6, dtype=dtype), torch.ones(6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert scale_columns(x, gain).dtype == dtype
