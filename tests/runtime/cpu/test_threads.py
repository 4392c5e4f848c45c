"""The threads of compiled programs: every part of a loop once, whoever calls, also after a fork."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.errors import IndexOutOfRangeError
from turbotx.kernels.openmp import find_openmp
from turbotx.runtime.cpu.launch_table import load_library

pytestmark = needs_compiler

PART = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)


def share(parts: int, run: object, with_team: bool = False) -> None:
    """Call run(part) for every part, shared by turbotx's threads, or by those of PyTorch."""
    call = PART(lambda _, part, count: run(part))  # type: ignore[operator]
    library = load_library("runtime")[0]
    library.ttx_share_with_team(with_team)
    library.ttx_share(ctypes.c_long(parts), call, None)
    library.ttx_share_with_team(0)


teams = pytest.mark.parametrize("with_team", [False, True], ids=["own", "PyTorch's"])


@teams
def test_every_part_runs_once_for_callers_side_by_side(with_team: bool) -> None:
    found: dict[int, list[list[int]]] = {}

    def call(who: int) -> None:
        found[who] = []
        for parts in (1, 2, 3, 7) * 4:
            done: list[int] = []
            share(parts, done.append, with_team)
            found[who].append(sorted(done))

    callers = [threading.Thread(target=call, args=(who,)) for who in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    want = [list(range(parts)) for parts in (1, 2, 3, 7) * 4]
    assert found == dict.fromkeys(range(3), want)


def test_a_caller_does_not_wait_for_threads_that_are_held_up() -> None:
    begun, release = threading.Semaphore(0), threading.Event()

    def hold(part: int) -> None:
        begun.release()
        release.wait()

    holder = threading.Thread(target=share, args=(2, hold))
    holder.start()
    begun.acquire()
    begun.acquire()  # the caller, and the only other thread, or one of several
    done: list[int] = []
    share(2, done.append)
    assert sorted(done) == [0, 1]
    release.set()
    holder.join()


@teams
def test_a_loop_in_a_part_is_done_by_its_thread(with_team: bool) -> None:
    seen: list[tuple[int, int]] = []

    def run(part: int) -> None:
        outside = threading.get_ident()
        share(3, lambda inner: seen.append((part, int(threading.get_ident() == outside))))

    share(2, run, with_team)
    assert sorted(seen) == [(0, 1)] * 3 + [(1, 1)] * 3


def test_a_check_that_fails_in_any_thread_is_told() -> None:
    torch.set_num_threads(2)
    fast = turbotx.optimize(torch.nn.Sequential(torch.nn.Embedding(50, 384)).eval())
    ids = torch.zeros(4, 200, dtype=torch.int64)
    assert torch.isfinite(fast(ids)).all()
    for place in (0, -1):
        wrong = ids.clone().view(-1)
        wrong[place] = 50
        with pytest.raises(IndexOutOfRangeError, match="50"):
            fast(wrong.view(4, 200))


FORKED = """
import os, torch, turbotx
torch.set_num_threads(2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
fast, x = turbotx.optimize(model.eval()), torch.randn(64, 256)
with torch.no_grad():
    want = fast(x).numpy().tobytes()
    (x.expand(64, 64, 256) @ torch.ones(256, 256)).sum()  # PyTorch's threads exist too
    child = os.fork()
    if child == 0:
        os._exit(0 if all(fast(x).numpy().tobytes() == want for _ in range(20)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert fast(x).numpy().tobytes() == want
"""


def test_programs_run_in_a_forked_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


FORKED_TEAM = """
import os, torch
from tests.runtime.cpu.test_threads import share
torch.set_num_threads(2)
done = []
share(2, done.append, with_team=True)
child = os.fork()
if child == 0:
    share(2, done.append, with_team=True)
    os._exit(0 if sorted(done) == [0, 0, 1, 1] else 1)
assert os.waitpid(child, 0)[1] == 0 and sorted(done) == [0, 1]
"""


def test_a_forked_process_does_not_wait_for_threads_of_pytorch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED_TEAM], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


WAITING = """
import os, sys, torch, turbotx
from torch import nn
torch.set_num_threads(2)
model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
fast = turbotx.optimize(model, pack_weights=sys.argv[1] == "packed")
with torch.no_grad():
    fast(x)
    numbers, found = torch.ones(1 << 20), []
    for _ in range(3):
        numbers.add_(1)
        before = len(os.listdir("/proc/self/task"))
        fast(x)
        found.append(before - len(os.listdir("/proc/self/task")))
print(found)
"""


@pytest.mark.skipif("libgomp" not in str(find_openmp()), reason="another library of OpenMP")
@pytest.mark.parametrize(
    ("said", "weights", "ended"),
    [
        ({}, "packed", 1),
        ({"GOMP_SPINCOUNT": "1000"}, "packed", 0),
        ({"OMP_WAIT_POLICY": "passive"}, "packed", 0),
        ({}, "unpacked", 0),
    ],
)
def test_threads_of_pytorch_do_not_look_for_work_beside_a_program(
    said: dict[str, str], weights: str, ended: int
) -> None:
    """They are ended when a program begins, and begin again with the next op; where somebody has
    said how they wait, they stay, and where a program has ops of PyTorch between its launches."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | said
    done = subprocess.run(
        [sys.executable, "-c", WAITING, weights], capture_output=True, text=True, check=True,
        timeout=300, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == str([ended] * 3)
