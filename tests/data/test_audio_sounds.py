"""Sounds: what is read from files, bytes and arrays, what is refused, and resampling."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from scipy import signal

from graftkit.data.sounds import BLOCK, BadSound, look, resample
from graftkit.errors import UserError

soundfile = pytest.importorskip("soundfile")
WAVE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)


def encoded(wave=WAVE, kind: str = "WAV", subtype: str = "PCM_16", rate: int = 8000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def header(rate: int, samples: bytes, bits: int = 16, said: int | None = None) -> bytes:
    """A mono WAV written by hand after the description of RIFF."""
    said = len(samples) if said is None else said
    format_ = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * bits // 8, bits // 8, bits)
    return (
        b"RIFF"
        + struct.pack("<I", min(36 + said, 2**32 - 1))
        + b"WAVEfmt "
        + format_
        + b"data"
        + struct.pack("<I", said)
        + samples
    )


def examine(value, shortest: float = 0.025, silence: bool = False):
    return look(value, shortest=shortest, silence=silence)


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-24),
        ("WAV", "FLOAT", 2**-24),
        ("WAV", "ULAW", 0.02),
        ("FLAC", "PCM_16", 2**-15),
        ("OGG", "VORBIS", 0.05),
        ("AIFF", "PCM_16", 2**-15),
    ],
)
def test_every_encoding_gives_the_samples_that_went_in(tmp_path, kind, subtype, error):
    path = tmp_path / "sound.wav"  # the name says nothing: FLAC and Ogg under .wav are read too
    path.write_bytes(encoded(kind=kind, subtype=subtype))
    for source in (str(path), path, path.read_bytes()):
        sound = examine(source)
        assert (sound.rate, sound.samples, sound.channels, sound.clipped) == (8000, 4000, 1, False)
        assert np.abs(sound.piece(8000, 4000, "start") - WAVE).max() <= error


def test_eight_bits_by_hand():
    """Unsigned bytes around 128."""
    raw = (128 + 100 * np.sign(WAVE)).astype(np.uint8)
    wave = examine(header(8000, raw.tobytes(), bits=8)).piece(8000, 4000, "start")
    assert np.allclose(wave, (raw.astype(float) - 128) / 128)


def test_channels_are_mixed_to_their_mean():
    left, right = WAVE, 0.25 * np.cos(np.arange(4000))
    sound = examine(encoded(np.stack([left, right], axis=1), subtype="FLOAT"))
    assert sound.channels == 2
    assert np.allclose(sound.piece(8000, 4000, "start"), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "scale"),
    [(np.int16, 2**15), (np.int32, 2**31), (np.uint8, 2**7), (np.float32, 1), (np.float64, 1), (list, 1)],
)
def test_arrays_with_their_rate(array, scale):
    if array is list:
        values: object = WAVE.tolist()
    else:
        values = (WAVE * scale + (128 if array is np.uint8 else 0)).astype(array)
    for given in ({"array": values, "sampling_rate": 8000}, (values, 8000)):
        sound = examine(given)
        assert np.allclose(sound.piece(8000, 4000, "start"), WAVE, atol=1.01 / min(scale, 2**20) + 1e-6)


def test_arrays_of_two_channels_either_way():
    both = np.stack([WAVE, np.zeros(4000)])
    for array in (both, both.T):
        sound = examine((array, 8000))
        assert sound.channels == 2 and np.allclose(sound.piece(8000, 4000, "start"), WAVE / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "wanted"), [(8000, 16000), (44100, 16000), (48000, 8000), (22050, 16000), (11025, 8000)]
)
def test_resampling_a_sum_of_sines_gives_the_same_sines(rate, wanted):
    """Below half of the lower rate a sum of sines at one rate has its exact values at the other."""

    def sines(at: int) -> np.ndarray:
        times = np.arange(at) / at
        return sum(0.2 * np.sin(2 * np.pi * hertz * times + hertz) for hertz in (97, 440, 1234, 2900))

    found, expected = resample(sines(rate).astype(np.float32), rate, wanted), sines(wanted)
    assert found.shape == expected.shape and found.dtype == np.float32
    middle = slice(wanted // 10, -wanted // 10)
    assert np.abs(found - expected)[middle].max() < 0.004
    outside = signal.resample(sines(rate), wanted)  # by Fourier transform, without any filter
    assert np.abs(found - outside)[middle].max() < 0.004


def test_resampling_leaves_out_what_the_lower_rate_cannot_hold():
    times = np.arange(16000) / 16000
    found = resample(np.sin(2 * np.pi * 6000 * times).astype(np.float32), 16000, 8000)
    assert np.sqrt(np.mean(found[100:-100] ** 2)) < 0.01  # else it would come back as 2,000 Hz at full height


def test_pieces_are_cut_at_the_start_or_in_the_middle(tmp_path):
    ramp = np.linspace(-0.9, 0.9, 8000)
    path = tmp_path / "ramp.wav"
    path.write_bytes(encoded(ramp, subtype="FLOAT"))
    for source in (str(path), path.read_bytes(), (ramp, 8000)):
        sound = examine(source)
        assert np.allclose(sound.piece(8000, 2000, "start"), ramp[:2000], atol=1e-6)
        assert np.allclose(sound.piece(8000, 2000, "middle"), ramp[3000:5000], atol=1e-6)
        assert len(sound.piece(16000, 2000, "middle")) == 2000
        assert sound.length(16000) == len(sound.piece(16000, 10**6, "start")) == 16000
        assert sound.length(11025) == len(sound.piece(11025, 10**6, "start"))


def test_clipping_is_told():
    loud = np.clip(3 * WAVE, -1, 1)
    assert examine(encoded(loud)).clipped and examine((loud, 8000)).clipped
    assert not examine(encoded(WAVE * 2 * 0.999)).clipped  # up to the top and not beyond


def bad(value, **more) -> str:
    with pytest.raises(BadSound) as found:
        examine(value, **more)
    return str(found.value)


BAD = {
    "empty": (b"", "is empty (0 bytes)"),
    "header only": (header(8000, b""), "has a header but no samples"),
    "text": (b"Once upon a time there was no sound at all", "it contains text ('Once upon a time"),
    "bytes of no format": (bytes(range(128, 256)) * 9, "cannot be decoded: Format not recognised"),
    "mp4": (b"\0\0\0\x18ftypM4A " + bytes(90), "it is an MP4 (AAC)"),
    "half a header": (encoded()[:20], "cannot be decoded"),
    "cut short WAV": (encoded()[:-2000], "is cut short: it has 6,000 of 8,000 bytes"),
    "cut short FLAC": (encoded(kind="FLAC")[:-300], "is broken or cut short"),
    "cut short Ogg": (encoded(kind="OGG", subtype="VORBIS")[:-300], "is cut short: its last page is missing"),
    "silent": (encoded(np.zeros(4000)), "is silent"),
    "constant": (encoded(np.full(4000, 0.3)), "is silent"),
    "too short": (encoded(WAVE[:100]), "is 12.5 ms long (100 samples), but must be at least 25 ms"),
    "rate of 0": (header(0, bytes(2000)), "cannot be decoded"),
    "rate of 5": (header(5, bytes(2000)), "has a sampling rate of 5 Hz, but it must be 1,000 to 768,000 Hz"),
    "rate of 2 GHz": (header(2 * 10**9, bytes(2000)), "has a sampling rate of 2000000000 Hz"),
    "not a number": (encoded(np.where(np.arange(4000) == 7, np.nan, WAVE), subtype="FLOAT"), "has 1 samples that are no"),
    "infinite": (encoded(np.where(np.arange(4000) > 3997, np.inf, WAVE), subtype="FLOAT"), "has 2 samples that are no"),
    "array without rate": (np.zeros(9), "is a ndarray, not a path"),
    "three dimensions": ((np.zeros((2, 3, 4)), 8000), "an array with 3 dimensions"),
    "texts": ((["a", "b"], 8000), "which cannot hold samples"),
    "no number as rate": ((WAVE, None), "not a number"),
    "a number": (7, "is a int, not a path"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sounds(tmp_path, case):
    value, message = BAD[case]
    assert message in bad(value)
    if isinstance(value, bytes):
        path = tmp_path / "bad.wav"
        path.write_bytes(value)
        assert message in bad(str(path))


def test_channels_that_cancel_are_silent_once_mixed():
    opposed = np.stack([WAVE, -WAVE], axis=1)
    assert bad(encoded(opposed)) == "is silent once its 2 channels are mixed"
    assert bad(encoded(np.zeros((4000, 2)))) == "is silent"


def test_silence_may_be_a_class():
    assert examine(encoded(np.zeros(4000)), silence=True).samples == 4000


def test_a_size_that_a_pipe_left_open_is_no_cut():
    whole = header(8000, (WAVE * 2**15).astype("<i2").tobytes(), said=0xFFFFFFFF)
    assert examine(whole).samples == 4000


def test_long_sounds_are_looked_at_in_blocks():
    long = np.tile(np.float32([0.1, -0.1, 0.2]), BLOCK)
    sound = examine((long, 8000))
    path = io.BytesIO()
    soundfile.write(path, long, 8000, format="WAV", subtype="FLOAT")
    assert examine(path.getvalue()).samples == sound.samples == 3 * BLOCK


def test_without_soundfile_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"pip install 'graftkit\[audio\]'"):
        examine(encoded())
