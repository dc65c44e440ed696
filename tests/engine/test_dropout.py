"""Dropout and attention dropout of our own against torch's."""

from __future__ import annotations

import pytest
import torch

from graftkit.engine.dropout import Source, attention_weights, fast_dropout

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_dropout_has_the_right_share_scale_and_mean(p, dtype):
    x = torch.ones(400, 501, dtype=dtype, requires_grad=True)
    with fast_dropout(CPU, 1, 2):
        y = torch.nn.functional.dropout(x, p, training=True)
        assert torch.equal(torch.nn.functional.dropout(x, p, training=False), x)
        assert torch.nn.functional.dropout(x, 1.0).abs().max() == 0
    zero = (y == 0).float().mean().item()
    assert zero == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert y[y != 0].unique().float().tolist() == pytest.approx([1 / (1 - p)], rel=5e-3)
    assert y.float().mean().item() == pytest.approx(1, abs=0.03) and y.dtype == dtype
    y.sum().backward()
    assert torch.equal(x.grad == 0, y == 0)
    rows = (y == 0).float().mean(1)
    assert rows.std().item() == pytest.approx((p * (1 - p) / 501) ** 0.5, rel=0.2), (
        "independent from row to row"
    )


def test_fast_dropout_is_a_function_of_its_seed_and_leaves_torch_as_it_was():
    x, plain = torch.ones(9, 7), torch.nn.functional.dropout
    drawn = []
    for seed in ((1, 2), (1, 2), (1, 3), (2, 2)):
        torch.rand(3)  # what ran before has no part in it
        with fast_dropout(CPU, *seed):
            assert torch.nn.functional.dropout is not plain
            drawn.append([torch.nn.functional.dropout(x, 0.5) for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert not torch.equal(drawn[0][0], drawn[2][0]) and not torch.equal(drawn[0][0], drawn[3][0])
    assert torch.nn.functional.dropout is plain
    with pytest.raises(ValueError), fast_dropout(CPU, 1):
        raise ValueError
    assert torch.nn.functional.dropout is plain


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_weights_are_those_of_torch(mask, scale):
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 8, generator=make) for length in (5, 5, 5))
    allowed = torch.rand(2, 1, 5, 5, generator=make) > 0.3
    allowed[..., 0] = True
    given = {"boolean": allowed, "additive": torch.randn(2, 4, 5, 5, generator=make)}.get(mask)
    plain = torch.nn.functional.scaled_dot_product_attention
    expected = plain(q, k, v, attn_mask=given, is_causal=mask == "causal", scale=scale)
    weights = attention_weights(q, k, given, mask == "causal", scale)
    assert torch.allclose(weights @ v, expected, atol=1e-6)
    with fast_dropout(CPU, 1):
        ours = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=given, is_causal=mask == "causal", scale=scale, dropout_p=1e-9
        )
    assert torch.allclose(ours, expected, atol=1e-6)


def test_attention_dropout_with_grouped_queries_and_in_the_mean():
    make = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 6, 8, generator=make)
    k, v = (torch.randn(1, 2, 6, 8, generator=make) for _ in range(2))
    plain = torch.nn.functional.scaled_dot_product_attention
    expected = plain(q, k, v, enable_gqa=True)
    with fast_dropout(CPU, 3):
        attention = torch.nn.functional.scaled_dot_product_attention
        assert torch.allclose(attention(q, k, v, enable_gqa=True, dropout_p=1e-9), expected, atol=1e-6)
        drawn = torch.stack([attention(q, k, v, enable_gqa=True, dropout_p=0.3) for _ in range(3000)])
    assert not torch.allclose(drawn[0], drawn[1])
    assert torch.allclose(drawn.mean(0), expected, atol=0.08)


def test_the_source_draws_any_number_of_booleans():
    source = Source(1)
    for shape in ((), (1,), (3,), (4, 5), (2, 3, 7)):
        assert source.keep(torch.Size(shape), 0.5).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "causal", "learned"])
def test_gradients_of_attention_are_those_of_torch(mask, dtype):
    make = torch.Generator().manual_seed(0)
    queries = [torch.randn(2, length, heads, 8, generator=make) for length, heads in ((5, 4), (7, 2), (7, 2))]
    allowed = torch.rand(2, 1, 5, 7, generator=make) > 0.3
    allowed[..., 0] = True
    numbers = torch.randn(2, 4, 5, 7, generator=make).to(dtype)
    given = {"boolean": allowed, "additive": numbers, "learned": numbers.clone().requires_grad_()}.get(mask)
    along = torch.randn(2, 4, 5, 8, generator=make).to(dtype)
    found = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def gradients(attention, p: float, kind: torch.dtype):
        q, k, v = (x.to(dtype).to(kind).transpose(1, 2).requires_grad_() for x in queries)
        more = [given] if mask == "learned" else []
        at = given.detach().to(kind).requires_grad_() if mask == "learned" else given
        at = at.to(kind) if mask == "additive" else at
        out = attention(q, k, v, attn_mask=at, is_causal=mask == "causal", dropout_p=p, enable_gqa=True)
        wanted = [q, k, v, *([at] if more else [])]
        return [out.detach(), *torch.autograd.grad(out, wanted, along.to(kind))]

    expected = gradients(plain, 0.0, torch.float64)
    with fast_dropout(CPU, 1):
        ours = torch.nn.functional.scaled_dot_product_attention
        found = [gradients(ours, p, dtype) for p in (1e-9, 0.0)]
    for got in found:
        for one, other in zip(got, expected):
            assert one.dtype == dtype
            assert (one - other).norm() / other.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


def test_masks_of_attention_dropout_are_those_of_its_gradient():
    """v is the identity, so the output is the dropped weights; where they are zero, the scores have no part in it."""
    q, k = (torch.randn(1, 1, 6, 6, requires_grad=True) for _ in range(2))
    with fast_dropout(CPU, 3):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, torch.eye(6)[None, None], dropout_p=0.5)
    kept = (out != 0).float()
    weights = torch.softmax(q.detach() @ k.detach().mT * 6**-0.5, -1).requires_grad_()
    assert torch.allclose(out, 2 * weights * kept, atol=1e-6) and 0 < kept.mean() < 1
    along = torch.randn(out.shape)
    (got,) = torch.autograd.grad(out, q, along)
    scores = (q @ k.mT * 6**-0.5).softmax(-1) * kept * 2
    (wanted,) = torch.autograd.grad(scores, q, along)
    assert torch.allclose(got, wanted, atol=1e-6)


def test_attention_with_dropout_is_computed_in_few_passes():
    query = torch.randn(2, 3, 5, 4, requires_grad=True)
    with fast_dropout(torch.device("cpu"), 1):
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.3)
        evaluated = torch.nn.functional.scaled_dot_product_attention(*[query.detach()] * 3)
    assert type(out.grad_fn).__name__ == "AttentionBackward" and evaluated.grad_fn is None
