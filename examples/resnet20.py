"""ResNet-20 for CIFAR-10 as a model of one's own: `--model examples.resnet20:resnet20 --weights FILE.safetensors`.

He et al. 2015, 'Deep Residual Learning for Image Recognition', section 4.2, with the shortcut that has no parameters
(option A). The names of the parameters are those of pytorch_resnet_cifar10, whose weights were trained on images of
32 x 32 pixels, red, green, blue, 0 to 1, with ImageNet's means taken off and divided by its deviations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 10
DEPTH = 3  # blocks of a stage: 6 * 3 + 2 = 20 layers


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: every second pixel where the size is halved, new channels zero.

    (batch, inputs, height, width) -> (batch, outputs, height / stride, width / stride)
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2  # channels in front and behind

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(y + shortcut)


class ResNet20(nn.Module):
    """Images (batch, 3, 32, 32) to logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, stride=1)
        self.layer2 = stage(16, 32, stride=2)
        self.layer3 = stage(32, 64, stride=2)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(DEPTH - 1)))


def resnet20() -> ResNet20:
    """The network with random weights."""
    return ResNet20()
