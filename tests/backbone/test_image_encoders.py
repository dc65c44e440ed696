"""Image encoders that people reach for, each with a peculiarity: towers for texts, poolers, tokens of pre-training."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("PIL")
import torch
import transformers as hf

import graftkit

pytestmark = pytest.mark.sampled

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXTS = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16}
SQUARE = {"height": 32, "width": 32}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
ENCODERS = {
    "clip": (
        "CLIPModel",
        hf.CLIPConfig(vision_config=VISION, text_config=TEXTS),
        hf.CLIPImageProcessor(**CROPPED),
    ),
    "siglip": (
        "SiglipForImageClassification",
        hf.SiglipConfig(vision_config=VISION, text_config=TEXTS, num_labels=3),
        hf.SiglipImageProcessor(size=SQUARE),
    ),
    "siglip_vision": (
        "SiglipVisionModel",
        hf.SiglipVisionConfig(**VISION),
        hf.SiglipImageProcessor(size=SQUARE),
    ),
    "dinov2": ("Dinov2Model", hf.Dinov2Config(**VISION), hf.BitImageProcessor(**CROPPED)),
    "dinov3": ("DINOv3ViTModel", hf.DINOv3ViTConfig(**VISION), hf.ViTImageProcessor(size=SQUARE)),
    "beit": (
        "BeitForImageClassification",
        hf.BeitConfig(**VISION, num_labels=3),
        hf.ViTImageProcessor(size=SQUARE),
    ),
}
OTHERS = ("head()", "head(pooling='mean')", "lora(rank=2) + head()")
UNUSED = {  # by full(): these stand behind or beside what the head reads
    "clip": {"vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"},
    "siglip": {f"vision_model.head.{part}" for part in (
        "probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
        "attention.out_proj.bias", "layernorm.weight", "layernorm.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias",
    )},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            kind, config, processor = ENCODERS[name]
            made[name] = tmp_path_factory.mktemp("encoders") / name
            torch.manual_seed(0)
            getattr(hf, kind)(config).save_pretrained(made[name])
            processor.save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("method", ["full() + head()", None], ids=["full", "other"])
@pytest.mark.slow
def test_each_is_tuned_and_answers(name, method, folder, colours, tmp_path):
    """With `full()`, which tells what takes no part, and with one of the others."""
    method = method or OTHERS[list(ENCODERS).index(name) % len(OTHERS)]
    run = graftkit.tune(
        model=str(folder(name)), task="image_classify", train=str(colours / "train"), eval=str(colours / "eval"),
        method=method, out=tmp_path / "run",
        settings={"train.steps": 3, "train.precision": "fp32", "train.evaluate_every": "end"},
    )  # fmt: skip
    assert run.metrics["rows"] == 12
    assert run.evaluate(str(colours / "eval")) == run.metrics
    assert set(run.result["unused_parameters"]) == (UNUSED.get(name, set()) if "full" in method else set())


def test_parts_of_them(folder):
    roles = {}
    for name, kind in (("dinov3", "DINOv3ViTModel"), ("siglip", "SiglipForImageClassification")):
        model = getattr(hf, kind).from_pretrained(folder(name))
        roles |= {f"{name} {site.name}": site.role for site in graftkit.Backbone(model).sites}
    assert roles["dinov3 embeddings.patch_embeddings"] == "embedding" and roles["dinov3 norm"] == "norm"
    assert not any(role == "head" for name, role in roles.items() if name.startswith("dinov3"))
    assert roles["siglip vision_model.head.mlp.fc1"] == "pooler" and roles["siglip classifier"] == "head"


@pytest.mark.slow
def test_what_has_no_part_in_the_output_is_told(folder, colours, tmp_path, command):
    """SigLIP's attention pooler: its classifier reads past it. It is not counted as trained."""
    words = [
        "--model", folder("siglip"), "--task", "image_classify", "--train", colours / "train", "data.eval=null",
        "--method", "full() + head()", "--out", tmp_path / "run", "train.steps=4",
    ]  # fmt: skip
    done = command("tune", *words)
    assert done.status == 0, done.err
    assert "11 parameters do not affect the output and stay unchanged: vision_model.head." in done.out
    result, plan = (
        json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("result", "plan")
    )
    assert plan["trained_parameters"] - result["trained_parameters"] == sum(
        p.numel() for name, p in hf.SiglipForImageClassification.from_pretrained(folder("siglip")).named_parameters()
        if name in UNUSED["siglip"]
    )  # fmt: skip
    assert "do not affect the output" in (tmp_path / "run" / "README.md").read_text()
