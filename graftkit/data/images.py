"""Validate images before training, and load images of any kind as 8-bit RGB."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from graftkit.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".avif",
)  # fmt: skip
# formats that may be opened; others, such as EPS, run external programs
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF")
MOST_PIXELS = 100_000_000  # larger images are treated as decompression bombs
Result = TypeVar("Result")
THREADS = min(8, os.cpu_count() or 1)
STACKS = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")  # formats whose files may contain several images
WHITE = (255, 255, 255)


class BadImage(Exception):
    """Say what is wrong with an image, as the end of a sentence that starts with its name."""


@dataclass(frozen=True)
class Picture:
    """A valid image. `source`: a path, bytes of a file, a PIL image or an array.

    `name`: its name in answers and errors. `width`, `height`: pixels, after EXIF rotation. `digest`: SHA-256 of its bytes.
    `several`: it is the first of several images in its file.
    """

    source: Any
    name: str
    width: int
    height: int
    digest: bytes
    several: bool = False


def require_pillow() -> None:
    """Raise `UserError` if Pillow, which reads images, is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError(
            "images are read with Pillow, which is not installed: pip install 'graftkit[images]'"
        ) from None


def look_at(sources: Sequence[Any], names: Sequence[str]) -> list[Picture | str]:
    """Decode every image in full, without keeping it. Return a `Picture` for each, or what is wrong with it."""
    require_pillow()

    def look(source: Any, name: str) -> Picture | str:
        try:
            return _look(source, name)
        except BadImage as bad:
            return str(bad)

    with _quiet(), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(look, sources, names))


def load(pictures: Sequence[Picture], then: Callable[[Image, int], Result]) -> list[Result]:
    """Return `then(image, index)` for each picture, loaded as upright 8-bit RGB, in several threads.

    Raises `UserError` if a file is missing or has changed since it was validated."""

    def one(place: int) -> Result:
        picture = pictures[place]
        try:
            image = _rgb(_open(_bytes(picture.source)))
        except BadImage as bad:
            raise UserError(
                f"{picture.name} {bad}. It was valid when it was checked, so it has changed since"
            ) from None
        return then(image, place)

    with _quiet(), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(len(pictures))))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PIL's warnings about odd metadata, and about large images, which are rejected here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _look(source: Any, name: str) -> Picture:
    raw = _bytes(source)
    image = _open(raw)
    several = image.format in STACKS and bool(getattr(image, "is_animated", False))
    decoded = _rgb(image)
    digest = hashlib.sha256(raw if isinstance(raw, bytes) else decoded.tobytes()).digest()
    return Picture(source, name, *decoded.size, digest, several)


def _bytes(source: Any) -> Any:
    """Return the bytes of a file, or an object in memory unchanged."""
    if not isinstance(source, (str, os.PathLike)):
        return source
    try:
        with open(source, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror or error})") from None


def _open(raw: Any) -> Image:
    from PIL import Image, UnidentifiedImageError

    if isinstance(raw, Image.Image):
        return raw.copy()
    if isinstance(raw, np.ndarray):
        return _from_array(raw)
    if not isinstance(raw, bytes):
        raise BadImage(
            f"is a {type(raw).__name__}, not a path, the bytes of a file, a PIL image or a NumPy array"
        )
    if not raw:
        raise BadImage("is empty (0 bytes)")
    Image.init()
    try:
        image = Image.open(io.BytesIO(raw), formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except UnidentifiedImageError:
        raise BadImage(f"is not an image that can be read (it starts with {raw[:12]!r})") from None
    except Image.DecompressionBombError:
        raise BadImage(_too_large("")) from None
    except Exception as error:  # a corrupt header can make a parser raise anything
        raise BadImage(_broken(error)) from None
    _refuse_large(image)
    return image


def _refuse_large(image: Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise BadImage(_too_large(f" ({image.width:,} x {image.height:,})"))


def _too_large(size: str) -> str:
    return f"has more than {MOST_PIXELS:,} pixels{size}, like a decompression bomb; if it is a real image, make it smaller"


def _rgb(image: Image) -> Image:
    """Return the first image of a file, upright, as RGB, with transparency on a white background."""
    from PIL import Image, ImageOps

    try:
        image.load()
        image = _eight_bits(ImageOps.exif_transpose(image))
        if image.has_transparency_data:
            above = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", above.size, (*WHITE, 255)), above)
        return image.convert("RGB")
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(_too_large("")) from None
    except MemoryError:
        raise BadImage(f"does not fit into memory ({image.width:,} x {image.height:,} pixels)") from None
    except Exception as error:
        raise BadImage(_broken(error)) from None


def _broken(error: Exception) -> str:
    short = "truncated" in str(error).lower() or isinstance(error, EOFError)
    return f"{'is cut short' if short else 'is broken'} ({type(error).__name__}: {first_line(error)})"


def _eight_bits(image: Image) -> Image:
    """Scale 16-bit and floating-point images to 0 to 255; white is 65,535 or 1."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
        values = values.astype(np.uint16)
    return _from_array(values)


def _from_array(values: np.ndarray) -> Image:
    """Return an image for an array (height, width) or (height, width, 1, 3 or 4), of 8 or 16 bits or floats in [0, 1]."""
    from PIL import Image

    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))) or not values.size:
        raise BadImage(
            f"is an array of shape {list(values.shape)}; it must be (height, width) or (height, width, 3)"
        )
    if values.shape[0] * values.shape[1] > MOST_PIXELS:
        raise BadImage(_too_large(f" ({values.shape[1]:,} x {values.shape[0]:,})"))
    kind, low, high = values.dtype, values.min(), values.max()
    if kind.kind == "u" and kind.itemsize == 2:
        values = values / 257.0
    elif kind.kind == "b" or (kind.kind == "f" and low >= 0 and high <= 1):
        values = values * 255.0
    elif kind != np.uint8:
        raise BadImage(
            f"has values from {low} to {high} of type {kind}; save it as unsigned integers of 8 or 16 bits, or as "
            "floats from 0 to 1"
        )
    return Image.fromarray(np.ascontiguousarray(np.round(values).astype(np.uint8)))
