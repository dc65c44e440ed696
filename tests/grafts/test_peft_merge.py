"""Merged grafts against PEFT's `add_weighted_adapter`, on the same adapters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from peft_versions import peft_has
from torch import Tensor, nn

from graftkit import load, merge
from graftkit.files import read_tensors
from graftkit.grafts.merge_rules import seed_of

pytestmark = pytest.mark.sampled

# PEFT 0.18 applies the sign of a negative weight to both factors, so that it is lost
NAMES, WEIGHTS = ("one", "two", "three"), [0.7, -0.4 if peft_has("0.19") else 0.4, 1.3]
TARGETS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_fc", "wte"],
    "llama": ["q_proj", "down_proj"],
}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def adapters(model: nn.Module, folder: Path, targets: list[str], ranks=(4, 4, 4), **more) -> PeftModel:
    """Three adapters of PEFT with random values, saved each in its folder."""
    wrapped = None
    for name, rank, alpha in zip(NAMES, ranks, (4, 10, 3)):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more)
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def folders(folder: Path) -> list[Path]:
    return [folder / name for name in NAMES]


def theirs(wrapped: PeftModel, how: str, **more) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.add_weighted_adapter(list(NAMES), WEIGHTS, "merged", combination_type=how, **more)
        wrapped.set_adapter("merged")


HOWS = ("linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd", "dare_linear", "dare_ties",
        "dare_linear_svd", "dare_ties_svd")  # fmt: skip
# sums and products on each kind of model; what else a rule does to tensors, on one
MERGES = [
    (kind, how)
    for number, how in enumerate(HOWS)
    for place, kind in enumerate(tiny.KINDS)
    if how in ("linear", "svd") or number % len(tiny.KINDS) == place
]


@pytest.mark.parametrize(("kind", "how"), MERGES)
def test_merged_outputs_are_those_of_peft(kind, how, tmp_path):
    wrapped = adapters(tiny.bare(kind), tmp_path, TARGETS[kind], fan_in_fan_out=kind == "gpt2")
    more = {}
    if how not in ("linear", "cat", "svd"):
        more["density"] = 1.0 if "dare" in how else 0.4  # the masks of dare are the subject of another test
    theirs(wrapped, how, **more)
    folder = merge(folders(tmp_path), tmp_path / "out", weights=WEIGHTS, how=how, **more)
    ours = load(tiny.bare(kind), folder)
    # the products of a tiny model are sums of many cancelling terms
    assert tiny.relative(tiny.outputs(ours.model), tiny.outputs(wrapped)) < 1e-5
    again = PeftModel.from_pretrained(tiny.bare(kind), folder)
    assert tiny.relative(tiny.outputs(again), tiny.outputs(ours.model)) < 1e-6


@pytest.mark.parametrize("how", ["cat", "svd", "ties-svd"])
def test_different_ranks_and_sites(how, tmp_path):
    patterns = {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 7}}
    wrapped = adapters(tiny.bare("bert"), tmp_path, TARGETS["bert"], ranks=(2, 3, 4), **patterns)
    more = {"density": 0.5} if "ties" in how else {}
    theirs(wrapped, how.replace("-", "_"), **more)
    folder = merge(folders(tmp_path), tmp_path / "out", weights=WEIGHTS, how=how, **more)
    assert tiny.relative(tiny.outputs(load(tiny.bare("bert"), folder).model), tiny.outputs(wrapped)) < 1e-5
    assert (
        tiny.relative(
            tiny.outputs(PeftModel.from_pretrained(tiny.bare("bert"), folder)), tiny.outputs(wrapped)
        )
        < 1e-5
    )


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties-svd"])
def test_convolutions(how, tmp_path):
    model = Convolutions()
    tiny.randomize(model, 0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fresh() -> nn.Module:
        new = Convolutions()
        new.load_state_dict(state)
        return new

    wrapped = adapters(model, tmp_path, ["first", "second"])
    more = {"density": 0.5} if "ties" in how else {}
    theirs(wrapped, how.replace("-", "_"), **more)
    folder = merge(folders(tmp_path), tmp_path / "out", weights=WEIGHTS, how=how, **more)
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert tiny.relative(load(fresh(), folder).model(x), wrapped(x)) < 1e-5
        assert tiny.relative(PeftModel.from_pretrained(fresh(), folder)(x), wrapped(x)) < 1e-5


@pytest.mark.parametrize("how", ["dare-linear", "dare-ties"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_random_masks_are_drawn_as_peft_draws_them(how, sign, tmp_path):
    """From one seed for each weight: PEFT draws them all from the generator of the process, in the order of modules."""
    wrapped = adapters(tiny.bare("bert"), tmp_path, TARGETS["bert"])
    function = getattr(merge_utils, how.replace("-", "_"))
    more = {"majority_sign_method": sign} if "ties" in how else {}
    folder = merge(
        folders(tmp_path), tmp_path / "out", weights=WEIGHTS, how=how, density=0.6, sign=sign, seed=3
    )
    merged, _ = read_tensors(folder / "adapter_model.safetensors")
    sites = [n for n, m in wrapped.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    assert len(sites) > 10
    for site in sites:
        layer = wrapped.get_submodule(site)
        scaled = [w * layer.scaling[name] for name, w in zip(NAMES, WEIGHTS)]
        torch.manual_seed(seed_of(3, site.removeprefix("base_model.model.")))
        for part, signs in (("lora_A", torch.tensor(scaled).sign()), ("lora_B", torch.ones(3))):
            tensors = [getattr(layer, part)[name].weight.data for name in NAMES]
            wanted = function(tensors, torch.tensor(scaled).abs().sqrt() * signs, 0.6, **more)
            torch.testing.assert_close(merged[f"{site}.{part}.weight"], wanted)


def test_saved_heads_are_averaged(tmp_path):
    wrapped = adapters(tiny.with_head("bert"), tmp_path, ["query"], modules_to_save=["classifier"])
    saved = wrapped.base_model.model.classifier.modules_to_save
    with torch.no_grad():
        for i, name in enumerate(NAMES):
            saved[name].weight.fill_(float(i + 1))
            saved[name].bias.copy_(torch.arange(3.0) * i)
    wrapped.save_pretrained(tmp_path)
    folder = merge(folders(tmp_path), tmp_path / "out", weights=[1, 1, 2])
    ours = load(tiny.with_head("bert"), folder)
    torch.testing.assert_close(ours.model.classifier.weight, torch.full((3, tiny.WIDTH), 2.25))
    torch.testing.assert_close(ours.model.classifier.bias, torch.arange(3.0) * 1.25)
    again = PeftModel.from_pretrained(tiny.with_head("bert"), folder)
    assert tiny.relative(tiny.outputs(again), tiny.outputs(ours.model)) < 1e-6
