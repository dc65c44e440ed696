"""Models of timm, in a module of the same shape and, where timm is installed, themselves."""

from __future__ import annotations

import pytest
import torch

import graftkit


class Inner(torch.nn.Module):
    """As timm builds one: it knows its classifier's name, and a wrapper calls parts of it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"classifier": "top.last"}
        self.head_hidden_size = 12
        self.stages = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 8, 3))
        self.widen = torch.nn.Conv2d(8, 12, 1)
        self.top = torch.nn.Module()
        self.top.last = torch.nn.Linear(12, classes) if classes else torch.nn.Identity()

    def forward_features(self, x):
        return self.stages(x)

    def forward_head(self, x):
        return self.top.last(self.widen(x.mean(dim=(2, 3), keepdim=True)).relu().flatten(1))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class Wrapper(torch.nn.Module):
    """As transformers wraps it: with a classifier inside of the base, or bare and without calling the base as such."""

    base_model_prefix = "timm_model"

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.timm_model = Inner(classes)

    @property
    def base_model(self):
        return self.timm_model

    def forward(self, pixel_values):
        if isinstance(self.timm_model.top.last, torch.nn.Linear):
            return {"logits": self.timm_model(pixel_values)}
        states = self.timm_model.forward_features(pixel_values)
        return states, self.timm_model.forward_head(states)


@pytest.mark.parametrize("classes", [5, 0])
def test_a_wrapped_model_of_timm_has_its_head_inside(classes):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = Wrapper(classes).eval()
    inner = model.timm_model
    heads = [site.name for site in graftkit.Backbone(model).sites if site.role == "head"]
    assert heads == (["timm_model.top.last"] if classes else [])
    pooled = inner.widen(inner.stages(x).mean(dim=(2, 3), keepdim=True)).relu().flatten(1)
    graft = graftkit.attach(model, "head(classes=2, pooling='mean')")
    graft.model.eval()
    head = model.head_default
    torch.testing.assert_close(graft.model(pixel_values=x).logits, head.logits(pooled))
    assert set(graft.parameters) == {"head_default.output.weight", "head_default.output.bias"}
    if classes:
        own = graftkit.attach(Wrapper(classes), "head(classes=2, pooling='own')")
        assert set(own.parameters) == {"timm_model.top.last.weight", "timm_model.top.last.bias"}
        assert own.model(pixel_values=x)["logits"].shape == (2, 2)


@pytest.mark.parametrize("architecture", ["resnet10t", "convnext_atto"])
def test_timm_s_models_through_their_wrapper(architecture, colours, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    pytest.importorskip(
        "torchvision", reason="timm's transforms are those of torchvision, which is not installed"
    )
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    folder = tmp_path / "timm"
    config = TimmWrapperConfig.from_dict({"architecture": architecture, "num_classes": 5, "pretrained_cfg": {
        "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
    }})  # fmt: skip
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "TimmWrapperImageProcessor"}')
    for place, method in enumerate(("head(pooling='own')", "lora(rank=2) + head()", "head(pooling='mean')")):
        run = graftkit.tune(
            model=str(folder), task="image_classify", method=method, train=str(colours / "train"),
            eval=str(colours / "eval"), out=tmp_path / f"run{place}", settings={"train.epochs": 1.0},
        )  # fmt: skip
        assert run.metrics["rows"] == 12
        (answer,) = run.predict([str(colours / "eval" / "red" / "0.png")])
        assert answer["label"] in ("blue", "green", "red")
        if "mean" not in method:
            done = run.export(tmp_path / f"plain{place}")
            assert done["native"] and done["same_answers"] and done["largest_difference"] < 1e-4
