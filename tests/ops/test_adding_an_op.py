"""The page on adding an op is true: its worked example runs, and is one kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.engine.optimize import engine_of
from turbotx.ops.table import OPS

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-op.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@needs_compiler
def test_the_worked_example_runs() -> None:
    names: dict[str, Any] = {}
    before = dict(OPS)
    try:
        exec(compile(blocks()[0], str(PAGE), "exec"), names)
        (made,) = engine_of(names["activated"]).variants()
        assert sum(len(f.kernels) for f in made.fused) == 1
        assert made.assembly.externs == []
    finally:
        OPS.clear()
        OPS.update(before)


def test_the_other_blocks_are_python() -> None:
    for block in blocks()[1:]:
        compile(block, str(PAGE), "exec")
