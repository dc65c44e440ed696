"""Rates, freezing, overlapping claims, and several grafts on one model."""

from __future__ import annotations

import pytest
import tiny
import torch
from shaken import ALL_KINDS, message, shaken

from graftkit import Backbone, UserError, attach, detach, load
from graftkit.methods.base import read

pytestmark = pytest.mark.sampled

W, L, INNER, V = tiny.WIDTH, tiny.BLOCKS, tiny.INNER, tiny.VOCABULARY


# ---- rates, freezing, claims


def test_layerwise_rates():
    graft = attach(tiny.with_head("bert"), "full(lr=1.0) + layerwise_lr(decay=0.5) + head(classes=3, lr=7.0)")
    by_parameter = {
        id(p): group["lr"] for group in graft.param_groups(lr=3.0) for p in group["params"]
    }  # rates in the method win over lr=
    rates = {name: by_parameter[id(p)] for name, p in graft.parameters.items()}
    for name, rate in rates.items():
        if ".embeddings." in name:
            assert rate == 0.5**L, name
        elif ".layer." in name:
            assert rate == 0.5 ** (L - 1 - int(name.split(".layer.")[1].split(".")[0])), name
        else:
            assert rate == (7.0 if name.startswith("classifier") else 1.0), name
    assert rates["bert.encoder.layer.2.output.dense.weight"] == 1.0
    assert rates["bert.pooler.dense.weight"] == 1.0


@pytest.mark.parametrize("kind,above", [("gpt2", "ln_f.weight"), ("llama", "norm.weight")])
def test_layerwise_rates_of_the_last_norm(kind, above):
    graft = attach(tiny.bare(kind), "full() + layerwise_lr(decay=0.5)")
    assert graft.labels[above].lr_scale == 1.0
    assert min(group.lr_scale for group in graft.labels.values()) == 0.5**L


def test_rates_and_decay_of_groups():
    graft = attach(tiny.bare("bert"), "lora(rank=2) + unfreeze('norms', lr=0.5) + head(classes=2)")
    groups = {(g["lr"], g["weight_decay"]) for g in graft.param_groups(lr=0.1, weight_decay=0.2)}
    assert groups == {(0.1, 0.2), (0.5, 0.0), (0.1, 0.0)}
    assert {g["lr"] for g in graft.param_groups()} == {1e-3, 0.5, 5e-3}
    decays = {g["weight_decay"] for g in attach(tiny.bare("bert"), "bitfit()").param_groups(weight_decay=0.2)}
    assert decays == {0.0}


def test_layerwise_lr_needs_base_parameters():
    assert "changes nothing" in message(tiny.bare("bert"), "lora() + layerwise_lr()")


def test_freeze_takes_parts_out():
    graft = attach(tiny.bare("bert"), "full() + freeze('blocks[:2], embeddings')")
    assert not any("embeddings.word" in name or ".layer.0." in name for name in graft.labels)
    assert any(".layer.2." in name for name in graft.labels)
    assert "changes nothing" in message(tiny.bare("bert"), "lora() + freeze('embeddings')")


def test_a_new_head_cannot_stay_random():
    assert "would stay random" in message(tiny.with_head("bert"), "lora() + head(classes=5) + freeze('head')")
    graft = attach(tiny.with_head("bert"), "lora() + head(classes=3) + freeze('head')")
    assert not any("classifier" in name for name in graft.labels)


@pytest.mark.parametrize(
    "text",
    [
        "bitfit() + unfreeze('blocks')",
        "adapter() + unfreeze('norms')",
        "unfreeze('blocks') + unfreeze('ffn')",
    ],
)
def test_overlapping_claims_are_errors(text):
    assert "both claim" in message(tiny.bare("bert"), text)


def test_full_leaves_a_claimed_parameter_to_the_other():
    graft = attach(
        tiny.with_head("bert"), "full(lr=1.0) + head(classes=3, lr=2.0) + unfreeze('norms', lr=3.0)"
    )
    rates = {name: group.lr for name, group in graft.labels.items()}
    assert rates["classifier.weight"] == 2.0
    assert rates["bert.encoder.layer.0.output.LayerNorm.weight"] == 3.0
    assert rates["bert.encoder.layer.0.output.dense.weight"] == 1.0


def test_a_method_twice():
    with pytest.raises(UserError, match="appears twice"):
        read("lora() + lora()")


def test_bitfit_is_refused_without_biases():
    text = message(tiny.bare("llama"), "bitfit()")
    assert "have none" in text and "lora()" in text


@pytest.mark.parametrize("kind,text", [("bert", "lora(sites='qkv')"), ("llama", "unfreeze('pooler')"),
                                       ("gpt2", "freeze('blocks[7]') + full()")])  # fmt: skip
def test_a_selection_of_nothing_lists_what_there_is(kind, text):
    said = message(tiny.bare(kind), text)
    assert "matches nothing" in said and "attention, " in said and "blocks[0] to blocks[2]" in said


def test_lora_on_norms_says_what_they_are():
    assert "LayerNorm" in message(tiny.bare("bert"), "lora(sites='norms')")


# ---- several grafts on one model


def test_the_same_name_twice_leaves_the_first_graft_intact():
    graft = shaken(tiny.bare("bert"), "lora(rank=2)")
    wanted = tiny.outputs(graft.model)
    for text in ("lora(rank=3)", "adapter()", "bitfit()", "head(classes=2)"):
        assert "'default' is already attached" in message(graft.model, text)
        assert torch.equal(tiny.outputs(graft.model), wanted)
    assert {n for n, p in graft.model.named_parameters() if p.requires_grad} == set(graft.labels)


def test_names_that_end_alike_are_kept_apart():
    model = tiny.bare("bert")
    first = shaken(model, "lora(rank=2)", name="b")
    second = shaken(model, "lora(rank=3)", name="a_b", seed=6)
    assert {n for n, _ in first.additions()}.isdisjoint(n for n, _ in second.additions())
    detach(first)
    assert len(second.parameters) == len(second.labels)


@pytest.mark.parametrize("text", ["lora(rank=2)", "adapter(norms=False)", "prefix(tokens=3, hidden=4)"])
@ALL_KINDS
def test_two_grafts_side_by_side(kind, text, tmp_path):
    alone = {}
    for name, seed in (("one", 5), ("two", 6)):
        graft = shaken(tiny.bare(kind), text, seed=seed)
        alone[name] = tiny.outputs(graft.model)
        graft.save(tmp_path / name)
    model = tiny.bare(kind)
    first = load(model, tmp_path / "one", name="one")
    second = load(model, tmp_path / "two", name="two")
    with second.disabled():
        assert torch.equal(tiny.outputs(model), alone["one"])
    with first.disabled():
        assert torch.equal(tiny.outputs(model), alone["two"])
    with first.disabled(), second.disabled():
        assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.bare(kind)))
    second.save(tmp_path / "again")
    assert torch.equal(tiny.outputs(load(tiny.bare(kind), tmp_path / "again").model), alone["two"])
    detach(first)
    assert torch.equal(tiny.outputs(model), alone["two"])
    detach(second)
    assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.bare(kind)))


def test_a_backbone_is_used_again_after_its_head_was_replaced():
    backbone = Backbone(tiny.with_head("bert"))
    wanted = tiny.outputs(backbone.model)
    for classes in (5, 3, 2):
        graft = attach(backbone, f"lora(rank=2) + head(classes={classes})")
        assert graft.model.classifier.out_features == classes
        detach(graft)
        assert torch.equal(tiny.outputs(backbone.model), wanted)
    assert attach(backbone, "unfreeze('head')").parameters


@pytest.mark.parametrize("name", ["", "a b", "x.y", "a b"])
def test_graft_names(name):
    assert "plain word" in message(tiny.bare("bert"), "lora()", name=name)


def test_the_base_stays_frozen_while_another_graft_is_attached():
    model = tiny.bare("bert")
    first, second = (attach(model, "lora(rank=2)", name=name) for name in ("first", "second"))
    detach(first)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(second.labels)


def test_layers_are_not_added_to_a_head_that_has_its_own():
    model = tiny.with_head("bert")
    assert "hidden has no effect" in message(model, "head(classes=2, pooling='own', hidden=4)")
    assert any("hidden" in name for name in attach(model, "head(classes=2, hidden=4)").labels)
