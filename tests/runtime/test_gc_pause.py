"""Pauses of the garbage collector: nested, overlapping, and where it was off before."""

from __future__ import annotations

import gc

import pytest

from turbotx.runtime.gc_pause import pause_gc


def test_the_last_of_overlapping_pauses_ends_them() -> None:
    first, second = pause_gc(), pause_gc()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_an_error_ends_a_pause() -> None:
    with pytest.raises(ValueError, match="no"), pause_gc():
        raise ValueError("no")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with pause_gc():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
