"""SqueezeNet 1.0 as a model of one's own: `--model examples.squeezenet:squeezenet --weights FILE.safetensors`.

Iandola et al. 2016, 'SqueezeNet: AlexNet-level accuracy with 50x fewer parameters', table 1. The names of the
parameters are those of torchvision's `squeezenet1_0`. The weights of the Deep Compression release were trained on
images of 227 x 227 pixels in the order blue, green, red, 0 to 255, minus (104, 117, 123).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 1000  # of ImageNet-1k


class Fire(nn.Module):
    """Squeeze the channels by a 1 x 1 convolution, expand them by 1 x 1 and 3 x 3 ones side by side.

    (batch, inputs, height, width) -> (batch, 2 * expanded, height, width)
    """

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, kernel_size=1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """Images (batch, 3, height, width) to logits (batch, 1000). The head is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=7, stride=2),
            nn.ReLU(),
            pool(),
            Fire(96, 16, 64),
            Fire(128, 16, 64),
            Fire(128, 32, 128),
            pool(),
            Fire(256, 32, 128),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            pool(),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(512, CLASSES, kernel_size=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)


def pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)


def squeezenet() -> SqueezeNet:
    """The network with random weights."""
    return SqueezeNet()
