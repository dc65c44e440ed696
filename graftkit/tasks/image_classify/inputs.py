"""Turn images into model inputs, with the model's own processor or, for other modules, as configured in the recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.calls import parameters_of
from graftkit.backbone.memory import is_out_of_memory
from graftkit.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)  # of red, green and blue in [0, 1]
IMAGENET_DEVIATION: tuple[float, ...] = (0.229, 0.224, 0.225)


class Pixels(Protocol):
    """A conversion of images to tensors. `resample`: the number of PIL's resampling filter."""

    @property
    def resample(self) -> int: ...

    def size(self, image: Image) -> tuple[int, int]:
        """Return the (height, width) of the tensor for an image."""
        ...

    def __call__(self, image: Image, whole: bool = True) -> Tensor:
        """Return an RGB image as (channels, height, width). If `whole` is False, it already has its final size."""
        ...


@dataclass(frozen=True)
class Transform:
    """Resize, crop the centre, reorder channels, rescale, subtract the mean and divide by the standard deviation.

    `resize`: shorter side in pixels, or (height, width). `crop`: (height, width). `mean` and `deviation` follow the order
    of `channels`, and apply after multiplication by `scale`.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    channels: str
    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    resample: int

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the (height, width) of an image of this size after resizing, before the crop."""
        if self.resize is None:
            return height, width
        if not isinstance(self.resize, int):
            return self.resize
        longer = int(self.resize * max(width, height) / min(width, height))
        return (longer, self.resize) if height > width else (self.resize, longer)

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the (height, width) of the tensor for an image of this size."""
        return self.crop or self.resized(width, height)

    def size(self, image: Image) -> tuple[int, int]:
        return self.size_of(image.width, image.height)

    def __call__(self, image: Image, whole: bool = True) -> Tensor:
        if whole:
            height, width = self.resized(image.width, image.height)
            if (width, height) != image.size:
                image = image.resize((width, height), resample=self.resample)  # type: ignore[arg-type]
            if self.crop is not None:
                top, left = round((height - self.crop[0]) / 2), round((width - self.crop[1]) / 2)
                image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        values = np.asarray(image.convert("L") if self.channels == "L" else image, dtype=np.float32)
        values = values.reshape(*values.shape[:2], -1)
        if self.channels == "BGR":
            values = values[..., ::-1]
        values = values * np.float32(self.scale) - np.array(self.mean, dtype=np.float32)
        values /= np.array(self.deviation, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def __str__(self) -> str:
        sides = "not resized" if self.resize is None else f"resized to {_sides(self.resize)}"
        crop = "" if self.crop is None else f", centre crop {self.crop[0]} x {self.crop[1]}"
        mean, deviation = (" ".join(f"{v:g}" for v in values) for values in (self.mean, self.deviation))
        return f"{sides}{crop}, {self.channels} times {self.scale:.4g}, minus {mean}, divided by {deviation}"


def _sides(resize: int | tuple[int, int]) -> str:
    return f"a shorter side of {resize}" if isinstance(resize, int) else f"{resize[0]} x {resize[1]}"


class Processor:
    """The image processor of a `transformers` model."""

    def __init__(self, processor: Any, source: str, grey: bool = False) -> None:
        self.processor = processor
        self.source = source
        self.grey = grey  # the model takes single-channel images
        self.more = {
            name: [float(np.mean(value))] * 3
            for name in ("image_mean", "image_std")
            if grey and (value := getattr(processor, name, None)) is not None
        }
        self.resample = int(getattr(processor, "resample", None) or 2)
        mean = getattr(processor, "image_mean", None)
        if isinstance(mean, list | tuple) and len(mean) != 3 and not (grey and len(mean) == 1):
            raise UserError(
                f"the image processor of {source} is for images with {len(mean)} channel{'s' * (len(mean) != 1)} (image_mean "
                "in preprocessor_config.json), but images are read as RGB; use a model with three channels."
            )
        from PIL import Image

        self.given = tuple(self(Image.new("RGB", (64, 64))).shape[1:])
        self.as_it_is = {
            name: False
            for name in ("do_resize", "do_center_crop", "do_pad")
            if getattr(processor, name, None) is not None
        }

    def size(self, image: Image) -> tuple[int, int]:
        return self.given  # type: ignore[return-value]

    def __call__(self, image: Image, whole: bool = True) -> Tensor:
        if self.grey:  # most processors need three channels: pass equal ones
            image = image.convert("L").convert("RGB")
        try:
            made = self.processor(image, return_tensors="pt", **self.more, **({} if whole else self.as_it_is))
        except Exception as error:  # processors can raise anything
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"the image processor of {self.source} fails on an image of {image.width} x {image.height}: "
                f"{type(error).__name__}: {first_line(error)}."
            ) from None
        values = dict(made).get("pixel_values")
        if not isinstance(values, Tensor) or values.dim() != 4:
            raise UserError(
                f"the image processor of {self.source} returns {', '.join(made)} instead of one pixel_values tensor per "
                "image, so it cannot be used for classification."
            )
        return values[0, :1].float() if self.grey else values[0].float()

    def __repr__(self) -> str:
        return f"{type(self.processor).__qualname__} {self.grey} {self.processor.to_json_string()}"

    def __str__(self) -> str:
        return f"{self.given[0]} x {self.given[1]} by {type(self.processor).__name__}"


def as_image(pixels: Pixels, values: np.ndarray) -> np.ndarray:
    """Return what `pixels` made, (channels, height, width), as an image again, (height, width, 3) of 8 bits.

    How it turns colours into numbers is read from black, red, green and blue images, as that is linear.
    """
    from PIL import Image

    colours = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
    size = max(values.shape[1:])
    made = [pixels(Image.new("RGB", (size, size), one)).mean((1, 2)).double().numpy() for one in colours]
    if len(values) == 1:
        white = float(pixels(Image.new("RGB", (size, size), (255, 255, 255))).mean())
        levels = (values - made[0][:, None, None]) / (white - made[0][:, None, None]) * 255
        levels = levels.repeat(3, axis=0)
    else:
        matrix = np.stack([one - made[0] for one in made[1:]], axis=1)
        levels = 255 * np.linalg.solve(matrix, (values - made[0][:, None, None]).reshape(3, -1))
        levels = levels.reshape(values.shape)
    return np.clip(levels.round(), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def argument_of(model: nn.Module) -> str:
    """Return the name of the argument through which a model takes images."""
    if hasattr(model, "config"):
        return getattr(model, "main_input_name", "pixel_values")
    return next(iter(parameters_of(model)))


def takes_grey(model: nn.Module) -> bool:
    """Return whether a model takes single-channel images, according to its config or else its first convolution."""
    config = getattr(model, "config", None)
    channels = getattr(getattr(config, "vision_config", config), "num_channels", None)
    if isinstance(channels, int):
        return channels == 1
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first is not None and first.in_channels == 1


def patch_of(model: nn.Module) -> int | None:
    """Return the side of the patches that a model divides images into, in pixels; None if it has none."""
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    return patch if isinstance(patch, int) else None


def processor_of(backbone: Backbone) -> Processor | None:
    """Return the image processor of a model, or None for a user's own module.

    Raises `UserError` for a `transformers` model without one.
    """
    if backbone.processor is None and not hasattr(backbone.model, "config"):
        return None
    from transformers.image_processing_utils import BaseImageProcessor

    if isinstance(backbone.processor, BaseImageProcessor):
        return Processor(backbone.processor, backbone.source, takes_grey(backbone.model))
    raise UserError(f"{backbone.source} has no image processor, so it takes no images.")


def same_size(transform: Transform, sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> None:
    """Raise `UserError` unless the transform gives all images the same size. `sizes`: (width, height) of each."""
    first = transform.size_of(*sizes[0])
    for (width, height), name in zip(sizes, names):
        found = transform.size_of(width, height)
        if found != first:
            raise UserError(
                f"images have different sizes after the transform: {names[0]} is {first[0]} x {first[1]}, {name} is "
                f"{found[0]} x {found[1]} (height x width). Set the input size of the model in the task, for example "
                "image_classify(resize=256, crop=224)."
            )


def sides_of(value: Any, name: str) -> tuple[int, int] | None:
    """Return (height, width) for an option that gives the side of a square or both sides; None for None."""
    if value is None:
        return None
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(
            f"image_classify(): {name} is {value!r}; it must be a number of pixels or [height, width]."
        )
    return sides


def each_channel(value: Any, name: str, count: int) -> tuple[float, ...] | None:
    """Return one number for each of `count` channels, for an option that gives one for all or one each; None for None."""
    if value is None:
        return None
    values = (value,) * count if isinstance(value, (int, float)) else tuple(value)
    if len(values) != count or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        each = "" if count == 1 else f" or a list of {count}, one for each channel"
        raise UserError(f"image_classify(): {name} is {value!r}; it must be a number{each}.")
    return tuple(map(float, values))
