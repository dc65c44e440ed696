"""LoRA and DoRA beside PEFT's on modules of one's own: every kind of map, packed attention, experts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
import torch
from custom_models import MODELS, close, compare, given, grafted, make, mixture, shake, transposed_mixture
from torch import Tensor, nn

from graftkit import UserError, load

peft = pytest.importorskip("peft")
from peft_lora import shaken, with_peft, write_with_peft  # noqa: E402

pytestmark = pytest.mark.sampled

# ---- modules of one's own: outputs, gradients, and back


def conv(name: str) -> str:
    return make(name).name


CASES: list[tuple[str, dict[str, Any]]] = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "r": 3, "lora_alpha": 5}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "use_rslora": True, "r": 5}),
    ("MLP", {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32}),
    ("MLP", {"target_modules": ["lin0"], "bias": "all"}),
    ("MLP", {"target_modules": ["lin0"], "bias": "lora_only"}),
    ("MLP", {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    ("MLP without bias", {"target_modules": ["lin0"], "bias": "all"}),
    ("DeepMLP", {"target_modules": ["up", "down"], "rank_pattern": {"layers.1.up": 3, "2.down": 5},
                 "alpha_pattern": {r"layers\.1.*": 7}}),
    ("DeepMLP", {"target_modules": r"layers\.[12]\.(up|down)", "rank_pattern": {"^layers.1.up": 3}, "use_rslora": True,
                 "bias": "all", "alpha_pattern": {"layers.1.up": 9, "up": 7}}),
    ("EmbConv1D", {"target_modules": ["emb"]}),
    ("EmbConv1D", {"target_modules": ["emb", "conv1d", "lin0"], "fan_in_fan_out": True}),
    ("EmbConv1D", {"target_modules": ["conv1d"], "fan_in_fan_out": True, "modules_to_save": ["emb"]}),
    ("EmbConv1D with padding", {"target_modules": ["emb"]}),
    ("ScaledEmbedding", {"target_modules": ["emb"]}),
    *((name, {"target_modules": [conv(name)], "r": 8, "lora_alpha": 4}) for name in MODELS if name.startswith("Conv")),
    ("Conv2d", {"target_modules": ["conv2d", "lin0"], "lora_bias": True, "rank_pattern": {"lin0": 3}}),
    ("Conv3d", {"target_modules": ["conv3d", "lin0"], "bias": "lora_only", "alpha_pattern": {"lin0": 3}}),
]  # fmt: skip


def is_written(settings: dict[str, Any]) -> bool:
    """Whether all of it is in our PEFT form: of modules that are saved as a whole only heads are."""
    return "emb" not in settings.get("modules_to_save", ())


@pytest.mark.parametrize("name,settings", CASES, ids=lambda value: str(value)[:60])
def test_lora_on_modules_of_ones_own(name, settings, tmp_path):
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | settings))
    graft = compare(name, config, tmp_path, back=is_written(settings))
    assert any("lora_default" in key for key in graft.labels)


@pytest.mark.parametrize("name,settings", CASES, ids=lambda value: str(value)[:60])
def test_dora_on_modules_of_ones_own(name, settings, tmp_path):
    if settings.keys() & {"target_parameters", "lora_bias"}:
        pytest.skip("PEFT has no DoRA there")
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "use_dora": True} | settings))
    if "Groups" in name or "Depthwise" in name:  # PEFT's norm is then that of another matrix
        with pytest.raises(UserError, match=r"dora\(\).*grouped convolution.*lora\(\)"):
            compare(name, config, tmp_path)
        return
    graft = compare(name, config, tmp_path, back=is_written(settings))
    assert any("dora_default" in key for key in graft.labels)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["MLP", "EmbConv1D", "Conv2d strided"])
def test_dropout_is_that_of_peft(name, dora, tmp_path):
    """The same draws in training: an update of the same inputs."""
    targets = {"MLP": ["lin0", "lin1"], "EmbConv1D": ["emb", "conv1d"], "Conv2d strided": ["conv2d", "lin0"]}[
        name
    ]
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.4, target_modules=targets, use_dora=dora,
                             fan_in_fan_out=name == "EmbConv1D")  # fmt: skip
    graft = compare(name, config, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(make(name), str(tmp_path / "ours"))
    outputs = []
    for model in (graft.model, wrapped):
        torch.manual_seed(4)
        outputs.append(model.train()(given(name)).detach())
    close(*outputs, 1e-5, "outputs in training")


# ---- attention whose maps are packed


def test_peft_applies_the_update_of_an_attention_output_twice(tmp_path):
    """What is read of a version that does so gives what it gives; see peft#3774. If this fails, it was mended."""
    x = given("MHA")
    wrapped = peft.get_peft_model(
        make("MHA"), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["mha"])
    ).eval()
    shake(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    twin = make("MHA")
    layer = wrapped.base_model.model.mha
    with torch.no_grad():
        for module, weight, times in (
            (layer, "in_proj_weight", 1),
            (layer.base_layer.out_proj, "out_proj.weight", 2),
        ):
            change = module.lora_B["default"].weight @ module.lora_A["default"].weight
            twin.mha.get_parameter(weight).add_(times * 5 / 3 * change)
    close(wrapped(x).detach(), twin(x).detach(), 1e-5, "PEFT's")
    graft = load(make("MHA"), tmp_path)
    close(graft.model(x).detach(), wrapped(x).detach(), 1e-5, "outputs")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "0.22.0"}))
    with torch.no_grad():
        update = wrapped.base_model.model.mha.base_layer.out_proj
        twin.mha.out_proj.weight.sub_(
            5 / 3 * update.lora_B["default"].weight @ update.lora_A["default"].weight
        )
    close(load(make("MHA"), tmp_path).model(x).detach(), twin(x).detach(), 1e-5, "as the format says")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "target_modules": ["mha", "lin0"],
            "bias": "lora_only",
            "rank_pattern": {"mha": 3},
            "alpha_pattern": {"mha": 2},
        },
        {"bias": "all", "lora_dropout": 0.1, "use_rslora": True},
    ],
)
@pytest.mark.parametrize("name", ["MHA", "MHA, batch first"])
def test_packed_attention(name, settings, tmp_path):
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": ["mha"]} | settings))
    graft = compare(name, config, tmp_path, back=False, grads=False)
    assert not (tmp_path / "ours").exists()
    graft.save(tmp_path / "ours")  # with other scales at the two maps, which PEFT has not
    assert not (tmp_path / "ours" / "adapter_config.json").exists()
    assert torch.equal(load(make(name), tmp_path / "ours").model(given(name)), graft.model(given(name)))


@pytest.mark.parametrize(
    "text", ["lora(rank=3, alpha=5, sites='q')", "lora(rank=3, sites='in_proj_weight', bias='all')"]
)
def test_peft_reads_the_first_map_of_an_attention(text, tmp_path):
    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, 0.0, batch_first=True), 2)
        tiny.randomize(made, 3)
        return made.eval()

    graft = shaken(model(), text)
    graft.save(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(
        model(), str(tmp_path)
    ).train()  # in eval mode torch passes PEFT by
    x = torch.randn(3, 5, 12)
    close(wrapped.base_model.model(x).detach(), graft.model(x).detach(), 1e-5, "outputs")


# ---- experts


def tokens() -> Tensor:
    return tiny.batch()["input_ids"]


@pytest.mark.parametrize("build", [mixture, transposed_mixture])
@pytest.mark.parametrize(
    "text",
    [
        "lora(rank=3, alpha=5, sites='experts')",
        "lora(rank=3, sites='experts, q', rank_pattern={'blocks[0].experts': 2, 'down_proj': 4}, use_rslora=True)",
        "lora(rank=3, sites='down_proj', dropout=0.3)",
        "pissa(rank=3, sites='gate_up_proj, q')",
    ],
)
def test_peft_reads_our_experts(build, text, tmp_path):
    graft = shaken(build(), text)
    graft.save(tmp_path)
    wrapped = with_peft(build(), tmp_path)
    close(tiny.outputs(wrapped), tiny.outputs(graft.model), 1e-5, "outputs")
    assert torch.equal(tiny.outputs(load(build(), tmp_path).model), tiny.outputs(graft.model))


@pytest.mark.parametrize("build", [mixture, transposed_mixture])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []},
        {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], "target_modules": ["q_proj"],
         "rank_pattern": {"1.mlp.experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 3}},
        {"target_parameters": ["experts.down_proj"], "target_modules": ["o_proj"], "use_rslora": True},
        {"target_parameters": ["model.layers.0.mlp.experts.gate_up_proj"], "target_modules": []},
    ],
)  # fmt: skip
def test_we_read_experts_of_peft(build, settings, tmp_path):
    wrapped = write_with_peft(build(), tmp_path, r=3, lora_alpha=5, **settings)
    graft = load(build(), tmp_path)
    close(tiny.outputs(graft.model), tiny.outputs(wrapped), 1e-5, "outputs")
    assert tiny.relative(tiny.outputs(build()), tiny.outputs(wrapped)) > 1e-2


def test_names_that_end_alike(tmp_path):
    """'0' in a list of PEFT's means every module whose name ends in '.0'."""

    def model() -> nn.Module:
        inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        made = nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 6), nn.Linear(6, 3))
        tiny.randomize(made, 3)
        return made

    graft = shaken(model(), "lora(rank=2, sites='re:0|2', rank_pattern={'re:2': 3})")
    graft.save(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(model(), str(tmp_path))
    x = torch.randn(4, 6)
    close(wrapped.base_model.model(x).detach(), graft.model(x).detach(), 1e-5, "outputs")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "0|2"


@pytest.mark.parametrize("name", ["Conv2d dilated", "Conv2d circular"])
def test_geometry_that_peft_does_not_copy_stays_ours(name, tmp_path):
    graft = grafted(name, "lora(rank=2, sites='conv2d')")
    graft.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(load(make(name), tmp_path).model(given(name)), graft.model(given(name)))
