"""fp16 with a scaled loss, and products of frozen weights in fp8, whose arithmetic is emulated on the CPU."""

from __future__ import annotations

import pytest
import torch
from tiny import batch
from torch import nn
from transformers import BertConfig, BertModel

from graftkit.backbone import Backbone
from graftkit.engine import scaling
from graftkit.engine.fp8 import FrozenLinear, copies_bytes, quantize_frozen, quantized, refuse_fp8
from graftkit.engine.precision import with_tf32
from graftkit.engine.updates import AfterBackward
from graftkit.errors import UserError
from graftkit.grafts.attach import attach

pytestmark = pytest.mark.slow


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().float(), wanted.detach().float()
    return float((got - wanted).norm() / wanted.norm())


def test_an_overflow_repeats_the_step_with_half_the_scale(ready, monkeypatch):
    """The steps are those of a run whose scale fitted from the first on; no step is taken with what is not finite."""
    monkeypatch.setattr(scaling.Scaled, "scale", 2.0**24)
    run = ready("lora(rank=2) + head()", precision="fp16", steps=3)
    losses = [step.loss for step in run.loop]
    state = run.loop.updates.state
    assert state["repeated"] > 0 and state["scale"] == 2.0 ** (24 - state["repeated"]) > 1
    monkeypatch.setattr(scaling.Scaled, "scale", state["scale"])
    other = ready("lora(rank=2) + head()", precision="fp16", steps=3)
    assert [step.loss for step in other.loop] == losses and other.loop.updates.state["repeated"] == 0
    for name, value in run.graft.state.items():  # gradients below the least number of fp16 round otherwise
        torch.testing.assert_close(value, other.graft.state[name], rtol=0, atol=1e-6)
    plain = ready("lora(rank=2) + head()", steps=3)
    assert losses == pytest.approx([step.loss for step in plain.loop], rel=2e-2)


def test_scaled_gradients_are_those_of_the_loss_and_the_scale_follows_torch():
    """Beside torch.amp.GradScaler on the same overflows."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    updates = scaling.Scaled(optimizer, 0.0)
    updates.enter({"weight": weight})
    scaler = torch.amp.GradScaler("cpu", init_scale=scaling.FIRST, growth_interval=scaling.INTERVAL)
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    for factor in (1.0, float("inf"), 3.0):
        weight.grad = None
        updates.backward((weight * factor).sum())
        assert updates.fits() is (factor < 10)
        if factor < 10:
            assert torch.equal(weight.grad, torch.full((2,), factor))
        scaler.scale(torch.ones(1))
        other.param_groups[0]["params"][0].grad = torch.full((2,), factor * scaler.get_scale())
        scaler.step(other)
        scaler.update()
        assert updates.scale == scaler.get_scale()
    updates.good = scaling.INTERVAL - 1
    updates.backward(weight.sum())
    assert updates.fits() and updates.scale == scaling.FIRST
    fresh = scaling.Scaled(optimizer, 0.0)
    fresh.restore(updates.state)
    assert fresh.state == updates.state and AfterBackward(optimizer, 0.0).state == {}
    updates.scale = 1.0
    weight.grad = torch.full((2,), float("nan"))
    assert updates.fits(), "nothing is left to lower: the loop sees the gradients and stops"


def test_fp8_has_the_errors_of_its_format():
    """Rounding to the 3 bits of its fraction has a relative error of at most 2^-4."""
    torch.manual_seed(0)
    x = torch.randn(64, 256) * torch.logspace(-3, 3, 64)[:, None]  # rows of all magnitudes
    values, scale = quantized(x)
    large = x.abs() > x.abs().amax(1, keepdim=True) / 2**14  # smaller ones are subnormal
    assert 0.05 < float(((values.float() * scale - x).abs() / x.abs())[large].max()) <= 2.0**-4
    module = nn.Linear(256, 128).bfloat16()
    layer = FrozenLinear(module)
    x = torch.randn(4, 16, 256, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    wanted = nn.functional.linear(x.float(), module.weight.float(), module.bias.float())
    assert y.dtype == torch.bfloat16 and 0.01 < error(y, wanted) < 0.05
    gradient = torch.randn_like(wanted)
    (got,) = torch.autograd.grad(y, x, gradient.bfloat16())
    (exact,) = torch.autograd.grad(wanted, x, gradient)
    assert 0.01 < error(got, exact) < 0.05
    zero, scale = quantized(torch.zeros(2, 16))
    assert torch.equal(zero.float() * scale, torch.zeros(2, 16))


def test_frozen_layers_of_the_blocks_alone_are_in_fp8():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    graft = attach(
        Backbone(BertModel(config)), "lora(rank=4, sites='q,v') + unfreeze('re:encoder.layer.1.output.dense')"
    )
    with torch.no_grad():
        for name, parameter in graft.parameters.items():
            parameter.add_(torch.randn_like(parameter) * 0.05 * ("lora" in name))
    graft.model.eval()
    pull = torch.randn(4, 12, 64)

    def computed() -> tuple[torch.Tensor, torch.Tensor]:
        states = graft.model(**batch(length=12)).last_hidden_state
        return states, torch.cat(
            [g.flatten() for g in torch.autograd.grad((states * pull).sum(), list(graft.parameters.values()))]
        )

    wanted, gradients = computed()
    assert quantize_frozen(graft.backbone, graft.labels) == 11, "six a block, but the trained one"
    made = [m.forward for m in graft.model.modules() if isinstance(m.__dict__.get("forward"), FrozenLinear)]
    held = [t for one in made for t in vars(one).values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in held) == copies_bytes(graft.backbone, graft.labels)
    got, others = computed()
    assert 0 < error(got, wanted) < 0.06 and 0 < error(others, gradients) < 0.2


def test_fp8_is_refused_where_there_is_none_and_tf32_is_for_gpus(command, monkeypatch):
    with pytest.raises(UserError, match="needs an NVIDIA GPU, but this run is on cpu"):
        refuse_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(UserError, match="Hopper generation or later, but this is a A100"):
        refuse_fp8(torch.device("cuda"))
    assert not with_tf32(torch.device("cpu"), "fp32") and not with_tf32(torch.device("cuda"), "bf16")
    before = torch.get_float32_matmul_precision()
    try:
        assert with_tf32(torch.device("cuda"), "fp32") and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    for more in ("train.weight_type=bf16", "train.step_in_backward=true"):
        done = command("tune", "--model", "m", "--train", "t.csv", "train.precision=fp16", more)
        assert done.status == 1 and "leave" in done.err
