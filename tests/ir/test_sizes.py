"""Sizes as plain data: all of them evaluated by one function, without symbolic algebra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import turbotx
from turbotx.ir.expr import compile_evaluator, dim, sizes_of
from turbotx.ir.sizes import Sizes


def test_every_text_is_evaluated_at_once() -> None:
    assert Sizes(("4 * seq + 32", "batch")).compile(["batch", "seq"])(2, 10) == (72, 2)
    assert Sizes(()).compile(["seq"])(3) == ()
    assert Sizes(("7",)).compile([])() == (7,)


def test_expressions_become_texts_that_mean_the_same() -> None:
    values = [4 * dim("seq") + 32, dim("batch") // 3, dim("batch") - dim("seq")]
    found = sizes_of(values).compile(["batch", "seq"])
    assert found(8, 10) == compile_evaluator(values, ["batch", "seq"])(8, 10) == (72, 2, -2)


def test_they_need_no_algebra() -> None:
    code = (
        "import sys; sys.modules['sympy'] = None\n"
        "from turbotx.ir.sizes import Sizes\n"
        "print(Sizes(('max(seq, 2)',)).compile(['seq'])(1))\n"
    )
    environment = {"PATH": "", "PYTHONPATH": str(Path(turbotx.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(2,)", done.stderr
