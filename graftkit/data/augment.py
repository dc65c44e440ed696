"""Random augmentation of training images.

The random numbers are drawn for each image separately, so its augmentation does not depend on the other images of the batch
or on the thread that computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graftkit.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

DRAWS = 67  # random numbers per image: 40 for the crop, 2 for each operation, the last 3 for `pixels`
TRIES = 10  # attempts to draw a box that lies within the image
MOST_OPERATIONS = 12
MOST = 30  # largest magnitude of an operation


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images; 0 or None disables a part.

    `crop`: 'resized', a random box with at least the fraction `smallest` of the area and an aspect ratio of 3/4 to 4/3,
    resized to the model's input size (Szegedy et al. 2014, 'Going Deeper with Convolutions'); or 'padded', a random shift of
    up to `padding` pixels in each direction, filled with the mean colour (He et al. 2015). `flip`: probability of a
    horizontal flip. `operations`, `magnitude`: RandAugment (Cubuk et al. 2019), as in torchvision. `mixup`, `cutmix`: alpha
    of the Beta distribution that mixing weights are drawn from (Zhang et al. 2017; Yun et al. 2019); if both are set, each
    batch uses either with probability 1/2. `views`: how many augmented versions of an image there are, which epochs use in
    turn; 0 for a new one in each epoch. Mixed images have no versions of their own.
    """

    crop: str | None = None
    smallest: float = 0.08
    padding: int = 4
    flip: float = 0.0
    operations: int = 0
    magnitude: int = 9
    mixup: float = 0.0
    cutmix: float = 0.0
    views: int = 0

    def __post_init__(self) -> None:
        if self.views and self.mixes:
            raise UserError(
                "views keeps versions of single images, which mixup and cutmix mix; leave one of them out."
            )

    @property
    def repeats(self) -> bool:
        """Whether an image is the same in epochs of equal number modulo `views`."""
        return not self or self.views > 0

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
    def note(self) -> str:
        kept = f"in {self.views} versions" if self.views else "so no output is kept for another epoch"
        return f"images are changed at random in training ({self}), {kept}"

    @property
    def mixes(self) -> bool:
        """Whether the images of a batch, and with them their targets, are mixed."""
        return bool(self.mixup or self.cutmix)

    def draw(self, random: np.random.Generator) -> list[float]:
        """Draw the DRAWS numbers in [0, 1) that `image` and `pixels` use for one image."""
        return random.random(DRAWS).tolist()

    def image(self, image: Image, drawn: list[float], size: tuple[int, int], resample: int) -> Image:
        """Return the augmented image; a resized crop has `size` (height, width)."""
        numbers = iter(drawn)
        first = [next(numbers) for _ in range(4 * TRIES)]
        if self.crop == "resized":
            box = random_box(image.width, image.height, self.smallest, iter(first))
            image = image.resize((size[1], size[0]), resample=resample, box=box)  # type: ignore[arg-type]
        for _ in range(self.operations):
            image = operate(image, self.magnitude, next(numbers), next(numbers))
        return image

    def pixels(self, x: Tensor, drawn: list[list[float]]) -> Tensor:
        """Return a batch (images, channels, height, width), with each image shifted and flipped by its own numbers."""
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
        """Mix the images (images, channels, height, width) in pairs.

        Returns the mixed images, the index of each image's partner (images,), and the weight of the image itself.
        """
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
    """Return the (start, end) of a stretch of `share` * `length` around a random centre, clipped to [0, length]."""
    middle, half = int(drawn * length), int(length * share) // 2
    return max(0, middle - half), min(length, middle + half)


def random_box(width: int, height: int, smallest: float, drawn: Iterator[float]) -> tuple[int, int, int, int]:
    """Return a random box (left, top, right, bottom) within an image; area and log aspect ratio are uniform."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(TRIES):
        area = width * height * (smallest + (1 - smallest) * next(drawn))
        ratio = math.exp(low + (high - low) * next(drawn))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(next(drawn) * (width - w + 1)), int(next(drawn) * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * 4 / 3)))  # the largest centred box with an allowed ratio
    h = min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def operate(image: Image, magnitude: int, chosen: float, sign: float) -> Image:
    """Apply one operation of RandAugment. `chosen` and `sign`, in [0, 1), select the operation and its direction."""
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
