"""The fuzzer itself: what fails becomes a file that runs by itself, a crash costs one seed.

In: seeds, and a turbotx that is wrong. Out: the files that it leaves::

    make test PYTEST_ARGS="tests/test_fuzz.py"
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import turbotx
from tests import fuzz
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.random_programs import write_program


def test_a_seed_says_all() -> None:
    for again in (fuzz.make_program(3), fuzz.make_program(3)):
        drawn, given = fuzz.make_program(3)
        assert drawn == again[0]
        assert all(map(torch.equal, given, again[1]))
    assert fuzz.make_program(4)[0] != drawn


def test_a_program_runs_only_what_its_outputs_need() -> None:
    for seed in range(4):
        drawn, given = fuzz.make_program(seed)
        every = write_program(drawn, len(drawn), given, jumps=False)
        program = write_program(drawn, 2, given, jumps=False)
        assert None not in every.calls and None in program.calls
        assert all(map(torch.equal, program(*given), every(*given)[-2:]))


@needs_compiler
def test_programs_of_a_few_seeds(tmp_path: Path) -> None:
    # By its command, as a user runs it: the fuzzer forks, and a team of OpenMP threads that this
    # process has started would not be there in its children (in PyTorch's own kernels too).
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "programs", "--count", "2", "--out", tmp_path],
        capture_output=True, text=True, check=True, cwd=Path(turbotx.__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].endswith("2 programs, 0 failing")
    assert not list(tmp_path.iterdir())


def test_what_fails_is_a_file_that_runs_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: torch.Tensor) -> list[torch.Tensor]:
            return [x + 1 if x.dtype is torch.float32 else x for x in function(*given)]

        return run

    monkeypatch.setattr(turbotx, "optimize", wrong)
    seed = next(s for s in range(50) if fuzz.find_error(*fuzz.make_program(s)) is not None)
    ((name, text),) = fuzz.run_program(seed)
    assert name == f"program_{seed}.py" and "AssertionError" in text
    assert text.count("torch.ops.aten") <= 3, "made as small as it can be"
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, str(tmp_path / name)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(turbotx.__file__).parents[1])},
    )  # fmt: skip
    assert set(done.stdout.split()) == {"same"}


def test_a_crash_is_noted_and_passed_over(tmp_path: Path) -> None:
    def run(seed: int) -> list[fuzz.Found]:
        if seed == 2:
            os.abort()
        return [(f"seen_{seed}", "")] if seed else []

    fuzz.run_all(run, range(4), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crash_2.txt", "seen_1", "seen_3"]
