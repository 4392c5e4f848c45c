"""Fuzzer: random programs, or sequences of assumptions, many in one process, failures as files.

In: the first seed and how many. Out: counts on standard output, and a file a failure with the
fewest steps that show it, which runs by itself; for example::

    python -m tests.fuzz programs --seed 0 --count 1000 --out build/fuzz
    1000 programs, 0 failing

Programs are those of `tests/random_programs.py` (compiled, at two sizes), sequences those of
`tests/assumptions.py`. Batches run in forked processes: PyTorch is imported and warmed up once, and
a crash costs one program. Kernels are built at -O1, in half the time of -O3 (--flags "" for that).
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.assumptions import PER_MODULE, run_sequences
from tests.random_programs import KINDS, Program, Step, Values, draw_inputs, write_program
from tests.test_properties import FLOATS, check_compiled

PER_PROCESS = 8
MOST_TRIES = 100
"""How often a failing program is run again to make it smaller."""

Seeds = Sequence[int]
Found = tuple[str, str]
"""A failure: the name of its file, and the file's text."""


def make_program(seed: int) -> tuple[list[Step], Values]:
    """Return the drawn steps and the inputs of a seed."""
    draw = random.Random(seed)
    drawn = [
        (draw.choice(KINDS), *(draw.randint(0, 1000) for _ in range(4)))
        for _ in range(draw.randint(7, 48))
    ]
    return drawn, draw_inputs(draw, FLOATS, 33)  # type: ignore[return-value]


def find_error(drawn: list[Step], given: Values) -> Exception | None:
    """Return what is wrong with a program: an assertion about its results, or turbotx's error."""
    try:
        check_compiled(drawn, given)
    except Exception as error:
        return error
    return None


def shrink(drawn: list[Step], given: Values, kind: type[Exception]) -> list[Step]:
    """Drop steps while an error of the same class stays."""
    tries, size = MOST_TRIES, len(drawn) // 2
    while size and tries > 0:
        i = 0
        while i < len(drawn) and tries > 0:
            fewer = drawn[:i] + drawn[i + size :]
            tries -= 1
            if isinstance(find_error(fewer, given), kind):
                drawn = fewer
            else:
                i += size
        size //= 2
    return drawn


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


def run_program(seed: int) -> list[Found]:
    """Run one program; return its failure."""
    drawn, given = make_program(seed)
    error = find_error(drawn, given)
    if error is None:
        return []
    drawn = shrink(drawn, given, type(error))
    error = find_error(drawn, given) or error
    program = write_program(drawn, 2, given, jumps=False)
    return [(f"program_{seed}.py", write_file(seed, program, given, error))]


def run_sequence(seed: int) -> list[Found]:
    """Run the sequences of one module, which begins at this seed; return their failures."""
    failures = run_sequences(seed, PER_MODULE).failures
    return [(f"sequence_{seed}_{k}.txt", text) for k, text in enumerate(failures)]


def run_batch(run: Callable[[int], list[Found]], seeds: Seeds, folder: Path) -> int | None:
    """Run seeds in a process of their own, which writes their failures; return the seed at which it
    died, None where it came to the end."""
    at = folder / "at"
    child = os.fork()
    if child == 0:
        faulthandler.enable()
        for seed in seeds:
            at.write_text(str(seed))
            try:
                found = run(seed)
            except BaseException as error:  # of the fuzzer itself: seen as one of its failures
                found = [(f"fuzzer_{seed}.txt", repr(error))]
            for name, text in found:
                (folder / name).write_text(text)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return int(at.read_text()) if status else None


def run_all(run: Callable[[int], list[Found]], seeds: Iterable[int], folder: Path) -> None:
    """Run all seeds, those behind one that ended its process too."""
    left = list(seeds)
    while left:
        batch = left[:PER_PROCESS]
        died = run_batch(run, batch, folder)
        if died is not None:
            (folder / f"crash_{died}.txt").write_text(f"the process died at seed {died}\n")
        left = left[len(batch) if died is None else batch.index(died) + 1 :]
        print(f"{len(left)} left\r", end="", flush=True)
    (folder / "at").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("programs", "sequences"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--flags", default="-O1")
    given = parser.parse_args()
    os.environ["TURBOTX_CXXFLAGS"] = given.flags
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    programs = given.what == "programs"
    run, step = (run_program, 1) if programs else (run_sequence, PER_MODULE)
    seeds = range(given.seed, given.seed + given.count, step)
    before = set(given.out.iterdir())
    find_error(*make_program(given.seed))  # what is imported and built here, no child does again
    run_all(run, seeds, given.out)
    failing = sorted(set(given.out.iterdir()) - before)
    print(f"{len(seeds) * step} {given.what}, {len(failing)} failing", *failing, sep="\n  ")


if __name__ == "__main__":
    main()
