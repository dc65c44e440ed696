"""Images of every kind, good and bad, and their random changes."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
import torch
from PIL import Image

from graftkit.data.augment import DRAWS, OPERATIONS, Augmentation, random_box
from graftkit.data.images import Picture, load, look_at
from graftkit.errors import UserError


def encoded(image: Image.Image, kind: str, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def look(source) -> Picture:
    (found,) = look_at([source], ["it"])
    assert isinstance(found, Picture), found
    return found


def problem(source) -> str:
    (found,) = look_at([source], ["it"])
    assert isinstance(found, str)
    return found


def pixels(source) -> np.ndarray:
    (image,) = load([look(source)], lambda image, place: image)
    assert image.mode == "RGB"
    return np.asarray(image)


def plain(width: int = 6, height: int = 4) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values)


def test_plain_kinds_are_what_they_are():
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert (pixels(encoded(plain(), kind)) == np.asarray(plain())).all()
    assert np.abs(pixels(encoded(plain(), "JPEG", quality=100)).astype(int) - np.asarray(plain())).max() < 12


def test_gray_and_palette():
    gray = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    assert pixels(encoded(gray, "PNG")).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    colours = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8)).quantize(2)
    assert pixels(encoded(colours, "PNG")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_what_can_be_seen_through_lies_on_white():
    clear = Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 128], [0, 0, 255, 255]]], dtype=np.uint8))
    assert pixels(encoded(clear, "PNG")).tolist() == [[[255, 255, 255], [127, 127, 127], [0, 0, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [0, 255, 0]]]
    gray = Image.new("LA", (1, 1), (0, 0))
    assert pixels(encoded(gray, "PNG")).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_are_scaled():
    wide = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    for kind in ("PNG", "TIFF"):
        assert pixels(encoded(wide, kind))[0, :, 0].tolist() == [0, 100, 255]
    assert pixels(b"P5 2 1 65535\n" + struct.pack(">2H", 257 * 7, 65535))[0, :, 0].tolist() == [7, 255]
    fractions = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert pixels(encoded(fractions, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    odd = Image.fromarray(np.array([[-3, 70000]], dtype=np.int32))
    assert "values from -3 to 70000" in problem(encoded(odd, "TIFF"))


def test_cmyk_is_converted():
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixels(encoded(inks, "TIFF"))[0, 0]
    assert red[0] > 200 and red[1] < 40 and red[2] < 40


def test_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    found = look(encoded(plain(6, 4), "PNG", exif=exif))
    assert (found.width, found.height) == (4, 6)
    turned = pixels(encoded(plain(6, 4), "PNG", exif=exif))
    assert (turned == np.rot90(np.asarray(plain(6, 4)), -1)).all()


def test_the_first_of_several_frames():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG", "TIFF"):
        raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert look(raw).several
        assert pixels(raw)[0, 0].tolist() == [255, 0, 0]
    assert not look(encoded(frames[0], "GIF")).several


def test_broken_files(tmp_path):
    jpeg, png = encoded(plain(64, 64), "JPEG"), encoded(plain(64, 64), "PNG")
    assert problem(b"") == "is empty (0 bytes)"
    assert "is not an image" in problem(b"not an image at all")
    assert "is not an image" in problem(b"%!PS-Adobe-3.0 EPSF-3.0\n")  # would start Ghostscript
    assert "cut short" in problem(jpeg[: len(jpeg) // 2])
    assert "cut short" in problem(png[: len(png) // 2])
    assert "is broken" in problem(png[:40] + b"\0" * 30 + png[70:]) or "cut short" in problem(png[:60])
    assert problem(jpeg[:10])
    assert "No such file" in problem(str(tmp_path / "gone.png"))
    assert "is a dict" in problem({"a": 1})


def huge(side: int) -> bytes:
    """A PNG whose header says that it is this wide and high."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_500, 100_000])
def test_a_decompression_bomb_is_not_decoded(side):
    assert "more than 100,000,000 pixels" in problem(huge(side))


def test_arrays():
    values = np.asarray(plain())
    assert (pixels(values) == values).all()
    assert (pixels(values[..., :1])[..., 0] == values[..., 0]).all()
    assert pixels(np.full((2, 2), True))[0, 0].tolist() == [255] * 3
    assert pixels(np.full((2, 2, 3), 0.2, dtype=np.float64))[0, 0].tolist() == [51] * 3
    assert "shape [3, 4, 6]" in problem(values.transpose(2, 0, 1))
    assert "of type int64" in problem(values.astype(np.int64))
    assert "of type float64" in problem(np.full((2, 2), math.nan))
    assert (pixels(plain()) == values).all()


def test_a_file_that_changes_after_it_was_checked(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(plain(), "PNG"))
    found = look(str(path))
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"is empty \(0 bytes\)\. It was valid"):
        load([found], lambda image, place: image)


def test_the_digest_is_of_the_contents(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(plain(), "PNG"))
    first, second = (look(str(tmp_path / name)) for name in ("a.png", "b.png"))
    assert first.digest == second.digest != look(encoded(plain(7, 4), "PNG")).digest


# --- random changes


def test_the_same_seed_gives_the_same_images():
    change = Augmentation("resized", operations=3, magnitude=12, flip=0.5, mixup=0.2, cutmix=1.0)
    image = plain(40, 30)

    def once() -> torch.Tensor:
        random = np.random.default_rng(3)
        drawn = [change.draw(random) for _ in range(4)]
        made = [np.asarray(change.image(image, drawn[i], (16, 16), 2)) for i in range(4)]
        x = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float()
        return change.mix(change.pixels(x, drawn), random)[0]

    first = once()
    assert torch.equal(first, once()) and first.shape == (4, 3, 16, 16)
    assert len({tuple(row.flatten().tolist()) for row in first}) == 4


def test_random_boxes_have_the_areas_and_ratios_of_the_paper():
    draw = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(3000):
        left, top, right, bottom = random_box(300, 300, 0.08, iter(draw.random(DRAWS).tolist()))
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 300
        areas.append((right - left) * (bottom - top) / 300**2)
        ratios.append((right - left) / (bottom - top))
    assert min(areas) > 0.075 and min(ratios) > 0.74 and max(ratios) < 1.35
    # uniform in [0.08, 1], but for the largest boxes, which rarely fit
    assert np.quantile(areas, 0.25) == pytest.approx(0.29, abs=0.04)
    assert np.median(np.log(ratios)) == pytest.approx(0, abs=0.02)
    assert random_box(300, 2, 1.0, iter([0.99] * DRAWS)) == (148, 0, 151, 2)


def test_flip_and_moves():
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    random = np.random.default_rng(0)
    drawn = [Augmentation().draw(random) for _ in range(100)]
    assert torch.equal(Augmentation(flip=1.0).pixels(x, drawn[:2]), x.flip(3))
    halves = Augmentation(flip=0.5).pixels(x.repeat(50, 1, 1, 1), drawn)
    assert 20 < sum(torch.equal(a, b) for a, b in zip(halves, x.repeat(50, 1, 1, 1))) < 80
    moved = Augmentation("padded", padding=2).pixels(x, drawn[:2])
    places = [(int(5 * numbers[-3]), int(5 * numbers[-2])) for numbers in drawn]
    assert {top for top, _ in places} == {left for _, left in places} == set(range(5))
    for y, z, (top, left) in zip(moved, x, places):
        wide = torch.zeros(3, 8, 9)
        wide[:, 2:6, 2:7] = z
        assert torch.equal(y, wide[:, top : top + 4, left : left + 5])


def test_mixup_and_cutmix():
    x = torch.zeros(6, 1, 10, 10) + torch.arange(6.0)[:, None, None, None]
    mixed, other, share = Augmentation(mixup=1.0).mix(x, np.random.default_rng(0))
    assert torch.allclose(mixed[:, 0, 0, 0], share * x[:, 0, 0, 0] + (1 - share) * x[other, 0, 0, 0])
    for seed in range(20):
        cut, other, share = Augmentation(cutmix=1.0).mix(x, np.random.default_rng(seed))
        own = (cut == x).flatten(1).float().mean(1)[other != np.arange(6)]
        assert torch.allclose(own, torch.full_like(own, share))
        assert torch.equal((cut == x) | (cut == x[other]), torch.ones_like(cut, dtype=torch.bool))
    assert x[1].eq(1).all()  # what was handed over is as it was


@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_operations_keep_size_and_do_nothing_without_strength(operation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    changed = OPERATIONS[operation](image, 1.0, -1.0)
    assert changed.size == image.size and changed.mode == "RGB"
    same = np.asarray(OPERATIONS[operation](image, 0.0, 1.0))
    if operation < len(OPERATIONS) - 2:  # autocontrast and equalize have no strength
        limit = 0 if operation != 11 else 255  # solarize at 255 inverts what is white alone
        assert np.abs(same.astype(int) - np.asarray(image)).max() <= limit
    if operation not in (0, 12):
        assert not np.array_equal(np.asarray(changed), np.asarray(image))


def test_it_says_what_is_on():
    assert str(Augmentation("padded", flip=0.5, mixup=0.2)) == "padded crops, flip 0.5, mixup 0.2"
    assert not Augmentation() and not Augmentation().mixes
    assert Augmentation(flip=0.5) and Augmentation(cutmix=1.0).mixes


def test_paths_and_bytes_alike(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(plain(30, 20), "JPEG"))
    assert (pixels(path) == pixels(path.read_bytes())).all()
    assert isinstance(look(Path(path)), Picture)
