"""Draw the scores of an explanation over an image, or below the spectrogram of a sound."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

FOR, AGAINST = (235, 94, 20), (32, 104, 214)  # orange speaks for the answer, blue against it
MOST = 0.8  # opacity of the largest score
SIDE = 320  # pixels of the longer side, at least
STRIP = 0.3  # height of the bars below a spectrogram, as a share of its own


def overlay(picture: np.ndarray, parts: list[dict[str, Any]], scores: np.ndarray) -> bytes:
    """Return a PNG of a picture (height, width, 3) with the scores of its parts, which have a `box`, or a `start` and `end`.

    Orange speaks for the answer and blue against it; the largest score is the most opaque.
    """
    from PIL import Image

    factor = max(1, -(-SIDE // max(picture.shape[:2])))
    large = Image.fromarray(picture).resize(
        (picture.shape[1] * factor, picture.shape[0] * factor), Image.Resampling.BILINEAR
    )
    relative = scores / max(float(np.abs(scores).max()), 1e-12)
    values = np.asarray(large, np.float32)
    made = _over(values, parts, relative) if "box" in parts[0] else _below(values, parts, relative)
    file = io.BytesIO()
    Image.fromarray(made.round().clip(0, 255).astype(np.uint8)).save(file, "PNG", optimize=True)
    return file.getvalue()


def _over(values: np.ndarray, parts: list[dict[str, Any]], scores: np.ndarray) -> np.ndarray:
    """Blend the colours of the cells into a grey version of the image, smoothly between their centres."""
    from PIL import Image

    columns = len({part["box"][0] for part in parts})
    cells = Image.fromarray(scores.reshape(-1, columns).astype(np.float32))
    height, width = values.shape[:2]
    heat = np.asarray(cells.resize((width, height), Image.Resampling.BILINEAR))[..., None]
    grey = values.mean(-1, keepdims=True) * 0.6 + values * 0.4
    colour = np.where(heat > 0, np.array(FOR, np.float32), np.array(AGAINST, np.float32))
    opacity = MOST * np.abs(heat)
    return grey * (1 - opacity) + colour * opacity


def _below(values: np.ndarray, parts: list[dict[str, Any]], scores: np.ndarray) -> np.ndarray:
    """Put bars below a spectrogram, one for each slice of time: upwards for the answer, downwards against it."""
    height, width = values.shape[:2]
    strip = max(16, round(STRIP * height)) // 2 * 2
    below = np.full((strip, width, 3), 24.0, np.float32)
    middle = strip // 2
    for part, score in zip(parts, scores):
        a, b = (round(part[name] / parts[-1]["end"] * width) for name in ("start", "end"))
        size = round(abs(float(score)) * (middle - 1))
        rows = slice(middle - size, middle) if score > 0 else slice(middle, middle + size)
        below[rows, a : max(b - 1, a + 1)] = FOR if score > 0 else AGAINST
    below[middle] = 120
    return np.concatenate([values, below])
