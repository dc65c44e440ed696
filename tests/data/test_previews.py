"""Small pictures and sounds for reports, read back with Pillow and soundfile."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest

from graftkit.data.previews import BANDS, COLUMNS, excerpt, spectrogram, thumbnail

pytest.importorskip("PIL")


def opened(uri: str, kind: str):
    lead, _, data = uri.partition(",")
    assert lead == f"data:{kind};base64"
    return io.BytesIO(base64.b64decode(data, validate=True))


def test_thumbnails_keep_the_shape_and_the_colours():
    from PIL import Image

    from graftkit.data.images import look_at

    left = np.zeros((400, 800, 3), np.uint8)
    left[:, :400] = (200, 30, 60)
    (picture,) = look_at([left], ["two halves"])
    image = Image.open(opened(thumbnail(picture), "image/jpeg"))
    assert image.size == (160, 80)
    pixels = np.asarray(image).astype(int)
    assert abs(pixels[40, 30] - (200, 30, 60)).max() < 8 and pixels[40, 130].max() < 8
    (small,) = look_at([left[:20, :30]], ["small"])
    assert Image.open(opened(thumbnail(small), "image/jpeg")).size == (30, 20)


def test_excerpts_are_the_sound_itself():
    soundfile = pytest.importorskip("soundfile")
    from graftkit.data.sounds import look

    wave = np.random.default_rng(0).uniform(-0.9, 0.9, 8 * 8000).astype(np.float32)
    sound = look((wave, 8000), shortest=0.0, silence=True)
    heard, rate = soundfile.read(opened(excerpt(sound, "start"), "audio/wav"), dtype="float32")
    assert rate == 8000 and heard.shape == (3 * 8000,)
    assert np.abs(heard - wave[: len(heard)]).max() < 1e-4
    middle, _ = soundfile.read(opened(excerpt(sound, "middle"), "audio/wav"), dtype="float32")
    assert np.abs(middle - wave[20_000:44_000]).max() < 1e-4
    high = look((wave, 44_100), shortest=0.0, silence=True)
    assert soundfile.info(opened(excerpt(high, "start"), "audio/wav")).samplerate == 16_000


def test_a_tone_is_bright_where_its_frequency_is():
    pytest.importorskip("soundfile")
    from PIL import Image

    from graftkit.data.sounds import look

    rate = 16_000
    for hertz in (500.0, 3000.0):
        times = np.arange(rate) / rate
        wave = np.where(times < 0.5, np.sin(2 * np.pi * hertz * times), 0.0).astype(np.float32)
        sound = look((wave, rate), shortest=0.0, silence=True)
        image = Image.open(opened(spectrogram(sound, "start"), "image/png")).convert("L")
        assert image.size == (COLUMNS, BANDS)
        levels = np.asarray(image).astype(int)
        mel = (
            2595 * np.log10(1 + hertz / 700) / (2595 * np.log10(1 + 8000 / 700))
        )  # of the height, from below
        assert abs(levels[:, 40].argmax() - (1 - mel) * BANDS) < 2.5
        assert levels[:, 40].max() > 200 and levels[:, 130].max() < 40
    short = look((np.full(10, 0.5, np.float32) * np.arange(10) / 10, rate), shortest=0.0, silence=True)
    assert Image.open(opened(spectrogram(short, "start"), "image/png")).size[1] == BANDS
