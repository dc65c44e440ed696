"""Random changes of training images. All that is random comes from numbers that are drawn for each image by itself, so
that an image is changed in the same way whatever stands beside it in a batch, and whichever thread changes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

DRAWS = 67  # numbers for one image: 40 for a crop, 2 for each operation, and for `pixels` the last 3
TRIES = 10  # at a box that lies within the image
MOST_OPERATIONS = 12
MOST = 30  # largest magnitude of an operation


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; the values that switch a part off are 0 and None.

    `crop`: 'resized', a random box that is brought to the model's size (Szegedy et al. 2014, 'Going Deeper with
    Convolutions'), of at least `smallest` of the area and 3/4 to 4/3 as wide as high; or 'padded', the image moved by up
    to `padding` pixels each way, with the mean colour behind it (He et al. 2015). `flip`: probability of left and
    right exchanged. `operations`, `magnitude`: RandAugment (Cubuk et al. 2019), as torchvision has it. `mixup`,
    `cutmix`: the parameter of the Beta distribution of shares (Zhang et al. 2017; Yun et al. 2019); with both, either is
    taken for a batch with probability 1/2.
    """

    crop: str | None = None
    smallest: float = 0.08
    padding: int = 4
    flip: float = 0.0
    operations: int = 0
    magnitude: int = 9
    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.crop or self.flip or self.operations or self.mixes)

    def __str__(self) -> str:
        parts = {
            f"{self.crop} crops": self.crop, f"flip {self.flip:g}": self.flip, f"mixup {self.mixup:g}": self.mixup,
            f"{self.operations} operations of strength {self.magnitude}": self.operations,
            f"cutmix {self.cutmix:g}": self.cutmix,
        }  # fmt: skip
        return ", ".join(text for text, on in parts.items() if on)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, and with them their targets."""
        return bool(self.mixup or self.cutmix)

    def draw(self, random: np.random.Generator) -> list[float]:
        """The DRAWS numbers in [0, 1) that `image` and `pixels` use for one image."""
        return random.random(DRAWS).tolist()

    def image(self, image: Image, drawn: list[float], size: tuple[int, int], resample: int) -> Image:
        """One image changed, of `size` (height, width) where it is cropped."""
        numbers = iter(drawn)
        first = [next(numbers) for _ in range(4 * TRIES)]
        if self.crop == "resized":
            box = random_box(image.width, image.height, self.smallest, iter(first))
            image = image.resize((size[1], size[0]), resample=resample, box=box)  # type: ignore[arg-type]
        for _ in range(self.operations):
            image = operate(image, self.magnitude, next(numbers), next(numbers))
        return image

    def pixels(self, x: Tensor, drawn: list[list[float]]) -> Tensor:
        """A batch (images, channels, height, width) moved and flipped, each image by its own numbers."""
        if self.crop == "padded":
            height, width = x.shape[2:]
            places = [[int(u * (2 * self.padding + 1)) for u in numbers[-3:-1]] for numbers in drawn]
            wide = torch.nn.functional.pad(x, [self.padding] * 4)
            x = torch.stack(
                [y[:, top : top + height, left : left + width] for y, (top, left) in zip(wide, places)]
            )
        if self.flip:
            flipped = torch.tensor([numbers[-1] < self.flip for numbers in drawn], device=x.device)
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        return x

    def mix(self, x: Tensor, random: np.random.Generator) -> tuple[Tensor, np.ndarray, float]:
        """Images (images, channels, height, width) mixed in pairs, the number of the other one of each, (images,), and
        the share of each image that is its own."""
        cut = self.cutmix > 0 and (self.mixup == 0 or random.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(random.beta(alpha, alpha))
        other = random.permutation(len(x))
        if not cut:
            return share * x + (1 - share) * x[other], other, share
        height, width = x.shape[2:]
        side = math.sqrt(1 - share)
        top, bottom = _stretch(height, side, random.random())
        left, right = _stretch(width, side, random.random())
        x = x.clone()
        x[:, :, top:bottom, left:right] = x[other][:, :, top:bottom, left:right]
        return x, other, 1 - (bottom - top) * (right - left) / (height * width)


def _stretch(length: int, share: float, drawn: float) -> tuple[int, int]:
    """The part of 0 to `length` that lies within `share` of it around a drawn middle."""
    middle, half = int(drawn * length), int(length * share) // 2
    return max(0, middle - half), min(length, middle + half)


def random_box(width: int, height: int, smallest: float, drawn: Iterator[float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a box within an image: its area uniform, the logarithm of its ratio too."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(TRIES):
        area = width * height * (smallest + (1 - smallest) * next(drawn))
        ratio = math.exp(low + (high - low) * next(drawn))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(next(drawn) * (width - w + 1)), int(next(drawn) * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * 4 / 3)))  # the largest box in the middle whose ratio is allowed
    h = min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def operate(image: Image, magnitude: int, chosen: float, sign: float) -> Image:
    """One of the operations of RandAugment; `chosen` and `sign` in [0, 1) say which, and in which direction."""
    operation = OPERATIONS[int(chosen * len(OPERATIONS))]
    return operation(image, magnitude / MOST, -1.0 if sign < 0.5 else 1.0)


def _affine(image: Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image:
    from PIL import Image as images

    return image.transform(image.size, images.Transform.AFFINE, (a, b, c, d, e, f), images.Resampling.NEAREST)


def _enhanced(kind: str) -> Callable[[Image, float, float], Image]:
    def change(image: Image, strength: float, sign: float) -> Image:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(image).enhance(1 + sign * 0.9 * strength)

    return change


def _operation(kind: str) -> Callable[[Image, float, float], Image]:
    def change(image: Image, strength: float, sign: float) -> Image:
        from PIL import ImageOps

        if kind == "posterize":
            return ImageOps.posterize(image, 8 - round(4 * strength))
        if kind == "solarize":
            return ImageOps.solarize(image, round(255 * (1 - strength)))
        return getattr(ImageOps, kind)(image)

    return change


OPERATIONS: tuple[Callable[[Image, float, float], Image], ...] = (
    lambda image, strength, sign: image,
    lambda image, strength, sign: _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, sign * 150 / 331 * image.width * strength, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, sign * 150 / 331 * image.height * strength),
    lambda image, strength, sign: image.rotate(sign * 30 * strength),
    _enhanced("Brightness"),
    _enhanced("Color"),
    _enhanced("Contrast"),
    _enhanced("Sharpness"),
    _operation("posterize"),
    _operation("solarize"),
    _operation("autocontrast"),
    _operation("equalize"),
)
