"""Validate sounds from files, bytes and arrays, and read them as mono at a given sampling rate."""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftkit.errors import UserError, first_line

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
RATES = (1_000, 768_000)  # allowed sampling rates, in Hz
SILENT = 1e-4  # a sound that never leaves its mean by more than this, -80 dB of full scale, is silent
LOUDEST = 0.99  # fraction of full scale from which repeated sample values count as clipped
CLIPPED = 0.001  # fraction of clipped samples above which a sound counts as clipped
BLOCK = 1 << 20  # samples per channel that are in memory at once during validation
OPEN_END = 0x7FFF0000  # programs that write to a pipe declare a data size like this, or a larger one


class BadSound(ValueError):
    """Say what is wrong with a sound, as the end of a sentence: 'is empty'."""


@dataclass(frozen=True)
class Sound:
    """A sound that was decoded in full and is valid.

    `source`: path, bytes of a file, or an array (samples, channels) of floats. `rate` in Hz; `samples` per channel at that
    rate. `clipped`: more than a thousandth of its samples stay at full scale. `digest`: SHA-256 of the source.
    """

    source: str | bytes | np.ndarray
    rate: int
    samples: int
    channels: int
    clipped: bool
    digest: bytes

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def length(self, rate: int) -> int:
        """Return the number of samples at another rate, in Hz."""
        return math.ceil(self.samples * rate / self.rate)

    def piece(self, rate: int, longest: int, cut: str) -> np.ndarray:
        """Return the mean of the channels at `rate`, float32 (samples,) in [-1, 1], at most `longest` samples.

        `cut`: which part of a longer sound to keep, 'start' or 'middle'.
        """
        count = min(self.samples, math.ceil(longest * self.rate / rate))
        start = (self.samples - count) // 2 if cut == "middle" else 0
        if isinstance(self.source, np.ndarray):
            samples = self.source[start : start + count]
        else:
            with _opened(self.source) as file:
                if start:
                    file.seek(start)
                samples = file.read(count, dtype="float32", always_2d=True)
        return resample(samples.mean(axis=1, dtype=np.float32), self.rate, rate)[:longest]


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Resample a wave (samples,) to another sampling rate; the result has ceil(samples * wanted / rate) samples.

    Uses scipy's polyphase filter: low-pass at half the lower rate, zero phase.
    """
    if rate == wanted:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return resample_poly(wave, wanted // common, rate // common).astype(np.float32)


def look(value: Any, *, shortest: float, silence: bool) -> Sound:
    """Decode a sound in full and validate it.

    `value`: a path, bytes of a file, `{'array': ..., 'sampling_rate': ...}` or a pair (array, rate). An array is (samples,),
    (samples, channels) or (channels, samples), of floats in [-1, 1] or integers that use their full range. `shortest`:
    minimum duration in seconds. `silence`: accept silent sounds.

    Raises `BadSound`, and `UserError` if soundfile is not installed.
    """
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if isinstance(value, str | bytes | os.PathLike):
        source = value if isinstance(value, bytes) else os.fspath(value)
        digest = _refuse_cut(source)
        with _opened(source) as file:
            rate, declared = int(file.samplerate), int(file.frames)
            _refuse_rate(rate)
            found = _measure(_blocks(file))
        if found.samples < declared:
            raise BadSound(f"is cut short: it has {found.samples:,} of {declared:,} samples")
    else:
        source, rate = _array(value)
        _refuse_rate(rate)
        found = _measure(iter([source]))
        digest = hashlib.sha256(np.ascontiguousarray(source).tobytes()).digest()
    _refuse(found, rate, shortest, silence)
    clipped = found.still > CLIPPED * found.samples * found.channels
    return Sound(source, rate, found.samples, found.channels, clipped, digest)


@dataclass
class _Measured:
    """Statistics of all samples of a sound.

    `low`, `high`: range of the mean over channels. `broken`: number of non-finite samples. `still`: number of samples that
    stay at full scale.
    """

    samples: int = 0
    channels: int = 0
    low: float = math.inf
    high: float = -math.inf
    spread: float = 0.0  # the largest range of one channel
    broken: int = 0
    still: int = 0


def _measure(blocks: Iterator[np.ndarray]) -> _Measured:
    found = _Measured()
    lows: Any = math.inf
    highs: Any = -math.inf
    for block in blocks:
        found.samples += len(block)
        found.channels = block.shape[1]
        found.broken += int((~np.isfinite(block)).sum())
        if not len(block) or found.broken:
            continue
        mean = block.mean(axis=1)
        found.low, found.high = min(found.low, float(mean.min())), max(found.high, float(mean.max()))
        lows, highs = np.minimum(lows, block.min(axis=0)), np.maximum(highs, block.max(axis=0))
        still = (block[1:] == block[:-1]) & (np.abs(block[1:]) >= LOUDEST)
        found.still += int((still[1:] & still[:-1]).sum())
    found.spread = float(np.max(highs - lows))
    return found


def _refuse(found: _Measured, rate: int, shortest: float, silence: bool) -> None:
    if not found.samples:
        raise BadSound("has a header but no samples")
    if found.broken:
        raise BadSound(f"has {found.broken:,} samples that are not finite")
    if found.samples < shortest * rate:
        raise BadSound(
            f"is {found.samples / rate * 1000:.3g} ms long ({found.samples} samples), but must be at least "
            f"{shortest * 1000:.3g} ms"
        )
    if not silence and found.high - found.low <= 2 * SILENT:
        mixed = "" if found.spread <= 2 * SILENT else f" once its {found.channels} channels are mixed"
        raise BadSound(f"is silent{mixed}")


def _refuse_rate(rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise BadSound(f"has a sampling rate of {rate} Hz, but it must be {RATES[0]:,} to {RATES[1]:,} Hz")


def _array(value: Any) -> tuple[np.ndarray, int]:
    """Return a sound in memory as float32 (samples, channels), and its rate in Hz."""
    if isinstance(value, Mapping) and {"array", "sampling_rate"} <= set(value):
        value = value["array"], value["sampling_rate"]
    if not isinstance(value, tuple) or len(value) != 2 or isinstance(value[1], bool):
        raise BadSound(
            f"is a {type(value).__name__}, not a path, the bytes of a file, {{'array': ..., 'sampling_rate': ...}}"
            " or (array, rate)"
        )
    try:
        samples, rate = np.asarray(value[0]), int(value[1])
    except (TypeError, ValueError, OverflowError):
        raise BadSound("has an array or a sampling rate that is not a number") from None
    if samples.dtype.kind in "iu":
        steps = 2.0 ** (8 * samples.dtype.itemsize - 1)
        samples = (samples.astype(np.float64) - (steps if samples.dtype.kind == "u" else 0)) / steps
    elif samples.dtype.kind != "f":
        raise BadSound(f"has an array of type {samples.dtype}, which cannot hold samples")
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2:
        raise BadSound(f"has an array with {samples.ndim} dimensions; give (samples,) or (samples, channels)")
    if samples.shape[0] < samples.shape[1]:
        samples = samples.T
    return samples.astype(np.float32), rate


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile is missing
        raise UserError(
            f"sounds are read with soundfile, which cannot be imported ({first_line(error)}). Install it: "
            "pip install 'graftkit[audio]'."
        ) from None
    return soundfile


def _opened(source: str | bytes) -> Any:
    soundfile = _soundfile()
    try:
        return soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except soundfile.LibsndfileError as error:
        raise BadSound(f"cannot be decoded: {_really(source)}{_reason(error)}") from None


def _blocks(file: Any) -> Iterator[np.ndarray]:
    soundfile = _soundfile()
    try:
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            yield block
    except soundfile.LibsndfileError as error:
        raise BadSound(f"is broken or cut short: {_reason(error)}") from None


def _reason(error: Any) -> str:
    return str(error.error_string).removeprefix("Error : ").strip().rstrip(".")


def _really(source: str | bytes) -> str:
    """Return what the first bytes of an undecodable file suggest that it is, or an empty string."""
    head = source[:512] if isinstance(source, bytes) else _head(source)
    if head[4:8] == b"ftyp":
        return "it is an MP4 (AAC), which is not supported; convert it to FLAC or WAV; "
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return ""
    words = text.split()
    return f"it contains text ({' '.join(words)[:30]!r}); " if "".join(words).isprintable() and words else ""


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _refuse_cut(source: str | bytes) -> bytes:
    """Return the digest of a file. Raises `BadSound` if it is empty, or shorter than its header declares."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            size = file.seek(0, os.SEEK_END)
            if not size:
                raise BadSound("is empty (0 bytes)")
            file.seek(0)
            kind = file.read(12)
            if kind[:4] == b"RIFF" and kind[8:] == b"WAVE":
                _refuse_cut_wave(file, size)
            elif kind[:4] == b"OggS":
                file.seek(max(0, size - (1 << 16) - 300))
                _refuse_cut_ogg(file.read())
    except OSError as error:
        raise BadSound(f"cannot be read: {error.strerror or error}") from None
    return digest


def _refuse_cut_wave(file: Any, size: int) -> None:
    """Raise `BadSound` if the data chunk of a WAV file is shorter than its declared size; the decoder does not notice."""
    while len(head := file.read(8)) == 8:
        length = struct.unpack("<I", head[4:])[0]
        left = size - file.tell()
        if head[:4] == b"data":
            if left < length < OPEN_END:
                raise BadSound(f"is cut short: it has {left:,} of {length:,} bytes of samples")
            return
        file.seek(length + length % 2, os.SEEK_CUR)


def _refuse_cut_ogg(tail: bytes) -> None:
    """Raise `BadSound` unless the end of an Ogg stream is a complete page marked as the last (RFC 3533, section 6)."""
    at = tail.rfind(b"OggS")
    segments = tail[at + 26] if 0 <= at < len(tail) - 26 else 0
    table = tail[at + 27 : at + 27 + segments]
    whole = at >= 0 and len(table) == segments > 0 and len(tail) - at >= 27 + segments + sum(table)
    if not whole or not tail[at + 5] & 4:
        raise BadSound("is cut short: its last page is missing")
