"""Grafts that PEFT reads, and adapters of PEFT that are read here, to the same outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from graftkit import Backbone, UserError, attach, load
from graftkit.graft import Graft

peft = pytest.importorskip("peft")
ALL_KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


def shake(parameters, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def shaken(model: nn.Module, text: str) -> Graft:
    graft = attach(model, text)
    shake(graft.parameters.values())
    return graft


def with_peft(model: nn.Module, folder: Path) -> nn.Module:
    """PEFT's reading of a folder; a warning about keys is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    saved = wrapped.load_adapter(str(folder), adapter_name="default")
    assert set(saved.unexpected_keys) <= {"prompt_embeddings"}  # PEFT puts this one in place by hand
    assert not [k for k in saved.missing_keys if "lora_" in k or "modules_to_save" in k or "prompt" in k]
    return wrapped


def write_with_peft(model: nn.Module, folder: Path, **settings) -> nn.Module:
    """An adapter that PEFT made on `model`, all of its trained values random, and written."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    shake(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(str(folder))
    return wrapped


@ALL_KINDS
@pytest.mark.parametrize(
    "text",
    [
        "lora(rank=3)",
        "lora(rank=4, alpha=3, sites='q,v', dropout=0.1)",
        "lora(rank=2, sites='blocks[1].ffn')",
    ],
)
@pytest.mark.parametrize("headed", [False, True])
def test_peft_reads_our_lora(kind, text, headed, tmp_path):
    make = tiny.with_head if headed else tiny.bare
    graft = shaken(make(kind), text + (" + head(classes=3)" if headed else ""))
    graft.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == ("SEQ_CLS" if headed else "FEATURE_EXTRACTION")
    wrapped = with_peft(make(kind), tmp_path)
    wanted = tiny.outputs(graft.model)
    assert tiny.relative(tiny.outputs(wrapped), wanted) < 1e-5
    assert tiny.relative(tiny.outputs(make(kind)), wanted) > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_peft_reads_our_lora_on_a_language_model(kind, tmp_path):
    graft = shaken(tiny.causal(kind), "lora(rank=3)")
    graft.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    wrapped = with_peft(tiny.causal(kind), tmp_path)
    assert tiny.relative(tiny.outputs(wrapped), tiny.outputs(graft.model)) < 1e-5


def test_peft_reads_a_pooler_trained_with_the_head(tmp_path):
    missing = ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    backbone = Backbone(tiny.with_head("bert"), missing=missing)
    graft = attach(backbone, "lora(rank=2) + head(classes=3)")
    shake(graft.parameters.values())
    graft.save(tmp_path)
    wrapped = with_peft(tiny.with_head("bert"), tmp_path)
    assert tiny.relative(tiny.outputs(wrapped), tiny.outputs(graft.model)) < 1e-5


TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}
REGEX = {"bert": r".*layer\.[12]\..*dense", "gpt2": r".*h\.\d\.mlp\.c_.*", "llama": r".*(gate|up)_proj"}
SAVED = {"bert": ["classifier", "pooler"], "gpt2": ["score", "ln_f"], "llama": ["score", "embed_tokens"]}


@ALL_KINDS
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"regex": True, "lora_alpha": 7, "r": 3},
        {"use_rslora": True, "r": 5, "lora_alpha": 3},
        {"lora_dropout": 0.3, "init_lora_weights": "gaussian", "layers_to_transform": [0, 2]},
    ],
)
@pytest.mark.parametrize("headed", ["bare", "head", "head and more"])
def test_we_read_what_peft_writes(kind, changes, headed, tmp_path):
    make = tiny.bare if headed == "bare" else tiny.with_head
    settings = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"} | changes
    if settings.pop("regex", False):
        settings["target_modules"] = REGEX[kind]
    if headed == "bare" and kind != "bert":  # PEFT finds no layer number in a name that starts with its list
        settings.pop("layers_to_transform", None)
    if headed != "bare":
        settings |= {"task_type": "SEQ_CLS", "modules_to_save": SAVED[kind][: 1 if headed == "head" else 2]}
    wrapped = write_with_peft(make(kind), tmp_path, **settings)
    graft = load(make(kind), tmp_path)
    wanted = tiny.outputs(wrapped)
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5
    assert tiny.relative(tiny.outputs(make(kind)), wanted) > 1e-2
    graft.save(tmp_path / "again")
    assert torch.equal(tiny.outputs(load(make(kind), tmp_path / "again").model), tiny.outputs(graft.model))


def test_a_head_of_another_size(tmp_path):
    wrapped = write_with_peft(
        tiny.with_head("bert", num_labels=5), tmp_path, task_type="SEQ_CLS", target_modules=["query"]
    )
    graft = load(tiny.with_head("bert"), tmp_path)
    assert tiny.relative(tiny.outputs(graft.model), tiny.outputs(wrapped)) < 1e-5


def test_gradients_are_those_of_peft():
    wrapped = peft.get_peft_model(
        tiny.bare("llama"), peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
    ).eval()
    shake(p for p in wrapped.parameters() if p.requires_grad)
    theirs = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    graft = attach(tiny.bare("llama"), "lora(rank=3, alpha=5)")
    graft.model.eval()
    names = {
        name: "base_model.model."
        + name.replace(".lora_default.A", ".lora_A.default.weight").replace(
            ".lora_default.B", ".lora_B.default.weight"
        )
        for name in graft.parameters
    }
    assert set(names.values()) == set(theirs)
    with torch.no_grad():
        for name, parameter in graft.parameters.items():
            parameter.copy_(theirs[names[name]])
    for model in (wrapped, graft.model):
        given = tiny.batch()
        tiny.flat(model(**given), given["attention_mask"]).square().sum().backward()
    for name, parameter in graft.parameters.items():
        torch.testing.assert_close(parameter.grad, theirs[names[name]].grad, rtol=1e-4, atol=1e-4)


# ---- prefixes


@pytest.mark.parametrize("text", ["prefix(tokens=3)", "prefix(tokens=4, hidden=5)"])
@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}])
def test_peft_reads_our_prefix(text, rope, tmp_path):
    changes = {"rope_parameters": rope} if rope else {}
    graft = shaken(tiny.causal("llama", **changes), text)
    graft.save(tmp_path)
    plain = tiny.causal("llama", **changes)
    wrapped = with_peft(plain, tmp_path)
    wanted = tiny.outputs(graft.model)
    assert tiny.relative(tiny.outputs(wrapped), wanted) < 1e-5
    assert tiny.relative(tiny.outputs(tiny.causal("llama", **changes)), wanted) > 1e-2
    again = load(tiny.causal("llama", **changes), tmp_path)
    assert torch.equal(tiny.outputs(again.model), wanted)


def test_peft_reads_our_prefix_with_a_head(tmp_path):
    graft = shaken(tiny.with_head("llama"), "prefix(tokens=3) + head(classes=3)")
    graft.save(tmp_path)
    wrapped = with_peft(tiny.with_head("llama"), tmp_path)
    assert tiny.relative(tiny.outputs(wrapped), tiny.outputs(graft.model)) < 1e-5


def test_prefixes_that_peft_cannot_express_are_kept_in_our_own_file(tmp_path):
    """PEFT moves the text behind the prefix, so with learned positions it gives another model."""
    graft = shaken(tiny.causal("gpt2"), "prefix(tokens=3)")
    graft.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(tiny.outputs(load(tiny.causal("gpt2"), tmp_path).model), tiny.outputs(graft.model))


# ---- what is refused


@pytest.mark.parametrize(
    "field,value",
    [
        ("use_dora", True), ("rank_pattern", {"query": 4}), ("alpha_pattern", {"query": 4}), ("bias", "all"),
        ("lora_bias", True), ("layer_replication", [[0, 2]]), ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)  # fmt: skip
def test_fields_that_are_not_read_are_refused_by_name(field, value, tmp_path):
    write_with_peft(tiny.bare("bert"), tmp_path, target_modules=["query"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=field):
        load(tiny.bare("bert"), tmp_path)


def refused(tmp_path, changes: dict, matching: str) -> None:
    write_with_peft(tiny.bare("bert"), tmp_path, target_modules=["query"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = tiny.bare("bert")
    with pytest.raises(UserError, match=matching):
        load(model, tmp_path)
    assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.bare("bert")))


def test_unknown_kind(tmp_path):
    refused(tmp_path, {"peft_type": "XLORA"}, "XLORA.*LORA")


@pytest.mark.parametrize("rank", [0, "8", None])
def test_a_rank_that_is_no_number(rank, tmp_path):
    refused(tmp_path, {"r": rank}, "r is")


def test_a_rank_that_is_not_that_of_the_tensors(tmp_path):
    refused(tmp_path, {"r": 4}, r"lora_default.A' has shape \(8, 16\), but \(4, 16\) is needed")


def test_another_model(tmp_path):
    write_with_peft(tiny.bare("bert"), tmp_path, target_modules=["query"])
    with pytest.raises(UserError, match="matches nothing"):
        load(tiny.bare("llama"), tmp_path)


def test_tensors_that_are_no_lora(tmp_path):
    from safetensors.torch import load_file, save_file

    write_with_peft(tiny.bare("bert"), tmp_path, target_modules=["query"])
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.x.lora_magnitude_vector": torch.ones(2)}, path)
    with pytest.raises(UserError, match="lora_magnitude_vector"):
        load(tiny.bare("bert"), tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        load(tiny.bare("bert"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="not the configuration"):
        load(tiny.bare("bert"), tmp_path)
