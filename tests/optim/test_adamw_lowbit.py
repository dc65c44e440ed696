"""adamw8bit and adamw4bit: AdamW between two quantizations, against bitsandbytes and a plain reference."""

import pytest
import torch
from test_blockwise import nearest

from graftkit import AdamW, AdamW4bit, AdamW8bit
from graftkit.optim.shared import moments

SHAPE = (67, 63)  # 4,221 elements
LR, DECAY = 0.01, 0.1
KINDS = {8: AdamW8bit, 4: AdamW4bit}


def gradients(steps: int, shape=SHAPE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-1, 0.5, shape[-1]) if shape else torch.ones(())
    return [torch.randn(shape, generator=generator) * size for _ in range(steps)]


def start(shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make(parameter, value, lr=LR):
    return value.make([{"params": [parameter], "lr": lr, "weight_decay": DECAY}])


def trained(value, weight: torch.Tensor, steps: int = 6) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(weight)
    optimizer = make(parameter, value)
    for gradient in gradients(steps, weight.shape):
        parameter.grad = gradient.to(weight.dtype)
        optimizer.step()
    return parameter


@pytest.mark.parametrize("bits", [8, 4])
def test_steps_are_those_of_adamw_between_two_quantizations(bits):
    weight = start()
    first, second = torch.zeros(weight.numel()), torch.zeros(weight.numel())
    for step, gradient in enumerate(gradients(6), 1):
        g = gradient.flatten()
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g * g
        m, v = first / (1 - 0.9**step), second / (1 - 0.999**step)
        weight = weight - LR * DECAY * weight - LR * (m / (v.sqrt() + 1e-8)).view(SHAPE)
        first, second = nearest(first, moments.FORMATS[bits][0]), nearest(second, moments.FORMATS[bits][1])
    found = trained(KINDS[bits](), start()).detach()
    # a number in the middle of two values of the code may go to either: its later steps differ
    assert ((found - weight).abs() < 1e-6).float().mean() > 0.998
    assert (found - weight).abs().max() < 6 * LR


def test_steps_in_eight_bits_are_those_of_bitsandbytes():
    """Its kernel for CPUs rounds small numbers through a table, so a few of them have the value beside the nearest."""
    pytest.importorskip(
        "bitsandbytes", minversion="0.50", reason="bitsandbytes before 0.50 has no optimizers on a CPU"
    )
    library = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = torch.nn.Parameter(start()), torch.nn.Parameter(start())
    mine = make(ours, AdamW8bit())
    other = library.AdamW8bit([theirs], lr=LR, weight_decay=DECAY, betas=(0.9, 0.999))
    for gradient in gradients(6):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    state, expected = mine.state[ours], other.state[theirs]
    for key, name, share in (("exp_avg", "1", 0.98), ("exp_avg_sq", "2", 0.9)):
        assert (state[key] == expected[f"state{name}"].flatten()).float().mean() > share
        torch.testing.assert_close(state[f"{key}_scale"], expected[f"absmax{name}"])
    difference = (ours - theirs).abs() / LR
    assert (difference < 0.1).float().mean() > 0.97 and difference.mean() < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_small_tensors_have_plain_adamw_in_fp32(bits):
    for shape in ((63, 65), (9,), ()):  # 4,095 elements
        found, expected = (trained(value, start(shape)) for value in (KINDS[bits](), AdamW()))
        torch.testing.assert_close(found, expected)
    parameter = torch.nn.Parameter(start((63, 65)).bfloat16())
    optimizer = make(parameter, KINDS[bits]())
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 4])
def test_large_tensors_are_stepped_in_parts(bits, monkeypatch):
    whole = trained(KINDS[bits](), start())
    for name in ("CHUNK", "CHUNK_ON_CPU"):
        monkeypatch.setattr(moments, name, 512)
    assert torch.equal(trained(KINDS[bits](), start()), whole)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_other_orders_of_memory_and_dtypes(bits):
    turned = torch.nn.Parameter(start().T.contiguous().T)
    assert not turned.is_contiguous()
    plain = torch.nn.Parameter(start())
    pair = [(p, make(p, KINDS[bits]())) for p in (turned, plain)]
    for gradient in gradients(3):
        for parameter, optimizer in pair:
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(turned, plain)
    low = trained(KINDS[bits](), start().bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), trained(KINDS[bits](), start()), atol=0.05, rtol=0.05)


def test_it_trains():
    generator = torch.Generator().manual_seed(3)
    inputs, target = torch.randn(256, 64, generator=generator), torch.randn(64, 64, generator=generator)
    wanted = inputs @ target

    def loss(value, steps: int = 100) -> float:
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = value.make([{"params": [weight], "lr": 0.05, "weight_decay": 0.0}])
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
            rows = slice(step % 4 * 64, step % 4 * 64 + 64)
            (inputs[rows] @ weight - wanted[rows]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return (inputs @ weight - wanted).square().mean().item()

    before, full = wanted.square().mean().item(), loss(AdamW())
    assert full < 0.05 * before
    assert loss(AdamW8bit()) < 1.1 * full and loss(AdamW4bit()) < 0.1 * before
