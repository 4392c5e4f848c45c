"""Progress: shown on a terminal once a call takes long, and nowhere else."""

from __future__ import annotations

import contextlib
import io
import logging
import time

import pytest

from turbotx.progress import hide_progress, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, lasts_s: float = 0.2) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress("capture Encoder", after_s=0.01) as step:
        time.sleep(lasts_s)
        step("compile Encoder")
        time.sleep(lasts_s)
    return stream.getvalue()


def test_a_terminal_sees_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal())
    assert "capture Encoder" in text and "compile Encoder" in text
    assert text.endswith("\x1b[2K")  # the line is gone


def test_a_file_sees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_short_call_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with show_progress("capture Encoder", after_s=30.0):
        pass
    assert stream.getvalue() == ""


def test_nothing_while_the_logger_is_silenced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="turbotx")
    assert shown(monkeypatch, Terminal(), 0.05) == ""


def test_nothing_beside_a_progress_bar_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    with hide_progress():
        assert shown(monkeypatch, Terminal(), 0.05) == ""


def test_an_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with contextlib.suppress(ValueError), show_progress("capture", after_s=0.01):
        time.sleep(0.1)
        raise ValueError
    assert "capture" in stream.getvalue()
    before = stream.getvalue()
    time.sleep(0.15)
    assert stream.getvalue() == before
