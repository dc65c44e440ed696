"""The transfer gap: signs that a model was pre-trained on something else than the rows at hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.data.images import Picture, load
from graftkit.data.sounds import Sound
from graftkit.data.words import words_of
from graftkit.engine.forward import Forward, evaluating
from graftkit.insight.probe import difference
from graftkit.insight.targets import Targets
from graftkit.tasks.base import Dataset

PIECES = 2.0  # tokens per word from which a tokenizer is said not to fit; about 1.2 is usual for English in English models
SMALL = 2.0  # factor of enlargement from which images are said to be small
RATE = (
    0.75  # share of the model's sampling rate below which recordings are said to lack its upper frequencies
)
SAMPLE, BATCH = 128, 32
# standard deviations, mean over the channels of a layer. A ResNet-20 of CIFAR-10: 0.18 on its own test images, 0.26 on
# photographs of insects in that size, 0.51 without the mean of its transform
SHIFT = 0.4
MARK = re.compile(r"[^\w\s]")


def signs_of(dataset: Dataset, texts: Sequence[Sequence[str]], most: int | None = None) -> list[str]:
    """Return warnings that need no weights: how the tokenizer splits words, and how images and sounds differ from what the
    model takes. `most`: the number of rows to look at, by default all texts and 128 images."""
    return [*pieces_of(dataset, texts, most), *images_of(dataset, most or SAMPLE), *sounds_of(dataset)]


def not_better(scores: np.ndarray, others: np.ndarray, targets: Targets, what: str) -> list[str]:
    """Return a warning unless the metric of the first scores is higher, by more than chance, than that of others, which are
    those of `what`."""
    low, high = difference(scores, others, targets)
    if low > 0:
        return []
    whole = np.ones((1, len(scores)))
    own, other = (float(targets.measure(part, whole)[0]) for part in (scores, others))
    how = "worse than" if high < 0 else "not clearly better than"
    return [
        f"the probe is {how} {what} ({targets.metric} {own:.3f} against {other:.3f}, 95% interval of the difference "
        f"{low:.3f} to {high:.3f}): as they are, the features of this model tell no more of the answers."
    ]


def pieces_of(dataset: Dataset, texts: Sequence[Sequence[str]], most: int | None = None) -> list[str]:
    """Return a warning if the tokenizer splits words into many pieces. `texts`: the columns of texts of the rows; `most`: the
    number of rows to look at.

    Words are counted without a dictionary (`data.words`), and so are punctuation marks; a row that may have been truncated
    is left out.
    """
    encoded = getattr(dataset, "encoded", None)
    if encoded is None:
        return []
    whole = np.flatnonzero(encoded.lengths < encoded.lengths.max() + (dataset.truncated == 0)).tolist()
    if most is not None and len(whole) > most:
        whole = whole[:: -(-len(whole) // most)]
    known = int(encoded.lengths[whole].sum()) - encoded.special * len(whole)
    words = sum(len(words_of(part[row])) + len(MARK.findall(part[row])) for part in texts for row in whole)
    if not words or known < PIECES * words:
        return []
    return [
        f"the model's tokenizer splits a word of these texts into {known / words:.1f} pieces in the mean, so it was made for other "
        "texts or another language; use a model that was pre-trained on texts like them."
    ]


def images_of(dataset: Dataset, most: int = SAMPLE) -> list[str]:
    """Return warnings about images that are enlarged a lot, or grey where a model was made for colours.

    `dataset`: with `pictures` and `pixels`, as of `image_classify`; of others there is nothing to say. `most`: the number of
    images to look at.
    """
    pictures: Sequence[Picture] | None = getattr(dataset, "pictures", None)
    if not pictures:
        return []
    some = [pictures[row] for row in np.linspace(0, len(pictures) - 1, min(most, len(pictures))).astype(int)]
    pixels = dataset.pixels  # type: ignore[attr-defined]
    seen = load(some, lambda image, place: (pixels.size(image), _is_grey(np.asarray(image))))
    found = []
    sides = [min(picture.width, picture.height) for picture in some]
    factor = float(np.median([min(size) / side for (size, _), side in zip(seen, sides)]))
    if factor >= SMALL:
        found.append(
            f"these images are enlarged {factor:.1f} times for this model (their shorter side has {np.median(sides):.0f} pixels in "
            "the median): it was made for larger ones, with more detail."
        )
    grey = float(np.mean([one for _, one in seen]))
    if grey > 0.5 and next(iter(dataset.batch(np.array([0])).inputs.values())).shape[1] == 3:
        found.append(f"{grey:.0%} of these images are grey, but the model takes colours.")
    return found


def sounds_of(dataset: Dataset) -> list[str]:
    """Return a warning if most recordings have less than three quarters of the sampling rate that the model takes.

    `dataset`: with `sounds` and `front`, as of `audio_classify`; of others there is nothing to say.
    """
    sounds: Sequence[Sound] | None = getattr(dataset, "sounds", None)
    if not sounds:
        return []
    rate: int = dataset.front.rate  # type: ignore[attr-defined]
    usual = float(np.median([sound.rate for sound in sounds]))
    if usual >= RATE * rate:
        return []
    return [
        f"these recordings have {usual:,.0f} samples a second in the median and the model takes {rate:,}, so it hears nothing above "
        f"{usual / 2:,.0f} Hz, where its training data had sound."
    ]


def _is_grey(image: np.ndarray) -> bool:
    """Whether the three channels of an image (height, width, 3) are the same, up to rounding by JPEG."""
    values = image.astype(np.int16)
    return bool(np.abs(values - values.mean(2, keepdims=True)).max() < 4)


def shift_of(forward: Forward, dataset: Dataset) -> list[str]:
    """Return a warning if rows are far from what a network with batch normalization was trained on.

    Such a layer keeps the mean and the variance of each channel over the training data. The distance of a layer is that of
    the means of these rows, in its standard deviations, and its mean over channels; the largest of all layers counts. A
    network without such layers keeps nothing of what it saw.
    """
    far = distance_of(forward, dataset)
    if far is None or far < SHIFT:
        return []
    return [
        f"these rows are far from what this network was trained on: within it, the means of its channels are off by {far:.1f} "
        "standard deviations of its batch normalization. Compare the size, the colours and the transform of the rows with "
        "those of its training data, and train more than a head."
    ]


@torch.no_grad()
def distance_of(forward: Forward, dataset: Dataset) -> float | None:
    """Return the largest distance of a layer with batch normalization, as `shift_of` says; None if there is none."""
    model = forward.graft.model
    layers = [
        layer for layer in model.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    ]  # fmt: skip
    if not layers:
        return None
    sums: dict[int, list[Tensor]] = {}

    def look(number: int, values: Tensor) -> None:
        part = values.float().movedim(1, -1).flatten(0, -2)
        total, seen = part.sum(0), part.new_tensor(float(len(part)))
        sums[number] = [a + b for a, b in zip(sums.get(number, (0 * total, 0 * seen)), (total, seen))]

    rows = np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset))).astype(int)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for number, layer in enumerate(layers):
            hook = layer.register_forward_pre_hook(lambda _, given, number=number: look(number, given[0]))
            stack.callback(hook.remove)
        for start in range(0, len(rows), BATCH):
            forward(dataset.batch(rows[start : start + BATCH], forward.device))
    found = []
    for number, (total, seen) in sums.items():
        mean, variance = layers[number].running_mean, layers[number].running_var
        assert mean is not None and variance is not None
        off = (total / seen - mean.float()).abs() / (variance.float() + layers[number].eps).sqrt()
        found.append(float(off.mean()))
    return max(found) if found else None
