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
from torch.utils._pytree import tree_map

import turbotx
from tests import fuzz
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.random_programs import grow, write_program


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


def test_programs_side_by_side_are_each_there_once() -> None:
    groups = fuzz.group_programs(range(250, 290), 8)
    assert sorted(seed for group in groups for seed in group) == list(range(250, 290))
    assert max(map(len, groups)) == 8 and all(len(g) == 1 for g in fuzz.group_programs([1, 2], 1))
    for group in groups:
        shapes = [fuzz.make_program(seed)[1][0].shape for seed in group]
        assert len({tuple(min(n, 3) for n in s) for s in shapes if min(s) < 3}) <= 1


def test_larger_inputs_lie_in_memory_as_the_first_ones_do() -> None:
    x = torch.randn(3, 1, 4).permute(2, 0, 1)
    twice, row = grow([x, torch.randn(3, 1)])
    assert twice.shape == (8, 6, 1) and twice.stride() == (1, 8, 8) and row.shape == (6, 1)
    assert torch.equal(twice[:4, :3], x) and torch.equal(twice[4:, 3:], x.flip(0, 1))


@needs_compiler
@pytest.mark.parametrize("count", [2, pytest.param(200, marks=pytest.mark.sweep)])
def test_programs_of_a_few_seeds(count: int, tmp_path: Path) -> None:
    # By its command, as a user runs it: the fuzzer forks, and a team of OpenMP threads that this
    # process has started would not be there in its children (in PyTorch's own kernels too).
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "programs", "--count", f"{count}", "--out", tmp_path],
        capture_output=True, text=True, check=True, cwd=Path(turbotx.__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].endswith(f"{count} programs, 0 failing")
    assert not list(tmp_path.iterdir())


def test_what_fails_is_a_file_that_runs_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            return tree_map(lambda x: x + 1 if x.dtype is torch.float32 else x, function(*given))

        return run

    monkeypatch.setattr(turbotx, "optimize", wrong)
    seed = next(s for s in range(50) if fuzz.find_error(fuzz.make_program(s)) is not None)
    ((name, text),) = fuzz.run_programs([seed])
    assert name == f"program_{seed}.py" and "AssertionError" in text
    assert text.count("torch.ops.aten") <= 3, "made as small as it can be"
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, str(tmp_path / name)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(turbotx.__file__).parents[1])},
    )  # fmt: skip
    assert set(done.stdout.split()) == {"same"}


def test_of_those_that_fail_together_each_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {tuple(fuzz.make_program(seed)[0]) for seed in (1, 2)}

    def check(*programs: fuzz.Drawn) -> None:
        here = [tuple(steps) for steps, _ in programs if tuple(steps) in bad]
        assert len(here) <= allowed, f"{len(here)} wrong"

    monkeypatch.setattr(fuzz, "check_compiled", check)
    monkeypatch.setattr(fuzz, "write_file", lambda *_: "")
    allowed = 0
    assert [name for name, _ in fuzz.run_programs(range(4))] == ["program_1.py", "program_2.py"]
    allowed = 1
    ((name, text),) = fuzz.run_programs(range(4))
    assert name == "together_1.txt" and "seeds [1, 2] side by side" in text
    allowed = 2
    assert not fuzz.run_programs(range(4))


def test_a_crash_is_noted_and_passed_over(tmp_path: Path) -> None:
    def run(seeds: fuzz.Seeds) -> list[fuzz.Found]:
        if 2 in seeds:
            os.abort()
        return [(f"seen_{seed}", "") for seed in seeds if seed]

    fuzz.run_all(run, [[0], [1, 2], [3]], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["crash_2.txt", "seen_1", "seen_3"]
