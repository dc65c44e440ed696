"""lora beside modules that are trained as a whole: PEFT's `modules_to_save`, both ways."""

import json

import pytest
import tiny
import torch
from shaken import shaken

from graftkit import load

peft = pytest.importorskip("peft")

CASES = {
    "norm": "lora(rank=2, sites='q,v') + unfreeze('re:encoder.layer.1.output.LayerNorm')",
    "block": "lora(rank=2, sites='blocks[:1].q') + unfreeze('blocks[-1:]')",
    "ia3": "ia3() + unfreeze('re:encoder.layer.0.output.LayerNorm|pooler.dense')",
    "dora": "dora(rank=2, sites='q') + unfreeze('re:encoder.layer.0.intermediate.dense')",
}


@pytest.mark.parametrize("name", CASES)
def test_peft_and_graftkit_read_what_was_written(name, tmp_path):
    graft = shaken(tiny.bare("bert"), CASES[name])
    graft.save(tmp_path)
    wanted = tiny.outputs(graft.model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"]
    assert not (tmp_path / "graft.safetensors").exists()
    theirs = peft.PeftModel.from_pretrained(tiny.bare("bert"), tmp_path).eval()
    assert tiny.relative(tiny.outputs(theirs), wanted) < 1e-5
    assert tiny.relative(tiny.outputs(load(tiny.bare("bert"), tmp_path).model), wanted) < 1e-5
    (tmp_path / "graft.json").unlink()  # as PEFT's own folder
    again = load(tiny.bare("bert"), tmp_path)
    assert tiny.relative(tiny.outputs(again.model), wanted) < 1e-5
    assert "unfreeze(" in str(again.method)


def test_what_peft_wrote(tmp_path):
    torch.manual_seed(1)
    saved = ["encoder.layer.1.output.dense", "pooler"]
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=saved, init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny.bare("bert"), config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path)
    graft = load(tiny.bare("bert"), tmp_path)
    assert tiny.relative(tiny.outputs(graft.model), tiny.outputs(wrapped)) < 1e-5
    graft.save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == sorted(saved)


@pytest.mark.parametrize(
    "text",
    [
        "lora(rank=2, sites='q') + unfreeze('blocks[-1:]')",  # an adapter inside a module that is saved
        "lora(rank=2, sites='q') + bitfit()",  # parts of modules
        "prompt(tokens=2) + unfreeze('re:pooler.dense')",
    ],
)
def test_what_peft_cannot_keep_is_ours_alone(text, tmp_path):
    graft = shaken(tiny.bare("bert"), text)
    graft.save(tmp_path)
    wanted = tiny.outputs(graft.model)
    assert not (tmp_path / "adapter_config.json").exists()
    assert tiny.relative(tiny.outputs(load(tiny.bare("bert"), tmp_path).model), wanted) < 1e-6
