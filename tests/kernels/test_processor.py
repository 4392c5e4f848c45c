"""What the machine says of itself, and what is said where it says nothing."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from turbotx.kernels import processor


def test_name_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert processor.processor_name.__wrapped__() == "Some CPU @ 2 GHz"
    assert processor.processor_flags.__wrapped__() == {"fpu", "avx2", "avx512f"}


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert processor.processor_name.__wrapped__() == platform.machine()
    assert processor.processor_flags.__wrapped__() == frozenset()
