"""The scheduler's notebook runs from its script, and shows what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_notebook_shows_what_it_says(monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    matplotlib.use("Agg")
    names = runpy.run_path(str(EXAMPLES / "07_dp_scheduler.py"))
    matplotlib.pyplot.close("all")
    outcomes = names["outcomes"]
    assert outcomes["aged"].percentile_ms(99) < outcomes["dp"].percentile_ms(99)
    printed = capsys.readouterr().out
    assert "no deadline [[3, 4, 5], [90]]" in printed
    assert "due in 6 ms [[90], [3, 4, 5]]" in printed
    assert "least waiting     [[10, 11], [95, 100]]" in printed
