"""How a waveform becomes what a model takes: by its own feature extractor, or as a recipe says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.calls import parameters_of
from graftkit.errors import UserError

MEL_FLOOR = 1e-10  # power below which the logarithm is not taken
KALDI_WINDOW, KALDI_HOP = 400, 160  # samples, in extractors in the manner of Kaldi, at any sampling rate


class Front:
    """What turns waveforms into the input `name` of a model.

    `rate`: Hz. `shortest`, `longest`: samples of a waveform; longest is None where the model takes any number. `fixed`:
    rows of all lengths become arrays of one shape. `mask`: the model is told by an attention_mask what is padding.
    `time`: the axis of time in a row of features (0 or 1); None where a row is a waveform. `padding`: the value behind
    the end of a row.
    """

    name: str
    rate: int
    shortest: int = 1
    longest: int | None = None
    fixed: bool = False
    mask: bool = False
    time: int | None = None
    padding: float = 0.0

    def row(self, wave: np.ndarray) -> np.ndarray:
        """What the model takes of one waveform (samples,): time comes first unless it is `fixed`."""
        raise NotImplementedError

    def batch(self, rows: np.ndarray) -> np.ndarray:
        """Padded rows (rows, time, ...) as the model takes them."""
        return rows


class Extractor(Front):
    """The feature extractor that the model's folder brings."""

    def __init__(self, backbone: Backbone) -> None:
        processor, config = backbone.processor, getattr(backbone.model, "config", None)
        self.processor = processor
        self.name = processor.model_input_names[0]
        self.rate = int(processor.sampling_rate)
        self.padding = float(processor.padding_value)
        one, two = (self.row(np.zeros(seconds * self.rate, np.float32)) for seconds in (1, 2))
        self.fixed = one.shape == two.shape
        if self.fixed:
            frames = getattr(processor, "max_length", None)
            self.longest = getattr(processor, "n_samples", None)
            if self.longest is None and isinstance(frames, int):
                self.longest, self.shortest = KALDI_WINDOW + (frames - 1) * KALDI_HOP, KALDI_WINDOW
        if one.ndim == 2:
            self.time = int(self.fixed and one.shape[0] == processor.feature_size)
        norm = getattr(config, "feat_extract_norm", None)
        told = norm == "layer" if norm is not None else bool(processor.return_attention_mask)
        self.mask = told and not self.fixed and "attention_mask" in parameters_of(backbone.model)

    def row(self, wave: np.ndarray) -> np.ndarray:
        # one alone: where an extractor is given several, some norm over the padding too
        found = self.processor(wave, sampling_rate=self.rate, return_tensors="np")
        features = np.asarray(found[self.name][0], np.float32)
        mask = None if self.fixed else found.get("attention_mask")
        return features if mask is None or features.ndim == 1 else features[: int(mask[0].sum())]


class Waveform(Front):
    """Samples for a user's own module, minus `mean`, by `deviation`."""

    def __init__(self, model: nn.Module, rate: int, mean: float, deviation: float) -> None:
        names = parameters_of(model)
        self.name, self.mask, self.rate = next(iter(names)), "attention_mask" in names, rate
        self.mean, self.deviation = mean, deviation

    def row(self, wave: np.ndarray) -> np.ndarray:
        return (wave - np.float32(self.mean)) / np.float32(self.deviation)


class LogMel(Waveform):
    """A log-mel spectrogram (rows, bands, frames) for a user's own module, minus `mean`, by `deviation`."""

    time = 0

    def __init__(
        self, model: nn.Module, rate: int, mean: float, deviation: float, bands: int, window: float, hop: float
    ) -> None:  # fmt: skip
        from transformers.audio_utils import mel_filter_bank

        super().__init__(model, rate, mean, deviation)
        self.window, self.hop = round(window * rate), round(hop * rate)
        if self.window < 2 or self.hop < 1:
            raise UserError(
                f"audio_classify(): window {window} s and hop {hop} s are {self.window} and {self.hop} samples at {rate} Hz; "
                "raise them."
            )
        self.size = 2 ** math.ceil(math.log2(self.window))
        if bands > self.size // 4:
            raise UserError(
                f"audio_classify(): {bands} mel bands are more than the {self.size // 2 + 1} frequencies of a window of "
                f"{window} s at {rate} Hz can fill; lower n_mels, or raise window."
            )
        self.filters = mel_filter_bank(
            self.size // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
        )

    def row(self, wave: np.ndarray) -> np.ndarray:
        return super().row(log_mel(wave, self.filters, self.window, self.hop, self.size))

    def batch(self, rows: np.ndarray) -> np.ndarray:
        return rows.swapaxes(1, 2)


def log_mel(wave: np.ndarray, filters: np.ndarray, window: int, hop: int, size: int) -> np.ndarray:
    """(frames, bands) float32: natural logarithms of power in mel bands, 1 + samples // hop frames.

    A frame is `window` samples around its time, with zeros beyond both ends, under a periodic Hann window, and
    transformed in `size` points. `filters`: (size // 2 + 1, bands).
    """
    padded = np.pad(wave, window // 2 + window % 2)[window % 2 :]
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    power = np.abs(np.fft.rfft(frames * hann, size)) ** 2
    return np.log(np.maximum(power @ filters, MEL_FLOOR)).astype(np.float32)


def extractor_beside(backbone: Backbone) -> Any:
    """The feature extractor that a model's folder has beside its tokenizer, or None."""
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(
            backbone.source, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        return None


def masks_itself(model: nn.Module) -> bool:
    """Whether a model in the manner of wav2vec2 masks its own frames in training."""
    return any(name.endswith("masked_spec_embed") for name, _ in model.named_parameters())


def extracts_sound(processor: Any) -> bool:
    """Whether a model's processor is a feature extractor of sound."""
    return hasattr(processor, "sampling_rate") and hasattr(processor, "model_input_names")
