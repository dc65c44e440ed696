"""Small pictures and sounds for reports, as data URIs."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np

from graftkit.data.images import Picture, load
from graftkit.data.sounds import Sound

SIDE = 160  # pixels of a thumbnail's longer side
RATE = 16_000  # Hz of an excerpt, at most
SECONDS = 3.0  # of an excerpt
WINDOW = 0.025  # seconds of a spectrogram's column
COLUMNS, BANDS = 160, 64  # pixels of a spectrogram
RANGE = 70.0  # dB between its darkest and brightest pixel
# black, purple, red, orange, cream: lightness rises steadily, so that it can be read without colours
COLOURS = np.array([(8, 6, 28), (88, 24, 108), (188, 55, 84), (248, 142, 40), (252, 250, 200)], np.float64)


def thumbnail(picture: Picture) -> str:
    """Return an image as a JPEG whose longer side is at most 160 pixels."""

    def shrunk(image: object, place: int) -> bytes:
        image.thumbnail((SIDE, SIDE))  # type: ignore[attr-defined]
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)  # type: ignore[attr-defined]
        return file.getvalue()

    return _uri("image/jpeg", load([picture], shrunk)[0])


def excerpt(sound: Sound, cut: str) -> str:
    """Return three seconds of a sound as 16-bit WAV of one channel, at most 16 kHz. `cut`: 'start' or 'middle' of it."""
    rate = min(RATE, sound.rate)
    wave = sound.piece(rate, int(SECONDS * rate), cut)
    data = (np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()
    about = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVE" + about + struct.pack("<4sI", b"data", len(data)) + data
    return _uri("audio/wav", struct.pack("<4sI", b"RIFF", len(body)) + body)


def spectrogram(sound: Sound, cut: str) -> str:
    """Return the log power of the same three seconds as a PNG, time to the right and frequency upwards on a mel scale."""
    rate = min(RATE, sound.rate)
    return _uri("image/png", _png(_levels(sound.piece(rate, int(SECONDS * rate), cut), rate)))


def spectrogram_of(wave: np.ndarray, rate: int) -> np.ndarray:
    """Return the same of a whole wave (samples,) as an image, (64, at most 160, 3) of 8 bits."""
    return _palette()[_levels(wave, rate)]


def _levels(wave: np.ndarray, rate: int) -> np.ndarray:
    """Return the log power of a wave in mel bands, (bands, columns), as levels from 0 to 255."""
    size = max(16, int(WINDOW * rate))
    wave = np.pad(wave, (size // 2, size))
    starts = np.linspace(0, len(wave) - size, min(COLUMNS, len(wave) // 16)).astype(int)
    frames = wave[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, 1024)) ** 2  # (columns, frequencies)
    top = 2595 * np.log10(1 + rate / 2 / 700)
    bands = 700 * (10 ** (np.linspace(0, top, BANDS + 1) / 2595) - 1) / (rate / 2) * (power.shape[1] - 1)
    low, high = np.floor(bands[:-1]).astype(int), np.ceil(bands[1:]).astype(int) + 1
    levels = 10 * np.log10(np.stack([power[:, a:b].mean(axis=1) for a, b in zip(low, high)]) + 1e-12)
    levels = np.clip((levels - levels.max()) / RANGE + 1, 0, 1)[::-1]
    return (levels * 255).astype(np.uint8)


def _palette() -> np.ndarray:
    """Return the colours of the levels, (256, 3) of 8 bits."""
    places = np.linspace(0, len(COLOURS) - 1, 256)
    palette = [np.interp(places, range(len(COLOURS)), COLOURS[:, i]) for i in range(3)]
    return np.stack(palette, axis=1).round().astype(np.uint8)


def _png(levels: np.ndarray) -> bytes:
    """Return a PNG of levels (height, width) from 0 to 255, coloured by a palette."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = levels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    return b"".join([
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        chunk(b"PLTE", _palette().tobytes()), chunk(b"IDAT", zlib.compress(rows, 9)),
        chunk(b"IEND", b""),
    ])  # fmt: skip


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
