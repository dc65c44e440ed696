"""Pausing the garbage collector."""

from __future__ import annotations

import gc

import pytest

from graftkit.runs.garbage import uncollected


def test_the_collector_goes_on_after_an_error_too():
    with pytest.raises(KeyError), uncollected():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
