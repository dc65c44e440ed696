"""Image classification: one of several labels for each image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.fit import misfit
from graftkit.data.augment import Augmentation
from graftkit.data.columns import Column
from graftkit.data.folders import given_files, locate_files, read_files, stream_files
from graftkit.data.images import SUFFIXES, Picture, load, look_at
from graftkit.data.previews import thumbnail
from graftkit.data.read import Table
from graftkit.data.source import Batch, Pass, identity_of
from graftkit.errors import UserError, first_line, listing
from graftkit.recipe.catalogue import option
from graftkit.tasks.base import Dataset, Examples, Learn, Reading, Term, check_rows, one_term
from graftkit.tasks.explained import Cut, grid
from graftkit.tasks.image_classify.inputs import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Pixels,
    Transform,
    argument_of,
    as_image,
    each_channel,
    patch_of,
    processor_of,
    same_size,
    sides_of,
    takes_grey,
)
from graftkit.tasks.image_classify.mixed import MixedBatch
from graftkit.tasks.shared.labels import LABEL, LabelTask
from graftkit.tasks.shared.weights import check_class_weights, class_weights

NOUN = "image"
PATHS = ("img", "file", "path", "file_name", "filename", "filepath", "file_path", "image_path", "image_file")


class ImageDataset(Dataset):
    """Images, decoded when a batch is made; none of them is kept."""

    unit = "images"
    uniform = True

    def __init__(self, examples: Examples, pixels: Pixels, argument: str, augmentation: Augmentation) -> None:
        super().__init__(examples, np.ones(len(examples), dtype=np.int64))
        self.pictures: list[Picture] = examples.values["image"]
        self.pixels, self.pixels_in_full = pixels, repr(pixels)
        self.argument = argument
        self.augmentation = augmentation
        self.keeps, self.views = augmentation.repeats, max(1, augmentation.views)

    def batch(self, rows: np.ndarray, device: torch.device | None = None, at: Pass | None = None) -> Batch:
        return (MixedBatch if self.augmentation.mixes else Batch)(self, rows, device, at)

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        """(rows, channels, height, width) under the name by which the model takes images."""
        change, pixels = self.augmentation, self.pixels
        at = replace(at, epoch=at.epoch % self.views) if self.keeps else at
        on_images = change.crop == "resized" or change.operations
        drawn = [change.draw(at.generator(row)) for row in rows] if change else []

        def make(image: Any, place: int) -> Tensor:
            if not on_images:
                return pixels(image)
            image = change.image(image, drawn[place], pixels.size(image), pixels.resample)
            return pixels(image, whole=change.crop != "resized")

        made = load([self.pictures[row] for row in rows], make)
        if len({tuple(one.shape) for one in made}) > 1:
            raise UserError(f"the images of a batch come out in several sizes ({pixels}).")
        return {self.argument: change.pixels(torch.stack(made), drawn)}

    def targets(self, rows: np.ndarray) -> Tensor | None:
        targets = self.examples.targets
        return None if targets is None else torch.from_numpy(np.asarray(targets)[rows])

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        output = model(**batch.inputs)
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(found, Tensor) or found.dim() != 2:
            shape = list(found.shape) if isinstance(found, Tensor) else type(output).__name__
            raise UserError(
                f"{type(model).__name__} gives {shape}, where logits (images, classes) should come out."
            )
        return found

    def refuse_misfit(self, backbone: Backbone) -> None:
        """Raise `UserError` where the model cannot take an image as it is made, found by trying the first."""
        values = self.pixels(load(self.pictures[:1], lambda image, place: image)[0])
        model, name = backbone.model, self.argument
        problem = misfit(model, lambda device: model(**{name: values[None].to(device)}))
        if problem is not None:
            shape = " x ".join(map(str, values.shape))
            raise UserError(
                f"{backbone.source} cannot take an image of {shape} (channels x height x width), as {self.pixels} makes "
                f"it: {first_line(problem)} Sizes and channels of the model and of its image processor "
                "(preprocessor_config.json, or the options of image_classify()) have to be the same."
            )

    def identity(self, row: int, at: Pass) -> bytes | None:
        change = {"change": f"{self.augmentation!r} {at}"} if self.augmentation else {}
        return identity_of({"image": self.pictures[row].digest, "pixels": self.pixels_in_full, **change})

    def digested(self) -> Sequence[bytes | np.ndarray]:
        targets = [] if self.examples.targets is None else [np.asarray(self.examples.targets)]
        return [*targets, *(picture.digest for picture in self.pictures)]


@dataclass(frozen=True)
class ImageClassify(LabelTask):
    """One of several labels for an image: folders of images, or a table with paths or bytes.

    Transformers models have their own image processor. For other modules `resize`, `crop`, `channels`, `scale`, `mean` and
    `deviation` describe the preprocessing that the network was trained with; the defaults suit most ImageNet CNNs.
    """

    method: ClassVar[str] = "head()"
    modality: ClassVar[str] = "image"
    one_answer: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("IMAGE_CLASSIFICATION",)
    calibrates: ClassVar[str | None] = "label"
    aliases: ClassVar[tuple[str, ...]] = ("image_classification",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("image", PATHS, "text"),
        Column("label", LABEL, "label"),
    )

    resize: int | tuple | None = option(
        None, "pixels of the shorter side, or [height, width], for modules without a processor", at_least=1
    )
    crop: int | tuple | None = option(
        None, "side of the square cut from the middle, or [height, width]", at_least=1
    )
    channels: str | None = option(
        None,
        "channel order, or L for greyscale; null means RGB, or L if the model takes one channel",
        choices=("RGB", "BGR", "L", "rgb", "bgr", "l"),
    )
    scale: float | None = option(None, "factor for pixel values of 0 to 255; null means 1/255", above=0)
    mean: float | tuple | None = option(
        None, "subtracted after scaling, one number or one per channel; null means ImageNet's"
    )
    deviation: float | tuple | None = option(
        None,
        "standard deviation to divide by, one number or one per channel; null means ImageNet's, or 1 if mean is given",
    )
    interpolation: str | None = option(
        None,
        "interpolation for resizing; null means bilinear",
        choices=("nearest", "bilinear", "bicubic", "lanczos"),
    )
    random_crop: str | None = option(
        None,
        "random crop of training images: 'resized', a random box resized; 'padded', a shift by a few pixels",
        choices=("resized", "padded"),
    )
    smallest_crop: float = option(
        0.08, "minimum area of a 'resized' crop, as a share of the image", above=0, at_most=1
    )
    padding: int = option(4, "maximum shift of a 'padded' crop, in pixels", at_least=1)
    flip: float = option(0.0, "probability of a horizontal flip of a training image", at_least=0, at_most=1)
    randaugment: int = option(
        0, "number of RandAugment operations on each training image", at_least=0, at_most=12
    )
    magnitude: int = option(9, "magnitude of RandAugment", at_least=0, at_most=30)
    mixup: float = option(0.0, "alpha of mixup, for example 0.2; 0 disables it", at_least=0)
    cutmix: float = option(0.0, "alpha of cutmix, for example 1.0; 0 disables it", at_least=0)
    views: int = option(
        0, "augmented versions of each image, used in turn and cached below frozen layers; 0: a new one each epoch",
        at_least=0,
    )  # fmt: skip
    class_weights: str | dict | None = option(
        None, "'balanced' weights rows inversely to the frequency of their class; or a weight per class, {label: weight}",
        choices=("balanced",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        resize, crop = sides_of(self.resize, "resize"), sides_of(self.crop, "crop")
        if resize is not None and crop is not None and (resize[0] < crop[0] or resize[1] < crop[1]):
            raise UserError(
                f"image_classify(): crop is {self.crop!r}, which is more than resize={self.resize!r} leaves."
            )
        each_channel(self.mean, "mean", self._count(self.mean))
        if min(each_channel(self.deviation, "deviation", self._count(self.deviation)) or (1,)) <= 0:
            raise UserError(f"image_classify(): deviation is {self.deviation!r}, but must be above 0.")

    def _count(self, value: Any) -> int:
        """How many channels there are; where only the model tells, as many as an option has numbers, 1 or 3."""
        if self.channels is not None:
            return 1 if self.channels.upper() == "L" else 3
        return 1 if isinstance(value, (list, tuple)) and len(value) == 1 else 3

    def read(self, source: Any, reading: Reading, name: str) -> Table:
        return read_files(
            source, suffixes=SUFFIXES, column=reading.columns.get("image", "image"), noun=NOUN, name=name,
            encoding=reading.encoding, skip_bad=reading.skip_bad,
        )  # fmt: skip

    def pieces(self, source: Any, reading: Reading, name: str, rows: int) -> Iterator[Table]:
        return stream_files(
            source, suffixes=SUFFIXES, column=reading.columns.get("image", "image"), noun=NOUN, name=name,
            encoding=reading.encoding, skip_bad=reading.skip_bad, rows=rows,
        )  # fmt: skip

    def given(self, items: list[Any], columns: dict[str, str]) -> list[dict[str, Any]] | None:
        if not items:
            raise UserError("there is no image to answer; name one or more, or give --data FOLDER.")
        return given_files(items, columns.get("image", "image"), NOUN)

    def predict_arguments(self, columns: Mapping[str, str]) -> str:
        return "picture.jpg"

    def examples(
        self,
        table: Table,
        columns: dict[str, str],
        labels: Sequence[str],
        skip_bad: bool,
        targets: bool = True,
    ) -> Examples:
        """Every image is decoded once, several at a time, and none is kept."""
        column = columns["image"]
        sources, problems = locate_files(table, column, noun=NOUN, skip_bad=skip_bad)
        pictures: list[Any] = [None] * len(table)
        there = [row for row in range(len(table)) if row not in problems]
        names = [_name(table, column, row) for row in there]
        for row, name, found in zip(there, names, look_at([sources[row] for row in there], names)):
            pictures[row] = found
            if isinstance(found, str):
                where = table.where(row)
                problems[row] = f"{where if where == name else f'{where}: {name}'} {found}."
        wrong = self.wrong(table, columns, labels) if targets else None

        def problem(row: int) -> str | None:
            return problems.get(row) or (None if wrong is None else wrong(row))

        looked_at = replace(table, columns={**table.columns, column: pictures})
        kept, skipped = check_rows(looked_at, problem, skip_bad)
        numbers = self.numbers(kept, columns, labels) if targets else None
        return Examples(kept, {"image": kept.columns[column]}, numbers, skipped)

    def max_length(self, wanted: int | None, backbone: Backbone) -> int:
        if wanted is not None:
            raise UserError("data.max_length is for texts, but images have no tokens; leave it out.")
        return 1

    def dataset(
        self, examples: Examples, backbone: Backbone, max_length: int, training: bool = False
    ) -> ImageDataset:
        pictures: list[Picture] = examples.values["image"]
        processor = processor_of(backbone)
        told = [name for name in TRANSFORM if getattr(self, name) is not None]
        if processor is not None and told:
            raise UserError(
                f"{backbone.source} comes with its own image processor ({processor}); leave {listing(told)} out of "
                "image_classify()."
            )
        pixels: Pixels = processor or self.transform(takes_grey(backbone.model))
        if isinstance(pixels, Transform):
            same_size(pixels, [(p.width, p.height) for p in pictures], [p.name for p in pictures])
        change = self.augmentation() if training else Augmentation()
        made = ImageDataset(examples, pixels, argument_of(backbone.model), change)
        made.refuse_misfit(backbone)
        return made

    def transform(self, grey: bool = False) -> Transform:
        """What is done to images for a module that brings no processor. `grey`: it takes one channel."""
        from PIL.Image import Resampling

        resize = (
            self.resize
            if self.resize is None or isinstance(self.resize, int)
            else sides_of(self.resize, "resize")
        )
        channels = (self.channels or ("L" if grey else "RGB")).upper()
        count = 1 if channels == "L" else 3
        order = slice(None, None, -1) if channels == "BGR" else slice(None)
        scale = 1 / 255 if self.scale is None else self.scale
        mean, deviation = (
            each_channel(self.mean, "mean", count),
            each_channel(self.deviation, "deviation", count),
        )
        of_mean, of_deviation = IMAGENET_MEAN[order], IMAGENET_DEVIATION[order]
        if count == 1:
            of_mean, of_deviation = (sum(of_mean) / 3,), (sum(of_deviation) / 3,)
        if deviation is None:
            known = self.mean is None
            deviation = tuple(v * 255 * scale for v in of_deviation) if known else (1.0,) * count
        if mean is None:
            mean = tuple(v * 255 * scale for v in of_mean)
        resample = Resampling[(self.interpolation or "bilinear").upper()]
        return Transform(resize, sides_of(self.crop, "crop"), channels, scale, mean, deviation, int(resample))

    def augmentation(self) -> Augmentation:
        """What is done to training images."""
        return Augmentation(
            self.random_crop, self.smallest_crop, self.padding, self.flip, self.randaugment, self.magnitude,
            self.mixup, self.cutmix, self.views,
        )  # fmt: skip

    def learner(self, dataset: Dataset, labels: Sequence[str], label_smoothing: float) -> Learn:
        """Return the cross-entropy; for mixed images the average of both labels, weighted by their shares."""
        loss = self.loss(dataset, labels, label_smoothing)

        def of_batch(logits: Tensor, batch: Batch) -> Term:
            assert batch.targets is not None
            own = loss(logits, batch.targets)
            if not isinstance(batch, MixedBatch):
                return own
            other, share = loss(logits, batch.others), batch.share
            assert own.correct is not None and other.correct is not None
            return Term(
                share * own.losses + (1 - share) * other.losses,
                share * own.correct + (1 - share) * other.correct,
            )

        return one_term(of_batch)

    def label_names(self, table: Table, columns: dict[str, str], skip_bad: bool) -> tuple[str, ...]:
        names = super().label_names(table, columns, skip_bad)
        check_class_weights(self.class_weights, names, self.name)
        return names

    def class_weight(self, counts: np.ndarray, labels: Sequence[str]) -> Tensor | None:
        return class_weights(self.class_weights, counts, labels)

    def divide(self, dataset: Dataset, row: int, backbone: Backbone, inputs: dict[str, Tensor]) -> Cut:
        assert isinstance(dataset, ImageDataset)
        return grid(inputs[dataset.argument], patch_of(backbone.model), dataset.argument)

    def pictured(self, dataset: Dataset, row: int, inputs: dict[str, Tensor]) -> np.ndarray:
        assert isinstance(dataset, ImageDataset)
        return as_image(dataset.pixels, inputs[dataset.argument][0].float().cpu().numpy())

    def asked(self, examples: Examples, row: int) -> dict[str, Any]:
        return {"image": examples.values["image"][row].name}

    def preview(self, examples: Examples, row: int) -> dict[str, str]:
        return {"image": thumbnail(examples.values["image"][row])}

    def statistics(self, dataset: Dataset, labels: Sequence[str]) -> dict[str, Any]:
        assert isinstance(dataset, ImageDataset)
        pictures = dataset.pictures
        several = sum(picture.several for picture in pictures)
        sides = {name: [getattr(p, name) for p in pictures] for name in ("width", "height")}
        sizes = {
            name: {"least": min(found), "median": int(np.median(found)), "most": max(found)}
            for name, found in sides.items()
        }
        spans = [
            f"{f['least']}" if f["least"] == f["most"] else f"{f['least']} to {f['most']}"
            for f in sizes.values()
        ]
        notes = [f"images are {spans[0]} pixels wide and {spans[1]} high; {dataset.pixels}"]
        if several:
            notes.append(f"{several} files have several pictures or frames; the first of each is taken")
        if dataset.augmentation:
            notes.append(dataset.augmentation.note)
        return {
            **super().statistics(dataset, labels),
            "sizes": sizes,
            "several_pictures": several,
            "notes": notes,
        }


TRANSFORM = ("resize", "crop", "channels", "scale", "mean", "deviation", "interpolation")


def _name(table: Table, column: str, row: int) -> str:
    """What an image is called: its path, or its number."""
    value = table.columns[column][row]
    if isinstance(value, Mapping):
        value = value.get("path")
    return (
        os.fspath(value)
        if isinstance(value, (str, os.PathLike)) and value
        else f"{NOUN} {table.numbers[row]}"
    )
