"""Models that take images of one channel: of transformers, and modules of one's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from image_models import picture, tune
from torch import nn

from graftkit.errors import UserError
from graftkit.tasks.image_classify.inputs import Processor, takes_grey
from graftkit.tasks.image_classify.task import ImageClassify

OWN = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def net():
    return Net()
"""


def grey(image):
    """(height, width) of 0 to 1, by the weights of ITU-R 601 that PIL documents for mode L."""
    values = np.asarray(image, dtype=np.float64) @ np.array([299, 587, 114]) / 1000
    return torch.from_numpy(values / 255).float()


def test_the_pixels_of_a_transform_are_grey():
    image = picture("red", 1)
    found = ImageClassify(mean=0.3, deviation=0.5).transform(grey=True)(image)
    assert found.shape == (1, 36, 40)
    assert ((found[0] - (grey(image) - 0.3) / 0.5).abs() <= 1 / 255 / 0.5).all()
    plain = ImageClassify(channels="L").transform()(image)[0]
    assert ((plain - (grey(image) - 0.449) / 0.226).abs() <= 1 / 255 / 0.226 + 1e-3).all()
    with pytest.raises(UserError, match=r"it must be a number\."):
        ImageClassify(channels="L", mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize("mean", [[0.3], [0.3, 0.3, 0.3]])
def test_the_pixels_of_a_processor_are_grey(mean):
    from transformers import ViTImageProcessor

    given = ViTImageProcessor(size={"height": 36, "width": 40}, image_mean=mean, image_std=[0.5] * len(mean))
    image = picture("green", 1)
    found = Processor(given, "model", grey=True)(image)
    assert found.shape == (1, 36, 40)
    assert ((found[0] - (grey(image) - 0.3) / 0.5).abs() <= 1 / 255 / 0.5 + 1e-4).all()


def test_which_models_take_one_channel(tiny_vit):
    from transformers import ViTConfig, ViTForImageClassification

    assert takes_grey(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 3)))
    assert not takes_grey(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 3)))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for channels in (1, 3):
        model = ViTForImageClassification(
            ViTConfig(**small, num_channels=channels, image_size=32, patch_size=8)
        )
        assert takes_grey(model) == (channels == 1)


@pytest.mark.slow
def test_runs_of_both_kinds(colours, tmp_path, monkeypatch):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_channels=1,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    (tmp_path / "own_grey_net.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for number, (model, method) in enumerate(
        [(tmp_path / "vit", "lora(rank=2) + head()"), ("own_grey_net:net", "full() + head()")]
    ):
        run = tune(model, colours, tmp_path / f"run{number}", method=method)
        answers = run.predict([str(next((colours / "eval" / "red").iterdir()))])
        assert len(answers) == 1 and run.metrics["accuracy"] > 0.34, "green is lighter than blue and red"
