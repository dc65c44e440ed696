"""Turn waveforms into model inputs, with the model's own feature extractor or as configured in the recipe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from graftkit.backbone import Backbone
from graftkit.backbone.calls import parameters_of
from graftkit.errors import UserError

MEL_FLOOR = 1e-10  # mel powers are clamped to this before the logarithm
KALDI_WINDOW, KALDI_HOP = 400, 160  # samples; fixed in Kaldi-style extractors, whatever the sampling rate


class Front:
    """Turn waveforms into the model input called `name`.

    `rate`: sampling rate in Hz. `shortest`, `longest`: limits on the length of a waveform, in samples; `longest` is None
    if there is no upper limit. `fixed`: rows of all lengths become arrays of the same shape. `mask`: the model takes an
    attention_mask that marks padding. `time`: the time axis of a row of features (0 or 1); None if a row is a waveform.
    `padding`: the value that rows are padded with.
    """

    name: str
    rate: int
    shortest: int = 1
    longest: int | None = None
    fixed: bool = False
    mask: bool = False
    time: int | None = None
    padding: float = 0.0

    def __repr__(self) -> str:
        """Return what is done to a waveform, in full; filters follow from the other numbers."""
        held = {
            name: value for name, value in sorted(vars(self).items()) if not isinstance(value, np.ndarray)
        }
        parts = (
            f"{name}={value.to_json_string() if hasattr(value, 'to_json_string') else value!r}"
            for name, value in held.items()
        )
        return f"{type(self).__qualname__} {' '.join(parts)}"

    @property
    def axis(self) -> int:
        """The time axis of a row as the model reads it."""
        return self.time or 0

    def row(self, wave: np.ndarray) -> np.ndarray:
        """Return the features of one waveform (samples,), in float32; time is the first axis unless `fixed`."""
        raise NotImplementedError

    def batch(self, rows: np.ndarray) -> np.ndarray:
        """Return padded rows (rows, time, ...) with their axes in the order that the model expects."""
        return rows


class Extractor(Front):
    """The feature extractor in the model's folder."""

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
        masked = norm == "layer" if norm is not None else bool(processor.return_attention_mask)
        self.mask = masked and not self.fixed and "attention_mask" in parameters_of(backbone.model)

    def row(self, wave: np.ndarray) -> np.ndarray:
        # one row at a time: given several, some extractors normalise over the padding too
        found = self.processor(wave, sampling_rate=self.rate, return_tensors="np")
        features = np.asarray(found[self.name][0], np.float32)
        mask = None if self.fixed else found.get("attention_mask")
        return features if mask is None or features.ndim == 1 else features[: int(mask[0].sum())]


class Waveform(Front):
    """Samples for a user's own module: minus `mean`, divided by the standard deviation `deviation`."""

    def __init__(self, model: nn.Module, rate: int, mean: float, deviation: float) -> None:
        names = parameters_of(model)
        self.name, self.mask, self.rate = next(iter(names)), "attention_mask" in names, rate
        self.mean, self.deviation = mean, deviation

    def row(self, wave: np.ndarray) -> np.ndarray:
        return (wave - np.float32(self.mean)) / np.float32(self.deviation)


class LogMel(Waveform):
    """A log-mel spectrogram (rows, bands, frames) for a user's own module: minus `mean`, divided by `deviation`."""

    time = 0

    def __init__(
        self, model: nn.Module, rate: int, mean: float, deviation: float, bands: int, window: float, hop: float
    ) -> None:  # fmt: skip
        from transformers.audio_utils import mel_filter_bank

        super().__init__(model, rate, mean, deviation)
        self.window, self.hop = round(window * rate), round(hop * rate)
        if self.window < 2 or self.hop < 1:
            raise UserError(
                f"audio_classify(): window={window} s and hop={hop} s are {self.window} and {self.hop} samples at {rate} Hz, "
                "which is too short; raise them."
            )
        self.size = 2 ** math.ceil(math.log2(self.window))
        if bands > self.size // 4:
            raise UserError(
                f"audio_classify(): {bands} mel bands are too many for the {self.size // 2 + 1} frequencies of a window of "
                f"{window} s at {rate} Hz; lower n_mels, or raise window."
            )
        self.bands = bands
        self.filters = mel_filter_bank(
            self.size // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
        )

    @property
    def axis(self) -> int:
        return 1

    def row(self, wave: np.ndarray) -> np.ndarray:
        return super().row(log_mel(wave, self.filters, self.window, self.hop, self.size))

    def batch(self, rows: np.ndarray) -> np.ndarray:
        return rows.swapaxes(1, 2)


def log_mel(wave: np.ndarray, filters: np.ndarray, window: int, hop: int, size: int) -> np.ndarray:
    """Return log-mel features (frames, bands) in float32: natural logarithms of power, 1 + samples // hop frames.

    A frame is `window` samples centred on its time, multiplied by a periodic Hann window, with an FFT of `size` points.
    The wave is zero-padded at both ends. `filters`: (size // 2 + 1, bands).
    """
    padded = np.pad(wave, window // 2 + window % 2)[window % 2 :]
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    power = np.abs(np.fft.rfft(frames * hann, size)) ** 2
    return np.log(np.maximum(power @ filters, MEL_FLOOR)).astype(np.float32)


def extractor_beside(backbone: Backbone) -> Any:
    """Return the feature extractor in the folder of a model whose processor is a tokenizer, or None."""
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(
            backbone.source, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        return None


def masks_itself(model: nn.Module) -> bool:
    """Return whether a model masks its own frames in training, as wav2vec2 does."""
    return any(name.endswith("masked_spec_embed") for name, _ in model.named_parameters())


def extracts_sound(processor: Any) -> bool:
    """Return whether a model's processor is an audio feature extractor."""
    return hasattr(processor, "sampling_rate") and hasattr(processor, "model_input_names")
