"""Blockwise quantization: the codes of the papers, the nearest value of each number, and exact bytes."""

import math

import pytest
import torch

from graftkit.optim.shared import blockwise, moments
from graftkit.optim.shared.blockwise import Format, _code, _nearest, _table, dynamic_code, linear_code

FORMATS = [stored for pair in moments.FORMATS.values() for stored in pair]


def values_of(stored: Format) -> torch.Tensor:
    return torch.tensor(
        linear_code(stored.bits)
        if stored.code == "linear"
        else dynamic_code(stored.bits, stored.code == "signed")
    )


def nearest(numbers: torch.Tensor, stored: Format) -> torch.Tensor:
    """Each number times nothing but its block's scale, as the closest value of the code: one after another."""
    values, found = values_of(stored), []
    for block in numbers.split(stored.block):
        scale = block.abs().max()
        closest = ((block / scale)[:, None] - values).abs().argmin(dim=1)
        found.append(values[closest] * scale)
    return torch.cat(found)


def test_the_signed_code_of_four_bits_is_that_of_the_paper():
    """Li et al. 2023, figure 14: the dynamic exponent of 4 bits."""
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = sorted([-value for value in positive] + [0.0, *positive, 1.0])
    assert dynamic_code(4, signed=True) == pytest.approx(expected)


def test_the_linear_code_has_no_zero():
    assert linear_code(4) == [k / 16 for k in range(1, 17)]


def test_codes_of_eight_bits_have_their_range_and_precision():
    signed, unsigned = dynamic_code(8, signed=True), dynamic_code(8, signed=False)
    for code in (signed, unsigned):
        assert len(set(code)) == 256 and code == sorted(code) and 0.0 in code and code[-1] == 1.0
    assert min(abs(value) for value in signed if value) == pytest.approx(0.55e-6)
    assert min(value for value in unsigned if value) == pytest.approx(0.325e-6)
    assert signed[-2] == pytest.approx(1 - 0.9 / 64 / 2) and unsigned[-2] == pytest.approx(1 - 0.9 / 128 / 2)


def test_codes_of_eight_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        expected = functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(torch.tensor(dynamic_code(8, signed)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bits, code", [(8, "signed"), (8, "unsigned"), (4, "signed"), (4, "linear"), (4, "even")]
)
def test_the_table_finds_what_a_search_finds(bits, code):
    """At and beside the middles between neighbours, at zero, the smallest numbers, and infinity."""
    values = _code(bits, code, torch.device("cpu"))
    middles = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0)]
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 2.0, -2.0, math.inf, -math.inf])
    random = torch.randn(50_000) * 10 ** (-8 * torch.rand(50_000))
    numbers = torch.cat([middles, *beside, edges, random])
    found = _nearest(numbers, *_table(bits, code, numbers.device))
    assert torch.equal(found, torch.bucketize(numbers, middles).to(torch.uint8))


def test_a_code_that_is_too_fine_for_the_table_is_refused(monkeypatch):
    monkeypatch.setattr(
        blockwise, "linear_code", lambda bits: [1 + index * 2**-9 for index in range(2**bits)]
    )
    for function in (_code, _table):
        function.cache_clear()
    with pytest.raises(ValueError, match="lie closer"):
        _table(8, "linear", torch.device("cpu"))
    for function in (_code, _table):
        function.cache_clear()


@pytest.mark.parametrize("count", [256, 1000, 1001, 3])
@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_numbers_come_back_as_the_nearest_of_the_code(stored, count):
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(count))
    numbers = numbers * torch.logspace(-9, 3, count)  # blocks of very different size
    numbers = numbers if stored.code == "signed" else numbers.abs()
    parts = stored.zeros(count, numbers.device)
    stored.write(numbers, *parts)
    torch.testing.assert_close(stored.read(*parts, count), nearest(numbers, stored), rtol=1e-6, atol=0)
    assert stored.bytes(count) == sum(part.numel() * part.element_size() for part in parts)
    assert stored.bytes(count) == math.ceil(count * stored.bits / 8) + 4 * math.ceil(count / stored.block)


@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_zeros_stay_zeros(stored):
    parts = stored.zeros(300, torch.device("cpu"))
    assert torch.equal(stored.read(*parts, 300), torch.zeros(300))
    numbers = torch.zeros(300)
    numbers[-1] = 2.0  # the first block is all zeros
    stored.write(numbers, *parts)
    assert torch.equal(stored.read(*parts, 300)[:128], torch.zeros(128))
