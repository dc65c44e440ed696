"""LoRA as one operation beside the hooks that it stands in for, in outputs, gradients and all that has to fall back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import tiny
import torch
from shaken import shaken
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftkit import using
from graftkit.engine.precision import autocast, cast
from graftkit.methods.shared.joined import Joining

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def grafted(kind: str, text: str = "lora(rank=2)", precision: str = "fp32"):
    model = tiny.bare(kind)
    graft = shaken(model, text)
    graft.requires_grad_()
    cast(model, graft.labels, precision)
    return model.eval(), graft


@contextmanager
def joined(model: nn.Module) -> Iterator[list[int]]:
    """Yield the number of layers in each group."""
    joining = Joining(model)

    @torch.no_grad()
    def call() -> None:
        model(**tiny.batch(rows=1))

    joining.enter(call)
    try:
        yield [len(group.members) for group in joining.groups]
    finally:
        joining.leave()
    assert not any("forward" in vars(module) for module in model.modules())


def passed(model: nn.Module, precision: str = "fp32") -> dict[str, Tensor]:
    """The output and all gradients, of the embeddings too."""
    model.zero_grad()
    given = tiny.batch()
    ids, embed = given.pop("input_ids"), model.get_input_embeddings()
    x = embed(ids).detach().requires_grad_()
    with autocast(CPU, precision):
        out = model(inputs_embeds=x, **given)[0]
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys() and len(got) > 4
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        assert tiny.relative(got[name].float(), tensor.float()) < tolerance, name


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 6e-2)])
def test_outputs_and_gradients_are_those_of_the_hooks(kind, precision, tolerance):
    model, _ = grafted(kind, "lora(rank=2, rank_pattern={'q': 3}, sites='q,v,gate,o', use_rslora=true)" if kind == "llama"
                       else "lora(rank=2, sites='q,v')", precision)  # fmt: skip
    wanted = passed(model, precision)
    with joined(model) as groups:
        assert groups.count(3) == tiny.BLOCKS and (kind != "llama" or groups.count(2) == tiny.BLOCKS)
        assert_same(passed(model, precision), wanted, tolerance)
        assert_same(passed(model, precision), wanted, tolerance)


def test_they_are_those_of_peft(tmp_path: Path):
    base = tiny.bare("llama")
    graft = shaken(copy.deepcopy(base), "lora(rank=2)")
    graft.requires_grad_()
    graft.save(tmp_path / "graft")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "graft"), is_trainable=True).eval()
    wanted = passed(theirs)
    with joined(graft.model.eval()):
        got = passed(graft.model)
    assert tiny.relative(got["out"], wanted["out"]) < 1e-5 and tiny.relative(got["x"], wanted["x"]) < 1e-5
    for name in graft.parameters:
        key = "base_model.model." + name.replace("lora_default.A", "lora_A.default.weight")
        key = key.replace("lora_default.B", "lora_B.default.weight")
        assert tiny.relative(got[name], wanted[key]) < 1e-5, name


def test_several_grafts_new_values_and_those_switched_off():
    model, first = grafted("llama")
    second = shaken(model, "lora(rank=3, sites='q,up')", name="second", seed=9)
    model.eval()
    wanted = passed(model)
    with joined(model):
        assert_same(passed(model), wanted)
        with torch.no_grad():
            for parameter in second.parameters.values():
                parameter.mul_(-2)
        got, got_disabled = passed(model), None
        with first.disabled():
            got_disabled = tiny.outputs(model)
        with using(model, {"default": 0.5, "second": 2.0}):
            got_mixed = tiny.outputs(model)
    assert_same(got, passed(model))
    with first.disabled():
        assert tiny.relative(got_disabled, tiny.outputs(model)) < 1e-6
    with using(model, {"default": 0.5, "second": 2.0}):
        assert tiny.relative(got_mixed, tiny.outputs(model)) < 1e-6


@pytest.mark.parametrize("text", ["dora(rank=2)", "lora(rank=2, lora_bias=true)", "lora(rank=2, dropout=0.5)",
                                  "lora(rank=2) + ia3()", "adalora(rank=2, target_rank=1)"])  # fmt: skip
def test_what_does_more_than_a_product_stays_with_the_hooks(text):
    model, _ = grafted("llama", text)
    wanted = passed(model)
    with joined(model) as groups:
        assert (len(groups) > 0) == ("ia3" in text)  # ia3 has no place at most of the layers
        assert_same(passed(model), wanted)


class Block(nn.Module):
    """q and k of one input, and v of another: a group in which one is called with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return self.q(x) * self.k(x if other is None else other).sigmoid() + self.v(x)


def test_another_input_a_checkpoint_and_a_compiler():
    model = nn.Sequential(Block(), Block())
    graft = shaken(model, "lora(rank=2, sites='re:.*')")
    graft.requires_grad_()
    x, other = torch.randn(2, 3, 5, 6)

    def losses() -> Tensor:
        first = model[0](x, other)
        second = checkpoint(model[1], first, use_reentrant=False)
        return torch.stack([second.sum(), model(x).square().sum()])

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(losses().sum(), graft.parameters.values()))

    wanted, values = gradients(), losses().detach()
    joining = Joining(model)
    joining.enter(lambda: model(x))
    assert [len(group.members) for group in joining.groups] == [3, 3]
    for got, one in zip(gradients(), wanted, strict=True):
        assert tiny.relative(got, one) < 1e-5
    assert torch.allclose(losses(), values, rtol=1e-5)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(traced(x).square().sum(), graft.parameters.values())
    joining.leave()
    plain = torch.autograd.grad(model(x).square().sum(), graft.parameters.values())
    assert all(tiny.relative(a, b) < 1e-5 for a, b in zip(got, plain, strict=True))


def test_a_model_may_change_an_output_in_place():
    """As wav2vec 2.0 does with the states of padding."""

    class Zeroed(Block):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            states = self.q(x)
            states[:, 0] = 0
            return states * self.k(x) + self.v(x)

    model = nn.Sequential(Zeroed(), Zeroed())
    graft = shaken(model, "lora(rank=2, sites='re:.*')")
    graft.requires_grad_()
    x = torch.randn(3, 5, 6)
    wanted = torch.autograd.grad(model(x).square().sum(), graft.parameters.values())
    joining = Joining(model)
    joining.enter(lambda: model(x))
    assert joining.groups
    got = torch.autograd.grad(model(x).square().sum(), graft.parameters.values())
    joining.leave()
    assert all(tiny.relative(a, b) < 1e-5 for a, b in zip(got, wanted, strict=True))
