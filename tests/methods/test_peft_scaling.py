"""IA3 and LN tuning of PEFT: what is written here PEFT reads to the same outputs, and the other way round."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from shaken import ALL_KINDS, shaken
from torch import Tensor, nn

from graftkit import UserError, attach, load

peft = pytest.importorskip("peft")
from peft_lora import with_peft  # noqa: E402

pytestmark = pytest.mark.sampled


def shake(parameters, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def read_by_peft(model: nn.Module, folder: Path) -> nn.Module:
    return with_peft(model, folder, trained=("ia3_", "ln_tuning"))


def written_by_peft(model: nn.Module, folder: Path, config) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config).eval()
    shake(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(str(folder))
    return wrapped


OURS = [
    "ia3()",
    "ia3(sites='all-linear')",
    "ia3(sites='o', feedforward='none')",
    "ia3(sites='none', feedforward='ffn')",
    "ia3(sites='blocks[1].v', feedforward='blocks[0].down')",
    "norms()",
    "norms(sites='blocks[1:].norms')",
]


@ALL_KINDS
@pytest.mark.parametrize("text", OURS)
@pytest.mark.parametrize("headed", [False, True])
def test_peft_reads_ours(kind, text, headed, tmp_path):
    make = tiny.with_head if headed else tiny.bare
    graft = shaken(make(kind), text + (" + head(classes=3)" if headed else ""))
    graft.save(tmp_path)
    wanted = tiny.outputs(graft.model)
    assert tiny.relative(tiny.outputs(read_by_peft(make(kind), tmp_path)), wanted) < 1e-5
    assert tiny.relative(tiny.outputs(make(kind)), wanted) > 1e-3
    stored = json.loads((tmp_path / "graft.json").read_text())["tensors"]
    assert {entry["file"] for entry in stored.values()} == {"adapter_model.safetensors"}


IA3_TARGETS = {
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
}
LN_TARGETS = {"bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"], "llama": ["post_attention_layernorm"]}
SAVED = {"bert": "classifier", "gpt2": "score", "llama": "score"}


@ALL_KINDS
@pytest.mark.parametrize("headed", [False, True])
@pytest.mark.parametrize("form", ["lists", "regex", "none inner", "all inner", "default", "ln", "ln regex"])
def test_we_read_what_peft_writes(kind, form, headed, tmp_path):
    make = tiny.with_head if headed else tiny.bare
    targets, inner = IA3_TARGETS[kind]
    common = {"task_type": "SEQ_CLS", "modules_to_save": [SAVED[kind]]} if headed else {}
    config = {
        "lists": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=inner, **common),
        "regex": lambda: peft.IA3Config(
            target_modules=".*1.*dense|.*1.*_proj", feedforward_modules=".*output.dense|.*down_proj", **common
        ),
        "none inner": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[], **common),
        "all inner": lambda: peft.IA3Config(target_modules=inner, feedforward_modules=inner, **common),
        "default": lambda: peft.IA3Config(init_ia3_weights=False, **common),
        "ln": lambda: peft.LNTuningConfig(target_modules=LN_TARGETS[kind], **common),
        "ln regex": lambda: peft.LNTuningConfig(target_modules=r".*1.*(ln_2|layernorm|LayerNorm)", **common),
    }[form]()
    wrapped = written_by_peft(make(kind), tmp_path, config)
    graft = load(make(kind), tmp_path)
    wanted = tiny.outputs(wrapped)
    assert tiny.relative(tiny.outputs(graft.model), wanted) < 1e-5
    assert tiny.relative(tiny.outputs(make(kind)), wanted) > 1e-3
    graft.save(tmp_path / "again")
    assert torch.equal(tiny.outputs(load(make(kind), tmp_path / "again").model), tiny.outputs(graft.model))


class Pictures(nn.Module):
    """Convolutions with strides, dilation and groups, BatchNorm and GroupNorm: (rows, 3, 12, 12) to (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=2)
        self.groupnorm = nn.GroupNorm(2, 8)
        self.deep = nn.Conv3d(1, 2, (2, 3, 3))
        self.output = nn.Linear(2 * 7 * 4 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groupnorm(self.second(self.norm(self.first(x)).relu()))
        return self.output(self.deep(x.unsqueeze(1)).relu().flatten(1))


def pictures() -> nn.Module:
    model = Pictures().eval()
    tiny.randomize(model, 3)
    generator = torch.Generator().manual_seed(4)
    model.norm.running_mean = torch.randn(8, generator=generator)
    model.norm.running_var = torch.rand(8, generator=generator) + 0.5
    return model


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(6))
MAPS = "first,second,deep,output"


@pytest.mark.parametrize(
    "text",
    [
        f"ia3(sites='{MAPS}', feedforward='none')",
        f"ia3(sites='none', feedforward='{MAPS}')",
        "ia3(sites='first,second', feedforward='second,deep')",
        "norms()",
        "norms(statistics=True)",
    ],
)
def test_convolutions_and_statistics_ours_to_peft(text, tmp_path):
    graft = shaken(pictures(), text)
    if "True" in text:
        graft.model.train()
        graft.model(X)
        graft.model.eval()
    graft.save(tmp_path)
    wanted = graft.model(X).detach()
    assert tiny.relative(read_by_peft(pictures(), tmp_path)(X).detach(), wanted) < 1e-5
    assert tiny.relative(pictures()(X).detach(), wanted) > 1e-3
    assert torch.equal(load(pictures(), tmp_path).model(X), wanted)


@pytest.mark.parametrize("inner", [[], MAPS.split(","), ["second"]])
def test_convolutions_of_peft_to_ours(inner, tmp_path):
    config = peft.IA3Config(target_modules=MAPS.split(","), feedforward_modules=inner)
    wrapped = written_by_peft(pictures(), tmp_path, config)
    graft = load(pictures(), tmp_path)
    wanted = wrapped(X).detach()
    assert tiny.relative(graft.model(X).detach(), wanted) < 1e-5
    wrapped.merge_adapter()
    assert tiny.relative(graft.fold()(X).detach(), wrapped(X).detach()) < 1e-5


def test_norms_of_peft_with_statistics_to_ours(tmp_path):
    config = peft.LNTuningConfig(target_modules=["norm", "groupnorm"])
    wrapped = peft.get_peft_model(pictures(), config)
    shake(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.train()
    wrapped(X)
    wrapped.eval().save_pretrained(str(tmp_path))
    graft = load(pictures(), tmp_path)
    assert graft.method.methods[0].statistics
    assert tiny.relative(graft.model(X).detach(), wrapped(X).detach()) < 1e-5
    assert tiny.relative(pictures()(X).detach(), wrapped(X).detach()) > 1e-3


@ALL_KINDS
def test_gradients_are_those_of_peft(kind):
    targets, inner = IA3_TARGETS[kind]
    wrapped = peft.get_peft_model(
        tiny.bare(kind), peft.IA3Config(target_modules=targets, feedforward_modules=inner)
    ).eval()
    shake(p for p in wrapped.parameters() if p.requires_grad)
    theirs = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    graft = attach(tiny.bare(kind), "ia3()" if kind != "bert" else "ia3(sites='k,v,o', feedforward='o,down')")
    graft.model.eval()
    names = {
        n: "base_model.model." + n.replace(".ia3_default.scale", ".ia3_l.default") for n in graft.parameters
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


@pytest.mark.parametrize(
    "changes,matching",
    [
        ({"feedforward_modules": None}, "feedforward_modules is None"),
        ({"feedforward_modules": []}, r"output.dense.*has shape \(1, 16\), but should have \(16, 1\)"),
        ({"layer_scaling": 2.0}, "layer_scaling=2.0"),
    ],
)
def test_what_is_refused(changes, matching, tmp_path):
    config = peft.IA3Config(target_modules=["output.dense"], feedforward_modules=["output.dense"])
    written_by_peft(tiny.bare("bert"), tmp_path, config)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = tiny.bare("bert")
    with pytest.raises(UserError, match=matching):
        load(model, tmp_path)
    assert torch.equal(tiny.outputs(model), tiny.outputs(tiny.bare("bert")))


def test_what_peft_has_no_form_for_is_kept_in_our_own_file(tmp_path):
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Conv2d(1, 1, 1))
    shaken(model, "ia3(sites='0')").save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
