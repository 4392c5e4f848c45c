"""Progress: shown on a terminal once a call takes long, and nowhere else."""

from __future__ import annotations

import contextlib
import io
import logging
import time

import pytest

from turbotx.engine.progress import hide_progress, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(stream: io.StringIO, text: str) -> None:
    """The line is drawn by threads of its own: give them time on a busy machine."""
    until = time.monotonic() + 30
    while text not in stream.getvalue() and time.monotonic() < until:
        time.sleep(0.01)
    assert text in stream.getvalue()


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with show_progress("capture Encoder", after_s=0.0):
        time.sleep(0.1)
    return stream.getvalue()


def test_a_terminal_sees_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress("capture Encoder", after_s=0.0) as step:
        wait_for(stream, "capture Encoder")
        step("compile Encoder")
        wait_for(stream, "compile Encoder")
    assert stream.getvalue().endswith("\x1b[2K")  # the line is gone


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
    assert shown(monkeypatch, Terminal()) == ""


def test_nothing_beside_a_progress_bar_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    with hide_progress():
        assert shown(monkeypatch, Terminal()) == ""


def test_an_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with contextlib.suppress(ValueError), show_progress("capture", after_s=0.0):
        wait_for(stream, "capture")
        raise ValueError
    before = stream.getvalue()
    time.sleep(0.15)
    assert stream.getvalue() == before
