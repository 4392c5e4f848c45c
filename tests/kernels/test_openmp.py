"""OpenMP around a fork: a child computes with as many threads as its parent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from turbotx.kernels.openmp import find_openmp

SCRIPT = """
import os, signal, threading
import torch, turbotx

torch.set_num_threads(2)
fast, x = turbotx.optimize(torch.exp), torch.randn(4096, 64)
def run():
    return torch.allclose(fast(x), x.exp())  # each a parallel loop
def fork():
    run()
    if (child := os.fork()) == 0:
        signal.alarm(100)  # where it waits forever
        # Its own thread and another of OpenMP or of turbotx at least: not one alone.
        print(run(), torch.get_num_threads(), len(os.listdir("/proc/self/task")) > 1, flush=True)
        os._exit(0)
    print(os.waitpid(child, 0)[1], run(), flush=True)
fork()
worker = threading.Thread(target=fork)  # with a team of its own
worker.start(); worker.join()
"""


@pytest.mark.skipif(find_openmp() is None, reason="no OpenMP library is seen in this process")
def test_a_forked_child_computes_on_all_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout == "True 2 True\n0 True\n" * 2, done.stdout + done.stderr[-2000:]
