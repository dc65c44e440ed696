"""Several grafts on one model: which of them are active, and that they leave each other alone."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from shaken import ALL_KINDS, shaken
from side_by_side import NAMES, refusal, several, states
from torch import Tensor

from graftkit import UserError, attach, detach, load, using
from graftkit.backbone.anatomy import Added

pytestmark = pytest.mark.sampled


@ALL_KINDS
def test_exactly_the_named_ones_are_active(kind):
    model = tiny.bare(kind)
    base = tiny.outputs(model)
    first, second, third = several(model, ("lora(rank=2)", "lora(rank=3)", "lora(rank=4)"))
    alone = {}
    for graft in (first, second, third):
        graft.enable()
        alone[graft.name] = tiny.outputs(model)
        graft.disable()
    first.enable()
    third.enable()
    both = tiny.outputs(model)
    for name in NAMES:
        with using(model, name):
            assert torch.equal(tiny.outputs(model), alone[name])
            assert [g.active for g in (first, second, third)] == [
                g.name == name for g in (first, second, third)
            ]
    with using(model, []):
        assert torch.equal(tiny.outputs(model), base)
    with using(model, ["support-de", "sales"]) as same:
        assert same is model and torch.equal(tiny.outputs(model), both)
    with pytest.raises(RuntimeError, match="on purpose"), using(model, "sales"):
        raise RuntimeError("on purpose")
    assert torch.equal(tiny.outputs(model), both)


def test_contexts_nest():
    model = tiny.bare("bert")
    several(model, ("lora(rank=2)", "lora(rank=3)", "unfreeze('blocks[0]')"))
    batch = tiny.batch(rows=2)

    def wanted(**how) -> Tensor:
        with using(model, **how):
            return states(model, batch)

    sum_alone, rows_alone = wanted(which={"sales": 0.5}), wanted(rows=["support-fr", "sales"])
    plain = wanted(which="support-de")
    with using(model, "support-de"):
        with using(model, {"sales": 0.5}):
            with using(model, rows=["support-fr", "sales"]):
                assert torch.equal(states(model, batch), rows_alone)
            assert torch.equal(states(model, batch), sum_alone)
            with pytest.raises(UserError, match="'nobody'"), using(model, "nobody"):
                pass
            assert torch.equal(states(model, batch), sum_alone)
        assert torch.equal(states(model, batch), plain)


def test_what_was_folded_is_folded_afterwards():
    model = tiny.bare("bert")
    first = several(model, ("lora(rank=2)", "lora(rank=3)", "unfreeze('blocks[0]')"))[0]
    first.enable()
    with using(model, "support-de"):
        wanted = tiny.outputs(model)
    first.fold()
    folded, before = tiny.outputs(model), tiny.snapshot(model)
    for how in ({"which": "sales"}, {"which": {"sales": 0.5, "support-de": 2}}, {"rows": ["sales", None]}):
        with using(model, **how):
            pass
        after = tiny.snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(tiny.outputs(model), folded)
    assert tiny.relative(folded, wanted) < 1e-5


def test_a_graft_attached_meanwhile_stays_as_it_is():
    model = tiny.bare("bert")
    several(model, ("lora(rank=2)",))
    with using(model, "support-de"):
        new = attach(model, "lora(rank=1)", name="new")
    assert new.active and not vars(model)["graftkit_grafts"]["support-de"].active


@ALL_KINDS
def test_training_one_leaves_the_others_as_they_are(kind):
    model = tiny.bare(kind)
    first, second, _ = several(
        model, ("lora(rank=2)", "lora(rank=3) + adapter(bottleneck=2)", "unfreeze('blocks[-1:]')")
    )
    base = tiny.snapshot(model)
    with using(model, "support-de"):
        wanted = tiny.outputs(model)
    with using(model, "sales"):
        unfrozen = tiny.outputs(model)
    kept = {name: tensor.clone() for name, tensor in first.tensors.items()}
    second.enable()
    second.requires_grad_()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(second.labels)
    model.train()
    optimizer = torch.optim.AdamW(second.param_groups(lr=1e-2))
    for _ in range(3):
        model(**tiny.batch())[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    second.disable()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.tensors.items())
    with using(model, "support-de"):
        assert torch.equal(tiny.outputs(model), wanted)
    with using(model, "sales"):
        assert torch.equal(tiny.outputs(model), unfrozen)
    now = tiny.snapshot(model)
    assert all(torch.equal(now[name], base[name]) for name in base if name not in second.labels)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_grafts_leave_in_any_order(order):
    model = tiny.with_head("bert")
    model.bert.pooler.requires_grad_(False)
    base, required = tiny.outputs(model), {n: p.requires_grad for n, p in model.named_parameters()}
    settings = copy.deepcopy((model.config.id2label, model.num_labels, model.config._attn_implementation))
    grafts = several(
        model, ("lora(rank=2) + head(classes=5)", "prefix(tokens=2)", "lora(rank=3) + head(classes=4)")
    )
    alone = {}
    for graft in grafts:
        with using(model, graft.name):
            alone[graft.name] = tiny.outputs(model)
    left = list(grafts)
    for index in order:
        left.remove(grafts[index])
        assert detach(grafts[index]) is model
        assert torch.equal(tiny.outputs(model), base)
        for graft in left:
            with using(model, graft.name):
                assert torch.equal(tiny.outputs(model), alone[graft.name])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert (model.config.id2label, model.num_labels, model.config._attn_implementation) == settings
    assert not any(isinstance(module, Added) for module in model.modules())


@ALL_KINDS
def test_two_folded_grafts_are_unfolded_in_any_order(kind):
    for later_first in (False, True):
        model = tiny.bare(kind)
        first, second = several(model, ("lora(rank=2)", "lora(rank=3)"))
        plain = tiny.snapshot(model)
        first.enable()
        second.enable()
        both = tiny.outputs(model)
        first.fold()
        second.fold()
        assert tiny.relative(tiny.outputs(model), both) < 1e-5
        for graft in (second, first) if later_first else (first, second):
            graft.unfold()
            assert tiny.relative(tiny.outputs(model), both) < 1e-5
        now = tiny.snapshot(model)
        assert all(torch.equal(now[name], plain[name]) for name in plain)


def test_the_first_of_two_folded_grafts_is_disabled():
    model = tiny.bare("bert")
    first, second = several(model, ("lora(rank=2)", "dora(rank=2)"))
    plain = tiny.snapshot(model)
    with using(model, "support-fr"):
        wanted = tiny.outputs(model)
    first.enable()
    first.fold()
    second.enable()
    second.fold()
    first.disable()
    assert tiny.relative(tiny.outputs(model), wanted) < 1e-5
    second.disable()
    now = tiny.snapshot(model)
    assert all(torch.equal(now[name], plain[name]) for name in plain)


def test_values_change_within_autocast():
    """Autocast remembers what it has cast, and a parameter keeps its identity when its values change."""
    model = tiny.bare("bert")
    several(model, ("unfreeze('blocks')", "lora(rank=2)"))
    batch = tiny.batch(rows=2)

    def outputs(**how) -> Tensor:
        with using(model, **how):
            return states(model, batch)

    ways = [
        {"which": "support-de"},
        {"which": []},
        {"which": {"support-de": 0.5}},
        {"rows": ["support-fr", None]},
    ]
    with torch.autocast("cpu", torch.bfloat16):
        together = [outputs(**how) for how in ways]
    for how, got in zip(ways, together):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(got, outputs(**how))


def test_a_folded_graft_and_one_that_trains_the_same_weights(tmp_path):
    model = tiny.bare("bert")
    lora, blocks = several(model, ("lora(rank=2)", "unfreeze('blocks')"))
    with using(model, "support-fr"):
        blocks_alone = tiny.outputs(model)
    with using(model, "support-de"):
        lora_alone = tiny.outputs(model)
    base = tiny.snapshot(model)
    lora.enable()
    blocks.enable()
    both = tiny.outputs(model)
    lora.fold()
    assert tiny.relative(tiny.outputs(model), both) < 1e-5
    blocks.save(tmp_path / "blocks")
    assert torch.equal(tiny.outputs(load(tiny.bare("bert"), tmp_path / "blocks").model), blocks_alone)
    blocks.disable()
    assert tiny.relative(tiny.outputs(model), lora_alone) < 1e-5
    blocks.enable()
    lora.disable()
    assert torch.equal(tiny.outputs(model), blocks_alone)
    blocks.disable()
    now = tiny.snapshot(model)
    assert all(torch.equal(now[name], base[name]) for name in base)


def test_grafts_that_change_the_same_part():
    for text, what in (
        ("unfreeze('blocks[0]')", "encoder.layer.0"),
        ("head(classes=2)", "the output of BertModel"),
    ):
        model = tiny.bare("bert")
        first = shaken(model, text, name="one")
        wanted = tiny.outputs(model)
        with pytest.raises(UserError, match="'one' first") as caught:
            attach(model, text, name="two")
        assert what in str(caught.value)
        assert torch.equal(tiny.outputs(model), wanted)
        first.disable()
        second = shaken(model, text, name="two", seed=9)
        other = tiny.outputs(model)
        with pytest.raises(UserError, match="both change"):
            first.enable()
        with using(model, "one"):
            assert torch.equal(tiny.outputs(model), wanted)
        assert torch.equal(tiny.outputs(model), other)
        assert "both change" in refusal(model, ["one", "two"])
        second.disable()
        first.enable()
        assert torch.equal(tiny.outputs(model), wanted)


@pytest.mark.filterwarnings("ignore::graftkit.backbone.values.OtherWeights")
def test_copies_and_saved_grafts_are_their_own(tmp_path):
    model = tiny.bare("bert")
    first, second = several(model, ("lora(rank=2)", "adapter(bottleneck=3)"))
    rows, batch = ["support-fr", "support-de"], tiny.batch(rows=2)
    with using(model, rows=rows):
        wanted = states(model, batch)
        inside = copy.deepcopy(model)
        assert torch.equal(states(inside, batch), wanted)
    twin = copy.deepcopy(model)
    for graft in vars(twin)["graftkit_grafts"].values():
        with torch.no_grad():
            for parameter in graft.parameters.values():
                parameter.add_(1.0)
        assert graft.model is twin
    with using(model, rows=rows):
        assert torch.equal(states(model, batch), wanted)
    with using(twin, rows=rows):
        assert not torch.allclose(states(twin, batch), wanted)
    first.enable()
    second.enable()
    for graft in (first, second):
        graft.save(tmp_path / graft.name)
    fresh = tiny.bare("bert")
    for graft in (first, second):
        load(fresh, tmp_path / graft.name, name=graft.name)
    with using(fresh, rows=rows):
        assert torch.equal(states(fresh, batch), wanted)


def test_no_graft_adds_to_a_head_that_another_replaces():
    """Neither order leaves one of them acting on a module that is not called."""
    head, added = "head(classes=5)", "lora(rank=2, sites='head')"
    for texts in ((head, added), (added, head)):
        model = tiny.with_head("bert")
        base, first = tiny.outputs(model), shaken(model, texts[0], name="first")
        wanted = tiny.outputs(model)
        with pytest.raises(UserError, match="disable 'first' first") as caught:
            attach(model, texts[1], name="second")
        assert "'classifier'" in str(caught.value)
        assert torch.equal(tiny.outputs(model), wanted)
        first.disable()
        second = shaken(model, texts[1], name="second")
        with pytest.raises(UserError, match="disable 'second' first"):
            first.enable()
        assert "'classifier'" in refusal(model, which={"first": 0.5, "second": 0.5})
        assert "'classifier'" in refusal(model, rows=["first", "second"])
        with using(model, "first"):
            assert torch.equal(tiny.outputs(model), wanted)
        detach(second)
        detach(first)
        assert torch.equal(tiny.outputs(model), base)
    both = attach(
        tiny.with_head("bert"), f"{added} + {head}"
    )  # in one graft the head comes first, however it is written
    assert both.parameters["classifier.lora_default.B"].shape == (5, 2)


def test_statistics_go_on_moving_beside_a_graft_that_is_enabled_again():
    norm = torch.nn.BatchNorm1d(4)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), norm, torch.nn.Linear(4, 2))
    other = attach(model, "lora(rank=2, sites='re:0')", name="other")
    trained = attach(model, "norms(statistics=True)", name="trained")

    def moves() -> bool:
        before = norm.running_mean.clone()
        model.train()(torch.randn(5, 3))
        return not torch.equal(norm.running_mean, before)

    assert moves()
    with other.disabled():
        pass
    assert moves()
    with using(model, "trained"):
        model.eval()(torch.randn(5, 3))
    assert moves()
    other.requires_grad_()
    assert not moves()
    trained.requires_grad_()
    assert moves()
