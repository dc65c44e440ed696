"""A dataset of sounds: decoded when needed, cached up to 1 GiB, augmented in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from graftkit.backbone import Backbone
from graftkit.backbone.fit import misfit
from graftkit.data.sounds import Sound
from graftkit.data.source import Pass, identity_of
from graftkit.errors import UserError, first_line, listing
from graftkit.tasks.audio_classify.inputs import Front
from graftkit.tasks.base import Dataset, Examples

ROOM = 1 << 30  # bytes of decoded sounds or features that a dataset caches


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training rows, each from its own generator.

    `gain`: maximum change of loudness, in decibels up or down. `shift`: maximum shift in time, in samples. `masks`: number
    of time masks and of frequency masks, each at most the fraction `time` of the frames, or `frequency` of the bands.
    """

    gain: float = 0.0
    shift: int = 0
    masks: int = 0
    time: float = 0.0
    frequency: float = 0.0

    @property
    def of_waves(self) -> bool:
        return bool(self.gain or self.shift)

    def wave(self, wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return a wave (samples,) with a random gain and shift, of the same length."""
        if self.gain:
            wave = wave * np.float32(10 ** (self.gain * (2 * random.random() - 1) / 20))
        most = min(self.shift, len(wave) - 1)
        if most:
            by = int(random.integers(-most, most + 1))
            wave = np.concatenate([np.zeros(max(by, 0), wave.dtype), wave[max(-by, 0) : len(wave) - max(by, 0)],
                                   np.zeros(max(-by, 0), wave.dtype)])  # fmt: skip
        return wave

    def features(
        self, features: np.ndarray, time: int, frames: int, random: np.random.Generator
    ) -> np.ndarray:
        """Return the features with random time and frequency masks set to their mean (SpecAugment, Park et al. 2019, section
        2). `time`: the time axis; `frames`: the number of frames that are not padding."""
        if not self.masks:
            return features
        result = features.copy()
        rows = np.moveaxis(result, time, 0)[:frames]  # (frames, bands), a view
        mean = rows.mean()
        for _ in range(self.masks):
            rows[_stripe(len(rows), self.time, random)] = mean
            rows[:, _stripe(rows.shape[1], self.frequency, random)] = mean
        return result


def _stripe(places: int, share: float, random: np.random.Generator) -> slice:
    width = int(random.integers(0, round(share * places) + 1))
    start = int(random.integers(0, places - width + 1))
    return slice(start, start + width)


class SoundDataset(Dataset):
    """Sounds as model inputs; `lengths` in samples at the model's sampling rate.

    `longest`: maximum samples of a row; longer sounds are cut as `cut` says. `padded`: every row is padded to `longest`,
    so that the answers of a model without an attention mask do not depend on the other rows of a batch.
    """

    unit: ClassVar[str] = "samples"

    def __init__(self, examples: Examples, front: Front, longest: int, cut: str, padded: bool,
                 augmentation: Augmentation) -> None:  # fmt: skip
        self.sounds: list[Sound] = examples.values["audio"]
        whole = np.array([sound.length(front.rate) for sound in self.sounds])
        super().__init__(examples, np.minimum(whole, longest))
        self.truncated = int((whole > longest).sum())
        self.front, self.longest, self.cut = front, longest, cut
        self.padded = padded
        self.uniform = front.fixed or padded
        self.augmentation = augmentation
        self.keeps = augmentation == Augmentation()
        self.how = f"{front!r} {longest} {cut} {padded}"
        self._kept: dict[int, np.ndarray] = {}
        self._room = ROOM

    def inputs(self, rows: np.ndarray, at: Pass) -> dict[str, Tensor]:
        features = [self._features(int(row), at) for row in rows]
        if self.front.fixed:
            return {self.front.name: torch.from_numpy(np.stack(features))}
        sizes = np.array([len(row) for row in features])
        padded = np.full((len(rows), sizes.max(), *features[0].shape[1:]), self.front.padding, np.float32)
        for place, row in zip(padded, features):
            place[: len(row)] = row
        found = {self.front.name: torch.from_numpy(np.ascontiguousarray(self.front.batch(padded)))}
        if self.front.mask:
            found["attention_mask"] = torch.from_numpy(
                (np.arange(sizes.max()) < sizes[:, None]).astype(np.int64)
            )
        return found

    def _features(self, row: int, at: Pass) -> np.ndarray:
        augmentation, front, random = self.augmentation, self.front, at.generator(row)
        if not augmentation.of_waves:
            features = self._keeping(row, lambda: self._made(self._wave(row)))
        else:
            features = self._made(augmentation.wave(self._keeping(row, lambda: self._wave(row)), random))
        if front.time is None:
            return features
        share = self.lengths[row] / self.longest if self.uniform else 1.0
        frames = max(1, round(share * features.shape[front.time]))
        return augmentation.features(features, front.time, frames, random)

    def _keeping(self, row: int, make: Any) -> np.ndarray:
        found = self._kept.get(row)
        if found is None:
            found = make()
            if found.nbytes <= self._room:
                self._kept[row] = found
                self._room -= found.nbytes
        return found

    def _wave(self, row: int) -> np.ndarray:
        return self.sounds[row].piece(self.front.rate, self.longest, self.cut)

    def _made(self, wave: np.ndarray) -> np.ndarray:
        features = self.front.row(wave) if self.front.time is None or not self.padded else None
        if not self.padded:
            assert features is not None
            return features
        missing = self.longest - len(wave)
        if features is None:  # pad the waveform with silence, not the spectrogram with zeros
            return self.front.row(np.pad(wave, (0, missing)))
        return np.pad(features, (0, missing), constant_values=self.front.padding)

    def targets(self, rows: np.ndarray) -> Tensor | None:
        targets = self.examples.targets
        return None if targets is None else torch.from_numpy(np.asarray(targets)[rows])

    def identity(self, row: int, at: Pass) -> bytes | None:
        return identity_of({"audio": self.sounds[row].digest, "how": self.how})

    def digested(self) -> Sequence[bytes | np.ndarray]:
        targets = self.examples.targets
        known = [] if targets is None else [np.asarray(targets)]
        return [*known, self.lengths.astype(np.int64), *(sound.digest for sound in self.sounds)]

    def refuse_misfits(self, backbone: Backbone) -> None:
        """Raise `UserError` if the model cannot take the sounds; name the ones that are too short for it.

        Tries the shortest sound. If it fails, tries the longest one, then finds the limit by bisection.
        """
        order = np.argsort(self.lengths, kind="stable")
        if self._misfit(backbone, order[0]) is None:
            return
        problem = self._misfit(backbone, order[-1])
        if problem is not None:
            shape = "x".join(map(str, self._features(int(order[-1]), Pass()).shape))
            raise UserError(
                f"{backbone.source} cannot take {self.front.name} of shape {shape}: {first_line(problem)}. "
                "Use a feature extractor, or options of audio_classify(), that fit the model."
            )
        low, high = 0, len(order) - 1  # the sound at `low` fails, the one at `high` passes
        while high - low > 1:
            middle = (low + high) // 2
            if self._misfit(backbone, order[middle]) is None:
                high = middle
            else:
                low = middle
        seconds = self.lengths[order[low]] / self.front.rate
        raise UserError(
            f"{high} of {len(order)} sounds are too short for {backbone.source}, {seconds:.3g} s or less: "
            f"{listing((self.where(int(row)) for row in order[:high]), 10)}. Remove them, or join them into longer ones."
        )

    def _misfit(self, backbone: Backbone, row: Any) -> Exception | None:
        """Return the error that the model raises for this row alone, or None."""
        if self.lengths[row] < self.front.shortest:
            return ValueError("shorter than one window")
        model: nn.Module = backbone.model
        return misfit(model, lambda device: self.call(model, self.batch(np.array([row]), device)))
