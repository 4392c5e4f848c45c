"""Fuzzer: random programs, or sequences of assumptions, many in one process, failures as files.

In: the first seed and how many. Out: counts on standard output, and a file a failure with the
fewest steps that show it, which runs by itself; for example::

    python -m tests.fuzz programs --seed 0 --count 1000 --out build/fuzz
    1000 programs, 0 failing

Programs are those of `tests/random_programs.py` (compiled, at two sizes), sequences those of
`tests/assumptions.py`. Eight programs are captured side by side, which takes a third less CPU time
a program than alone (--together 1); where they fail, each runs alone. Batches run in forked
processes: PyTorch is imported and warmed up once, and a crash costs one program. Kernels are built
at -O1, in half the time of -O3 (--flags "" for that).
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import gc
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.assumptions import PER_MODULE, run_sequences
from tests.random_programs import KINDS, Program, Step, Values, draw_inputs, write_program
from tests.test_properties import FLOATS, check_compiled

PER_PROCESS = 8
MOST_TRIES = 100
"""How often a failing program is run again to make it smaller."""
MIXED = 256
"""Programs that run side by side are chosen among so many seeds."""

Seeds = Sequence[int]
Found = tuple[str, str]
"""A failure: the name of its file, and the file's text."""
Part = TypeVar("Part")
Drawn = tuple[list[Step], Values]
"""A program: its steps and its inputs."""


def make_program(seed: int) -> Drawn:
    """Return the drawn steps and the inputs of a seed."""
    draw = random.Random(seed)
    drawn = [
        (draw.choice(KINDS), *(draw.randint(0, 1000) for _ in range(4)))
        for _ in range(draw.randint(7, 48))
    ]
    return drawn, draw_inputs(draw, FLOATS, 33)  # type: ignore[return-value]


def group_programs(seeds: Seeds, together: int) -> list[Seeds]:
    """Return groups of at most `together` seeds, whose programs are captured side by side.

    Sizes of 1 and 2 may be traced at other sizes, and 1 as a constant where any input of the call
    has a larger size at its place: only programs with the same of them share a group.
    """
    alike = collections.defaultdict[Any, list[int]](list)
    for seed in seeds:
        shape = make_program(seed)[1][0].shape
        small = tuple(min(n, 3) for n in shape)
        alike[seed // MIXED, small if min(small) < 3 else None].append(seed)
    return [
        found[k : k + together] for found in alike.values() for k in range(0, len(found), together)
    ]


def find_error(*programs: Drawn) -> Exception | None:
    """Return what is wrong with programs: an assertion about their results, or turbotx's error."""
    try:
        check_compiled(*programs)
    except Exception as error:
        return error
    return None


def shrink(parts: list[Part], fails: Callable[[list[Part]], bool]) -> list[Part]:
    """Drop parts of what fails while it fails."""
    tries, size = MOST_TRIES, len(parts) // 2
    while size and tries > 0:
        i = 0
        while i < len(parts) and tries > 0:
            fewer = parts[:i] + parts[i + size :]
            tries -= 1
            if fails(fewer):
                parts = fewer
            else:
                i += size
        size //= 2
    return parts


FILE = '''"""{error}

Seed {seed}: python -m tests.fuzz programs --seed {seed} --count 1
"""
import torch
from torch import device
from math import inf, nan

import turbotx

{code}
def make(size, stride, dtype, values):
    return torch.empty_strided(size, stride, dtype=dtype).copy_(torch.tensor(values, dtype=dtype))


inputs = [
{inputs}]
for came, right in zip(turbotx.optimize(forward)(*inputs), forward(*inputs), strict=True):
    same = torch.allclose(came.double(), right.double(), 1e-2, 1e-2, equal_nan=True)
    print("same" if same else f"CAME {{came}}\\nRIGHT {{right}}")
'''


def write_file(seed: int, program: Program, given: Values, error: Exception) -> str:
    """Return a program as the ATen ops that it calls at these sizes, with its inputs, as a file."""
    traced = make_fx(program.__call__)(*given)
    names = ", ".join(n.name for n in traced.graph.find_nodes(op="placeholder"))
    _, _, body = traced.code.partition("\n    ")
    inputs = "".join(
        f"    make({tuple(x.shape)}, {x.stride()}, {x.dtype}, {x.tolist()}),\n" for x in given
    )
    code = f"def forward({names}):\n    {body}\n"
    text = f"{type(error).__name__}: {error}".replace('"""', "'''").replace("\\", "/")[:400]
    return FILE.format(error=text, seed=seed, code=code, inputs=inputs)


def run_programs(seeds: Seeds) -> list[Found]:
    """Run programs side by side; return the failures of each alone, or of the fewest together."""
    programs = {seed: make_program(seed) for seed in seeds}
    error = find_error(*programs.values())
    if error is None:
        return []
    found = [_run_alone(seed) for seed in seeds]
    if any(found):
        return [failure for failure in found if failure is not None]
    kind = type(error)
    fewest = shrink(
        list(seeds), lambda some: isinstance(find_error(*(programs[s] for s in some)), kind)
    )
    return [(f"together_{fewest[0]}.txt", f"seeds {fewest} side by side: {error!r}\n")]


def _run_alone(seed: int) -> Found | None:
    drawn, given = make_program(seed)
    error = find_error((drawn, given))
    if error is None:
        return None
    kind = type(error)
    drawn = shrink(drawn, lambda fewer: isinstance(find_error((fewer, given)), kind))
    error = find_error((drawn, given)) or error
    program = write_program(drawn, 2, given, jumps=False)
    return f"program_{seed}.py", write_file(seed, program, given, error)


def run_sequence(seeds: Seeds) -> list[Found]:
    """Run the sequences of one module, which begins at this seed; return their failures."""
    failures = run_sequences(seeds[0], PER_MODULE).failures
    return [(f"sequence_{seeds[0]}_{k}.txt", text) for k, text in enumerate(failures)]


def run_batch(
    run: Callable[[Seeds], list[Found]], groups: Sequence[Seeds], folder: Path
) -> int | None:
    """Run groups in a process of their own, which writes their failures; return the place of the
    group at which it died, None where it came to the end."""
    at = folder / "at"
    child = os.fork()
    if child == 0:
        faulthandler.enable()
        for k, seeds in enumerate(groups):
            at.write_text(str(k))
            try:
                found = run(seeds)
            except BaseException as error:  # of the fuzzer itself: seen as one of its failures
                found = [(f"fuzzer_{seeds[0]}.txt", repr(error))]
            for name, text in found:
                (folder / name).write_text(text)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return int(at.read_text()) if status else None


def run_all(run: Callable[[Seeds], list[Found]], groups: Iterable[Seeds], folder: Path) -> None:
    """Run all groups, those behind one that ended its process too, which runs again one by one."""
    left = list(groups)
    while left:
        batch, left = left[:PER_PROCESS], left[PER_PROCESS:]
        died = run_batch(run, batch, folder)
        if died is not None:
            seeds = batch[died]
            left = [
                *([[seed] for seed in seeds] if len(seeds) > 1 else []),
                *batch[died + 1 :],
                *left,
            ]
            if len(seeds) == 1:
                (folder / f"crash_{seeds[0]}.txt").write_text("the process died\n")
        print(f"{sum(map(len, left))} left\r", end="", flush=True)
    (folder / "at").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("programs", "sequences"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--flags", default="-O1")
    parser.add_argument("--together", type=int, default=8, help="programs in one capture")
    given = parser.parse_args()
    os.environ["TURBOTX_CXXFLAGS"] = given.flags
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    programs = given.what == "programs"
    run, step = (run_programs, 1) if programs else (run_sequence, PER_MODULE)
    seeds = range(given.seed, given.seed + given.count, step)
    groups = group_programs(seeds, given.together) if programs else [[seed] for seed in seeds]
    before = set(given.out.iterdir())
    find_error(make_program(given.seed))  # what is imported and built here, no child does again
    gc.freeze()  # nor looks for garbage in it
    run_all(run, groups, given.out)
    failing = sorted(set(given.out.iterdir()) - before)
    print(f"{len(seeds) * step} {given.what}, {len(failing)} failing", *failing, sep="\n  ")


if __name__ == "__main__":
    main()
