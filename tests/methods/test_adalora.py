"""AdaLoRA: its formula, its schedule and cuts beside PEFT's allocator, in runs, resumed runs and loops of one's own."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import tiny
import torch
import zoo
from shaken import ALL_KINDS, count, message, shaken
from torch import Tensor, nn

import graftkit
from graftkit import Backbone, UserError, attach, load
from graftkit.backbone import select
from graftkit.backbone.weights import weights_at
from graftkit.methods.adalora import AdaLoRA

pytestmark = pytest.mark.sampled


def updates(graft) -> list[Any]:
    return [module for _, module in graft.additions()]


def kept(graft) -> dict[str, list[bool]]:
    """Which singular values are not zero, by the name of the module that is updated."""
    return {
        name.removesuffix(".adalora_default"): (module.E != 0).flatten().tolist()
        for name, module in graft.additions()
    }


def task_loss(graft, seed: int = 1) -> Tensor:
    given = tiny.batch(seed=seed)
    return tiny.flat(graft.model(**given), given["attention_mask"]).square().mean()


def train(graft, steps: int, first: int = 1, until: int | None = None, optimizer: Any = None) -> Any:
    """A loop of one's own, as the documentation has it."""
    optimizer = optimizer or torch.optim.AdamW(graft.param_groups(lr=1e-2))
    graft.model.eval()
    for step in range(first, (until or steps) + 1):
        loss = task_loss(graft, seed=step)
        extra = graft.extra_loss()
        (loss + extra).backward()
        optimizer.step()
        graft.after_step(step, steps)
        optimizer.zero_grad()
    return optimizer


# ---- what it is


@pytest.mark.parametrize("name", [model.name for model in zoo.MODELS])
def test_numbers_of_parameters(name):
    model = zoo.BY_NAME[name]
    wanted = 0
    backbone = Backbone(model.fresh())
    for site in select(backbone, "all-linear"):
        for weight in weights_at(backbone, site):
            experts, shape = (
                (weight.shape[0], weight.shape[1:]) if weight.kind == "experts" else (1, weight.shape)
            )
            wanted += experts * 3 * (shape[0] + torch.Size(shape[1:]).numel() + 1)
    assert count(attach(model.fresh(), "adalora(rank=3, target_rank=1)")) == wanted


@pytest.mark.parametrize("name", ["bert", "gpt2", "transformer", "mixtral", "resnet"])
def test_the_update_is_its_formula(name):
    graft = shaken(zoo.BY_NAME[name].fresh(), "adalora(rank=4, target_rank=2, alpha=3)")
    (method,) = graft.method.methods
    for _, weight in method.targets(graft.backbone):
        update: Any = method.update_at(weight, graft.name)
        wanted = 3 / (4 + 1e-5) * update.B @ torch.diag_embed(update.E.squeeze(-1)) @ update.A
        assert tiny.relative(update.delta(weight), wanted.view(weight.shape)) < 1e-6


@ALL_KINDS
def test_what_is_computed_is_what_is_folded(kind):
    graft = shaken(tiny.bare(kind), "adalora(rank=3, target_rank=2)")
    wanted = tiny.outputs(graft.model)
    graft.fold()
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5


def test_the_extra_loss_is_the_mean_deviation_from_orthogonality():
    graft = shaken(tiny.bare("bert"), "adalora(rank=3, target_rank=2, orthogonality=0.25)")
    norms = []
    for update in updates(graft):
        for product in (update.A @ update.A.T, update.B.T @ update.B):
            norms.append(torch.linalg.matrix_norm(product - torch.eye(3)))
    assert float(graft.extra_loss()) == pytest.approx(0.25 * float(torch.stack(norms).mean()), rel=1e-6)
    assert attach(tiny.bare("bert"), "adalora(orthogonality=0)").extra_loss() is None
    assert attach(tiny.bare("bert"), "lora()").extra_loss() is None


def test_the_extra_loss_has_a_gradient_where_matrices_are_orthogonal():
    graft = attach(tiny.bare("bert"), "adalora(rank=2, target_rank=1)")
    with torch.no_grad():
        for update in updates(graft):
            nn.init.orthogonal_(update.A)
            nn.init.eye_(update.B)
    graft.extra_loss().backward()
    assert all(torch.isfinite(p.grad).all() for p in graft.parameters.values() if p.grad is not None)


# ---- the schedule


def test_the_budget_falls_with_the_third_power():
    method = AdaLoRA(rank=12, target_rank=4, warmup_steps=10, final_steps=30)
    budgets = [method.budget(step, 100, matrices=5) for step in range(1, 101)]
    assert budgets[:10] == [60] * 10 and budgets[69:] == [20] * 31
    for step in (11, 40, 69):
        assert budgets[step - 1] == int(20 + 40 * (1 - (step - 10) / 60) ** 3)
    assert sorted(budgets, reverse=True) == budgets


def test_the_default_span_is_a_share_of_the_run():
    assert AdaLoRA().span(200) == (20, 140)
    assert AdaLoRA(warmup_steps=3).span(200) == (3, 140)
    for steps in range(1, 40):
        first, last = AdaLoRA().span(steps)
        assert 0 <= first < last <= steps


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_a_run_of_any_length_ends_with_the_target_rank(steps):
    graft = attach(tiny.bare("bert"), "adalora(rank=4, target_rank=1)")
    train(graft, steps)
    assert sum(map(sum, kept(graft).values())) == len(updates(graft))


def test_triplets_that_were_cut_last_stay_zero():
    graft = attach(tiny.bare("bert"), "adalora(rank=4, target_rank=1, warmup_steps=2, final_steps=6)")
    optimizer = train(graft, 14, until=8)
    last = kept(graft)
    assert len({sum(row) for row in last.values()}) > 1  # some maps keep more than others
    train(graft, 14, first=9, optimizer=optimizer)
    assert kept(graft) == last


def test_peft_reads_what_was_cut_as_zeros(tmp_path):
    """And with the same scale: in PEFT too it is that of the rank before the cuts."""
    peft = pytest.importorskip("peft")
    graft = attach(tiny.bare("bert"), "adalora(rank=4, target_rank=1, warmup_steps=2, final_steps=6)")
    train(graft, 14)
    assert not all(all(row) for row in kept(graft).values())
    graft.save(tmp_path)
    graft.model.eval()
    wanted = tiny.outputs(graft.model)
    assert tiny.relative(wanted, tiny.outputs(tiny.bare("bert"))) > 1e-3
    theirs = peft.PeftModel.from_pretrained(tiny.bare("bert"), str(tmp_path)).eval()
    assert tiny.relative(tiny.outputs(theirs), wanted) < 1e-5


def test_without_the_call_the_rank_stays():
    graft = attach(tiny.bare("bert"), "adalora(rank=4, target_rank=1)")
    optimizer = torch.optim.AdamW(graft.param_groups(lr=1e-2))
    for step in range(6):
        task_loss(graft, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(all(row) for row in kept(graft).values())


# ---- beside PEFT


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 7)
        self.third = nn.Linear(7, 18)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def with_peft(model: nn.Module, **settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.AdaLoraConfig(**settings)).eval()


SCHEDULES = [
    {"tinit": 0, "tfinal": 0, "deltaT": 1}, {"tinit": 3, "tfinal": 4, "deltaT": 1},
    {"tinit": 2, "tfinal": 5, "deltaT": 3}, {"tinit": 0, "tfinal": 13, "deltaT": 2, "beta1": 0.5, "beta2": 0.7},
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_cuts_are_those_of_peft(schedule):
    """The same values and gradients in each step: the same triplets are cut, and the same importance is remembered."""
    steps, generator = 20, torch.Generator().manual_seed(0)
    settings = {
        "init_r": 5,
        "target_r": 2,
        "total_step": steps,
        "target_modules": ["first", "second"],
        **schedule,
    }
    theirs = with_peft(Maps(), **settings)
    text = (
        f"adalora(rank=5, target_rank=2, alpha=8, sites='first,second', warmup_steps={schedule['tinit']}, "
        f"final_steps={schedule['tfinal']}, every={schedule['deltaT']}, beta1={schedule.get('beta1', 0.85)}, "
        f"beta2={schedule.get('beta2', 0.85)})"
    )
    ours = attach(Maps(), text)
    pairs = []
    for name in ("first", "second"):
        layer, update = getattr(theirs.base_model.model, name), getattr(ours.model, name).adalora_default
        pairs += [(getattr(layer, f"lora_{part}")["default"], getattr(update, part)) for part in "ABE"]
    seen = set()
    for step in range(1, steps + 1):
        for their, our in pairs:
            value, gradient = (torch.randn(our.shape, generator=generator) for _ in range(2))
            for parameter in (their, our):
                parameter.data.copy_(value)
                parameter.grad = gradient.clone()
        theirs.base_model.update_and_allocate(step)
        ours.after_step(step, steps)
        for their, our in pairs:
            assert torch.equal(their, our), step
        seen.add(str(kept(ours)))
        allocator = theirs.base_model.rankallocator
        for name, average in allocator.exp_avg_ipt.items():
            module, part = name.split(".")[0], name.split(".lora_")[1][0]
            update = getattr(ours.model, module).adalora_default
            assert torch.equal(average, getattr(update, f"{part}_importance"))
            assert torch.equal(allocator.exp_avg_unc[name], getattr(update, f"{part}_deviation"))
    assert len(seen) > 2
    last = theirs.peft_config["default"].rank_pattern
    for name, mask in last.items():
        assert getattr(ours.model, name.split(".")[0]).adalora_default.kept.flatten().tolist() == mask


def test_training_is_that_of_peft():
    """Loss, regulariser, optimizer and cuts together: the same parameters after each of 12 steps."""
    steps = 12
    settings = {
        "init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": steps, "tinit": 2, "tfinal": 4,
        "orth_reg_weight": 0.3, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "modules_to_save": [],
    }  # fmt: skip
    theirs = with_peft(tiny.with_head("bert"), **settings)
    ours = attach(
        tiny.with_head("bert"),
        "adalora(rank=4, target_rank=2, alpha=6, sites='query,dense', warmup_steps=2, final_steps=4, orthogonality=0.3)",
    )
    ours.model.eval()
    named = dict(theirs.named_parameters())
    pairs = {
        name: named[f"base_model.model.{name.replace('adalora_default.', 'lora_')}.default"]
        for name in ours.parameters
    }
    with torch.no_grad():
        for name, parameter in ours.parameters.items():
            parameter.copy_(pairs[name])
    optimizers = [torch.optim.AdamW(list(p), lr=1e-2) for p in (pairs.values(), ours.parameters.values())]
    for step in range(1, steps + 1):
        given = {**tiny.batch(seed=step), "labels": torch.tensor([0, 1, 2, 1])}
        theirs(**given).loss.backward()
        (ours.model(**given).loss + ours.extra_loss()).backward()
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        ours.after_step(step, steps)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, parameter in ours.parameters.items():
            torch.testing.assert_close(
                parameter, pairs[name], rtol=1e-4, atol=1e-5, msg=f"{name}, step {step}"
            )
    assert sum(map(sum, kept(ours).values())) == 2 * len(updates(ours))


# ---- runs


METHOD = "adalora(rank=4, target_rank=2, warmup_steps=1, final_steps=2) + head()"


def test_a_run_follows_the_schedule(ready):
    run = ready(METHOD, steps=8)
    (method, _) = run.graft.method.methods
    matrices = len(method.targets(run.graft.backbone))
    counts = []
    for step in run.loop:
        counts.append(sum(int(u.E.count_nonzero()) for u in updates(run.graft) if hasattr(u, "E")))
        assert counts[-1] == method.budget(step.number, 8, matrices)
    assert counts[0] == 4 * matrices and counts[-1] == 2 * matrices


def test_the_extra_loss_is_part_of_the_gradient_and_not_of_the_loss_that_is_shown(ready):
    """Singular values are zero at first, so A and B have no other gradient."""
    run = ready("adalora(rank=2, target_rank=1, orthogonality=0.5) + head()", steps=1)
    seen: list[Tensor] = []
    plain = run.graft.after_step

    def after_step(step: int, steps: int) -> None:
        seen.extend(u.A.grad.clone() for u in updates(run.graft) if hasattr(u, "A"))
        plain(step, steps)

    run.graft.after_step = after_step
    (step,) = list(run.loop)
    assert seen and all(bool(gradient.any()) for gradient in seen)
    without = ready("adalora(rank=2, target_rank=1, orthogonality=0) + head()", steps=1)
    (other,) = list(without.loop)
    assert step.loss == other.loss


@pytest.mark.slow
def test_resumed_at_any_step_it_ends_the_same(ready, tmp_path):
    """Importance and cuts are in the checkpoint."""
    whole = ready(METHOD, steps=8)
    list(whole.loop)
    for stop in (1, 3, 6, 7):
        first = ready(METHOD, steps=8)
        for step in first.loop:
            if step.number == stop:
                break
        first.loop.save(tmp_path / str(stop), {})
        second = ready(METHOD, steps=8)
        second.loop.restore(tmp_path / str(stop))
        list(second.loop)
        state = second.graft.state
        assert state.keys() == whole.graft.state.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.graft.state.items())


def test_what_training_remembers_is_no_part_of_the_folder(tmp_path):
    graft = attach(tiny.bare("bert"), "adalora(rank=4, target_rank=1)")
    train(graft, 6)
    remembered = {name for name in graft.state if name not in graft.tensors}
    assert len(remembered) == 7 * len(updates(graft))
    graft.save(tmp_path)
    stored = json.loads((tmp_path / "graft.json").read_text())["tensors"]
    assert len(stored) == 3 * len(updates(graft))
    again = load(tiny.bare("bert"), tmp_path)
    assert torch.equal(tiny.outputs(again.model), tiny.outputs(graft.model))
    assert kept(again) == kept(graft)


def test_a_copy_goes_its_own_way():
    graft = attach(tiny.bare("bert"), "adalora(rank=4, target_rank=1)")
    optimizer = train(graft, 12, until=4)
    twin = copy.deepcopy(graft)
    before = {name: tensor.clone() for name, tensor in twin.state.items()}
    train(graft, 12, first=5, optimizer=optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state.items())


# ---- what is refused


def test_a_target_above_the_beginning():
    told = message(tiny.bare("bert"), "adalora(rank=4)")
    assert "target_rank is 8" in told and "at most rank (4)" in told


@pytest.mark.parametrize("options", ["warmup_steps=6, final_steps=4", "warmup_steps=10", "final_steps=11"])
def test_a_schedule_longer_than_the_run(options, ready):
    text = f"adalora({options}) + head()"
    with pytest.raises(UserError, match=r"adalora\(\): warmup_steps .* final_steps .* 10 steps"):
        ready(text, steps=10)
    graft = attach(tiny.bare("bert"), f"adalora({options})")
    with pytest.raises(UserError, match="leave none of 10 steps"):
        graft.after_step(1, 10)


def test_the_plan_says_so_before_training(tiny_bert, rows_folder):
    from graftkit.recipe import schema as recipes
    from graftkit.report.console import Console
    from graftkit.runs.tune import plan

    recipe = recipes.make({
        "model": str(tiny_bert), "method": "adalora(final_steps=500) + head()", "task": "classify",
        "data": {"train": str(rows_folder / "train.csv")}, "train": {"steps": 100},
    })  # fmt: skip
    with pytest.raises(UserError, match="final_steps"):
        plan(recipe, Console(quiet=True))


def test_it_is_at_the_package_s_front():
    assert graftkit.AdaLoRA is AdaLoRA
