"""What every method must hold, on every kind of model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import tiny
import torch
from torch import nn

from graftkit import NotFoldable, UserError, attach, detach, load
from graftkit.backbone.anatomy import Added
from graftkit.catalogue import entries
from graftkit.graft import Graft
from graftkit.methods.base import read
from graftkit.plan import make_plan

# At least one example of each method; those that only change other methods stand beside one.
EXPRESSIONS = {
    "adapter": ["adapter(bottleneck=5)", "adapter(bottleneck=3, norms=False)"],
    "bitfit": ["bitfit()"],
    "freeze": ["full() + freeze('embeddings')"],
    "full": ["full()"],
    "head": ["head(classes=3, pooling='mean', hidden=6)", "head(classes=2, pooling='attention')"],
    "layerwise_lr": ["unfreeze('blocks') + layerwise_lr(decay=0.5)"],
    "lora": ["lora(rank=3)", "lora(rank=2, sites='q,v', dropout=0.5, alpha=3) + head(classes=2)"],
    "prefix": ["prefix(tokens=3)", "prefix(tokens=2, hidden=5)"],
    "unfreeze": ["unfreeze('blocks[-1:]')"],
}
CASES = [(kind, text) for name in sorted(EXPRESSIONS) for text in EXPRESSIONS[name] for kind in tiny.KINDS]
REFUSED = {("llama", "bitfit()")}
NATIVE = [
    "lora(rank=2) + head(classes=3)",
    "unfreeze('blocks[-1:]') + head(classes=5)",
    "full() + head(classes=3)",
]
CASES += [(f"{kind}+head", text) for text in NATIVE for kind in tiny.KINDS]
IDENTITIES = {"lora", "adapter", "bitfit", "full", "unfreeze", "freeze", "layerwise_lr"}

torch.set_num_threads(1)


@pytest.fixture(params=[c for c in CASES if c not in REFUSED], ids=lambda c: f"{c[0]}-{c[1]}")
def case(request) -> tuple[str, str]:
    return request.param


def fresh(kind: str) -> nn.Module:
    return tiny.with_head(kind[:-5]) if kind.endswith("+head") else tiny.bare(kind)


def grafted(case: tuple[str, str], name: str = "default") -> Graft:
    """A graft on the case's model, all of its parameters random."""
    graft = attach(fresh(case[0]), case[1], name=name)
    shake(graft)
    return graft


def shake(graft: Graft, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graft.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def train(graft: Graft, steps: int = 2, lr: float = 1e-2) -> set[str]:
    """Real optimizer steps with dropout on; the names of parameters that had a gradient."""
    torch.manual_seed(0)
    graft.model.train()
    optimizer = torch.optim.AdamW(graft.param_groups(lr=lr, weight_decay=0.01))
    had: set[str] = set()
    for step in range(steps):
        given = tiny.batch(seed=step)
        loss = tiny.flat(graft.model(**given), given["attention_mask"]).square().mean()
        loss.backward()
        had |= {n for n, p in graft.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        stray = [n for n, p in graft.model.named_parameters() if p.grad is not None and n not in graft.labels]
        assert not stray
        optimizer.step()
        optimizer.zero_grad()
    return had


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def test_every_method_has_an_example():
    assert set(EXPRESSIONS) == set(entries("method")), "give a new method its examples in EXPRESSIONS"
    for name, texts in EXPRESSIONS.items():
        assert all(name in {m.name for m in read(text).methods} for text in texts)


def test_unlabelled_is_frozen_and_labelled_trains(case):
    graft = attach(fresh(case[0]), case[1])
    required = {n for n, p in graft.model.named_parameters() if p.requires_grad}
    assert required == set(graft.labels) and required
    before = tiny.snapshot(graft.model)
    had = train(graft)
    after = tiny.snapshot(graft.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert had == set(graft.labels)
    assert moved == set(graft.labels)


def test_base_names_and_values_are_untouched(case):
    plain = fresh(case[0])
    graft = attach(fresh(case[0]), case[1])
    replaced = tuple(f"{name}." for name in graft._replaced)
    state = graft.model.state_dict()
    for name, value in plain.state_dict().items():
        if not name.startswith(replaced or "\0"):
            assert torch.equal(state[name], value), name
    other = fresh(case[0])
    tiny.randomize(other, seed=9)
    checkpoint = {n: v for n, v in other.state_dict().items() if not n.startswith(replaced or "\0")}
    result = graft.model.load_state_dict(checkpoint, strict=False)
    assert not result.unexpected_keys
    before = attach(other, case[1])
    added = {n: p for n, p in graft.parameters.items() if graft.labels[n].role != "base"}
    with torch.no_grad():
        for name, parameter in before.parameters.items():
            if name in added:
                parameter.copy_(added[name])
    assert torch.equal(tiny.outputs(graft.model), tiny.outputs(before.model))


def test_starts_as_the_identity(case):
    if not {method.name for method in read(case[1]).methods} <= IDENTITIES:
        pytest.skip("does not claim to")
    wanted = tiny.outputs(fresh(case[0]))
    assert torch.equal(tiny.outputs(attach(fresh(case[0]), case[1]).model), wanted)


@pytest.mark.parametrize("name", ["default", "other"])
def test_save_and_load(case, name, tmp_path):
    graft = grafted(case)
    wanted = tiny.outputs(graft.model)
    graft.save(tmp_path / "graft")
    again = load(fresh(case[0]), tmp_path / "graft", name=name)
    assert torch.equal(tiny.outputs(again.model), wanted)
    again.save(tmp_path / "again")
    third = load(fresh(case[0]), tmp_path / "again")
    assert torch.equal(tiny.outputs(third.model), wanted)
    with third.disabled():
        third.save(tmp_path / "asleep")
    fourth = load(fresh(case[0]), tmp_path / "asleep")
    assert torch.equal(tiny.outputs(fourth.model), wanted)


def test_disable_and_enable(case):
    base = tiny.outputs(fresh(case[0]))
    graft = grafted(case)
    wanted = tiny.outputs(graft.model)
    for _ in range(2):
        graft.disable()
        assert torch.equal(tiny.outputs(graft.model), base)
        graft.enable()
        assert torch.equal(tiny.outputs(graft.model), wanted)
    assert not torch.equal(wanted, base) if wanted.shape == base.shape else True


def test_fold_and_unfold(case):
    graft = grafted(case)
    before = tiny.snapshot(graft.model)
    wanted = tiny.outputs(graft.model)
    try:
        graft.fold()
    except NotFoldable as error:
        assert any(f"{method.name}()" in str(error) for method in graft.method.methods)
        same(tiny.snapshot(graft.model), before)
        assert torch.equal(tiny.outputs(graft.model), wanted)
        return
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5
    graft.unfold()
    same(tiny.snapshot(graft.model), before)
    assert torch.equal(tiny.outputs(graft.model), wanted)
    graft.fold()
    graft.disable()  # also when it is folded, disabling gives the base
    assert torch.equal(tiny.outputs(graft.model), tiny.outputs(fresh(case[0])))


def test_meta_device_and_plan(case):
    with torch.device("meta"):
        shapes = fresh(case[0])
    planned = attach(shapes, case[1], keep_base=False)
    real = attach(fresh(case[0]), case[1])
    count = sum(p.numel() for p in real.parameters.values())
    assert {n: p.shape for n, p in planned.parameters.items()} == {
        n: p.shape for n, p in real.parameters.items()
    }
    assert all(p.is_meta for p in planned.parameters.values())
    numbers = {
        "rows": 8,
        "batch_size": 4,
        "steps_per_epoch": 2,
        "steps": 4,
        "precision": "fp32",
        "frozen_blocks": 0,
    }
    for graft in (planned, real):
        plan = make_plan(graft, **numbers)
        assert plan.trained_parameters == count == sum(plan.groups.values())


def test_param_groups_hold_each_labelled_parameter_once(case):
    graft = attach(fresh(case[0]), case[1])
    members = [id(p) for group in graft.param_groups() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in graft.parameters.values())


def test_deepcopy_is_independent(case):
    graft = grafted(case)
    wanted = tiny.outputs(graft.model)  # a pass beforehand: nothing of it may stand in the way of a copy
    graft.model.train()
    graft.model(**tiny.batch())
    twin = copy.deepcopy(graft)
    shake(twin)
    assert torch.equal(tiny.outputs(graft.model), wanted)
    changed = tiny.outputs(twin.model)
    assert not torch.equal(changed, wanted)
    shake(graft, seed=7)
    assert torch.equal(tiny.outputs(twin.model), changed)
    twin.disable()
    assert torch.equal(tiny.outputs(twin.model), tiny.outputs(fresh(case[0])))
    model = copy.deepcopy(graft.model)
    assert torch.equal(tiny.outputs(model), tiny.outputs(graft.model))


def test_expression_round_trips(case):
    method = read(case[1])
    assert read(str(method)) == method
    resolved = attach(fresh(case[0]), case[1]).method
    assert read(str(resolved)) == resolved


def described(model: nn.Module) -> tuple:
    modules = {name: id(module) for name, module in model.named_modules()}
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules() if name
    }
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    config = model.config
    return modules, hooks, required, config.num_labels, config.id2label, config._attn_implementation


def test_failed_attach_leaves_the_model_as_it_was(case):
    @dataclasses.dataclass(frozen=True)
    class Broken(type(read("bitfit()").methods[0])):
        def attach(self, backbone, graft):
            raise UserError("broken on purpose")

    model = fresh(case[0])
    wanted, state, before = tiny.outputs(model), tiny.snapshot(model), described(model)
    with pytest.raises(UserError, match="on purpose"):
        attach(model, read(case[1]) + Broken())
    assert described(model) == before
    same(tiny.snapshot(model), state)
    assert torch.equal(tiny.outputs(model), wanted)
    assert attach(model, case[1]).labels


def test_detach_gives_the_plain_model_back(case):
    model = fresh(case[0])
    wanted, state, before = tiny.outputs(model), tiny.snapshot(model), described(model)
    graft = attach(model, case[1])
    shake(graft)
    assert detach(graft) is model
    assert described(model) == before
    assert not any(isinstance(module, Added) for module in model.modules())
    same(tiny.snapshot(model), state)
    assert torch.equal(tiny.outputs(model), wanted)


def test_gradients_accumulate(case):
    graft = grafted(case)
    graft.model.eval()
    first, second = tiny.batch(seed=1), tiny.batch(seed=2)

    def gradients(batches: list) -> dict[str, torch.Tensor]:
        graft.model.zero_grad()
        for given in batches:
            tiny.flat(graft.model(**given), given["attention_mask"]).square().sum().backward()
        return {name: p.grad.clone() for name, p in graft.parameters.items()}

    apart = [gradients([given]) for given in (first, second)]
    together = gradients([first, second])
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[0][name] + apart[1][name])


def test_half_precision_base(case):
    model = fresh(case[0]).bfloat16()
    graft = attach(model, case[1])
    assert all(
        p.dtype == torch.float32 for n, p in graft.parameters.items() if graft.labels[n].role == "added"
    )
    with torch.autocast("cpu", torch.bfloat16):
        given = tiny.batch()
        tiny.flat(graft.model(**given), given["attention_mask"]).float().square().mean().backward()
    for name, parameter in graft.parameters.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind,text", sorted(REFUSED))
def test_refused_by_name(kind, text):
    model = fresh(kind)
    before = described(model)
    with pytest.raises(UserError, match=text.split("(")[0]):
        attach(model, text)
    assert described(model) == before
