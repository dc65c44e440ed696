"""Small things that methods and grafts say, refuse or leave as they were."""

import warnings
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from shaken import shaken
from torch import nn

from graftkit import AdamW, NotFoldable, UserError, attach, detach, load
from graftkit.backbone.own import load_weights
from graftkit.plan.parameters import make_plan

pytestmark = pytest.mark.sampled

MODELS = {model.name: model for model in zoo.MODELS}


def message(model, text) -> str:
    with pytest.raises(UserError) as caught:
        attach(model, text)
    return str(caught.value)


# --- peft()


def test_the_modules_that_a_tuner_of_peft_is_for():
    pytest.importorskip("peft")
    sites = [name for name, _ in attach(tiny.bare("bert"), "peft('ln_tuning')").additions()]
    assert sites and all("LayerNorm" in name for name in sites if name.endswith("peft_default"))
    graft = attach(tiny.bare("bert"), "peft('trainable_tokens', {'token_indices': [7]})")
    assert all(name.startswith("embeddings.word_embeddings.") for name in graft.parameters)
    assert "{'token_indices': [7, 11]}" in message(tiny.bare("bert"), "peft('trainable_tokens')")


def test_boft_is_quiet_without_cuda():
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(tiny.bare("bert"), "peft('boft', {'boft_block_size': 4})")


def test_oft_at_a_depthwise_convolution():
    pytest.importorskip("peft")
    told = message(MODELS["convnext"].fresh(), "peft('oft', {'oft_block_size': 4}, sites='blocks.convs')")
    assert "'oft'" in told and "use lora()" in told
    attach(MODELS["convnext"].fresh(), "peft('oft', {'oft_block_size': 4})")


# --- sizes


def warned(model, text) -> list[str]:
    with torch.device("meta"):
        graft = attach(model.to("meta"), text)
    plan = make_plan(
        graft, AdamW(), rows=8, batch_size=4, steps_per_epoch=2, steps=2, precision="fp32", frozen_blocks=0
    )
    return plan.warnings


@pytest.mark.parametrize(
    "text", ["lora(rank=1000)", "loha(rank=1000)", "adapter(bottleneck=100000)", "prefix(tokens=100000)"]
)
def test_methods_larger_than_the_model_are_told(text):
    (told,) = (one for one in warned(tiny.bare("bert"), text) if "exported" not in one)
    assert text.partition("(")[0] in told and "more than the 7,624 of the whole backbone" in told
    assert "full()" in told


def test_methods_larger_than_their_modules_are_told():
    (told,) = warned(tiny.bare("bert"), "lora(rank=9, sites='q')")
    assert "at 3 of 3 modules, such as 288 next to the 272 of 'encoder.layer.0.attention.self.query'" in told
    for text in ("lora(rank=4)", "ia3()", "prefix(tokens=2)", "adapter(bottleneck=2)", "full()"):
        assert not any("exported" not in one for one in warned(tiny.bare("bert"), text))


# --- prompts


@pytest.mark.parametrize(
    "text", ["prompt(init_text='')", "prompt(init_text=' ')", "prompt(init='text', init_text='')"]
)
def test_an_empty_text_to_start_from(text):
    assert "a non-empty init_text" in message(tiny.bare("bert"), text)


# --- weights of one's own


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, value):
    from safetensors.torch import save_file

    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("mask", torch.full((3, 3), -torch.inf))

    module = Masked()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    save_file(state, tmp_path / "good.safetensors")
    load_weights(module, tmp_path / "good.safetensors", "own:module")  # a mask may be infinite
    save_file(state | {"weight": torch.full((3, 3), value)}, tmp_path / "bad.safetensors")
    before = module.weight.clone()
    with pytest.raises(UserError, match=r"bad.safetensors': 'weight' contains values that are not finite"):
        load_weights(module, tmp_path / "bad.safetensors", "own:module")
    assert torch.equal(module.weight, before)


# --- several grafts


def test_a_detached_graft_leaves_nothing_in_modules_that_another_replaced():
    model = tiny.with_head("bert")
    below = shaken(model, "lora(rank=2, sites='head')", name="a")
    below.disable()
    above = shaken(model, "head(classes=5)", name="b")
    detach(below)
    detach(above)
    assert not [name for name, _ in model.named_modules() if "lora" in name]


@pytest.mark.parametrize("first", ["lora(rank=2, sites='k')", "ia3(sites='k', feedforward='none')"])
def test_the_first_of_two_folded_grafts_is_unfolded_or_nothing_is(first):
    model = tiny.with_head("bert")
    wanted = tiny.outputs(model)
    a, b = shaken(model, first, name="a"), shaken(model, "lora(rank=3, sites='k')", name="b", seed=1)
    both = tiny.outputs(model)
    a.fold()
    b.fold()
    before = tiny.snapshot(model)
    if first.startswith("lora"):
        a.unfold()
    else:
        with pytest.raises(NotFoldable, match="of the graft 'a'"):
            a.unfold()
        after = tiny.snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert tiny.relative(tiny.outputs(model), both) < 1e-5
    b.unfold()
    a.unfold()
    detach(a)
    detach(b)
    assert torch.equal(tiny.outputs(model), wanted)


def test_adapter_fusion_takes_the_folder_of_a_run(tmp_path):
    for name, text in {"a": "adapter(3, 'pfeiffer')", "b": "adapter(5, 'pfeiffer')"}.items():
        shaken(tiny.with_head("bert"), text, name=name).save(tmp_path / name / "graft")
    folders = [str(tmp_path / "a"), str(tmp_path / "b" / "graft")]
    shaken(tiny.with_head("bert"), f"adapter_fusion(grafts={folders!r})").save(tmp_path / "fused")
    load(tiny.with_head("bert"), tmp_path / "fused")
