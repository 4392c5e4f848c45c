"""Comparing reports: equal ones, other programs of one model, and files that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from tests.cli.command_line import Ran
from turbotx.errors import InputError
from turbotx.report.compare import compare


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(self.dense(F.gelu(self.dense(x))), dim=-1)


def report_of(**options: bool) -> dict[str, object]:
    fast = turbotx.optimize(Block().eval(), **options)  # type: ignore[arg-type]
    made = turbotx.explain(fast, torch.randn(2, 3, 8))
    return json.loads(json.dumps(made.to_dict()))


def test_equal_reports_differ_in_nothing() -> None:
    found = compare(report_of(), report_of())
    assert found.equal and not found.gone and not found.new and not found.changed
    assert {f.name for f in found.figures} >= {"launches", "bytes moved", "planned bytes"}
    assert all(f.ratio in (1.0, None) for f in found.figures)


def test_another_program_of_the_same_model() -> None:
    found = compare(report_of(), report_of(epilogues=False))
    figures = {f.name: f for f in found.figures}
    assert not found.equal and figures["launches"].ratio != 1
    assert figures["bytes moved"].ratio is not None and figures["bytes moved"].ratio > 1
    assert not found.other


def test_what_is_no_report_is_refused() -> None:
    with pytest.raises(InputError, match="the second file is not a report"):
        compare(report_of(), {"model": "Bert"})


def test_the_command(run: Callable[..., Ran], tmp_path: Path) -> None:
    before, after, broken = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    before.write_text(json.dumps(report_of()))
    after.write_text(json.dumps(report_of(epilogues=False)))
    broken.write_text("[1")
    same, other = run("diff", before, before), run("diff", before, after)
    assert same.code == 0 and same.out.endswith("no difference\n")
    assert other.code == 1 and "they differ" in other.out
    assert run("diff", before, after, "--json").json["equal"] is False
    assert run("diff", before, broken).code == 2
    assert "cannot read" in run("diff", before, tmp_path / "none.json").err
