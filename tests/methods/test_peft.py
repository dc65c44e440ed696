"""Grafts that PEFT reads, and adapters of PEFT that are read here, to the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from graftkit import UserError, load

peft = pytest.importorskip("peft")
import peft_lora  # noqa: E402
from peft_cache import for_peft  # noqa: E402
from peft_lora import shaken, write_with_peft  # noqa: E402

pytestmark = pytest.mark.sampled


def with_peft(model: nn.Module, folder: Path) -> nn.Module:
    known = ("lora_", "modules_to_save", "prompt")
    return peft_lora.with_peft(for_peft(model), folder, trained=known, by_hand=("prompt_embeddings",))


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
        ("layer_replication", [[0, 2]]), ("trainable_token_indices", [1]), ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]), ("velora_config", {"num_groups": 2}), ("kasa_config", {"beta": 1}),
        ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"), ("lora_alpha", 0), ("lora_alpha", -8),
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


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"use_dora": True}, "missing .*query.dora_default.m"),
        ({"lora_bias": True}, "missing .*query.lora_default.b"),
        ({"bias": "lora_only"}, "missing .*query.bias"),
        ({"rank_pattern": {"query": 4}}, r"lora_default.A' has shape \(8, 16\), but should have \(4, 16\)"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias together with use_dora"),
        ({"bias": "some"}, "bias is 'some'"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_tensors(changes, said, tmp_path):
    refused(tmp_path, changes, said)


def test_unknown_kind(tmp_path):
    refused(tmp_path, {"peft_type": "XLORA"}, "XLORA.*LORA")


@pytest.mark.parametrize("rank", [0, "8", None])
def test_a_rank_that_is_no_number(rank, tmp_path):
    refused(tmp_path, {"r": rank}, "r is")


def test_a_rank_that_is_not_that_of_the_tensors(tmp_path):
    refused(tmp_path, {"r": 4}, r"lora_default.A' has shape \(8, 16\), but should have \(4, 16\)")


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
    with pytest.raises(UserError, match="contains a list"):
        load(tiny.bare("bert"), tmp_path)
