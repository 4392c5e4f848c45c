"""Masked loads read nothing outside: inputs at the edge of their memory, and text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.compiled_functions import compile_function
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.kernels.cpp.barriers import find_hidden
from turbotx.kernels.cpp.printer import print_kernel

FENCED = """
import ctypes, mmap
import torch
from torch.nn import functional as F
import turbotx

libc = ctypes.CDLL(None)
PAGE = mmap.PAGESIZE
kept = []

def fenced(x, front):
    # A copy that begins or ends where its page does, between pages that are not there.
    pages = -(-x.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    kept.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (base, base + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(edge), PAGE, 0) == 0
    offset = PAGE if front else (pages + 1) * PAGE - x.nbytes
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)

for dtype in (torch.float32, torch.bfloat16):
    for width in (2, 5):
        b = torch.ones(width, dtype=dtype)

        def every(x):
            x = x + b  # so that the width is known
            parts = torch.cat([x, x * 2, x, x], -1)
            mean = torch.cat([x.neg(), x[..., 1:], x], -1).mean(-1)
            return parts, mean, F.pad(x, (3, 2)) + 1, torch.cat([x, x[:1], x * 3], 0).amax(0)

        fast = turbotx.optimize(every)
        for shape in ((4, 16, width), (3, 7, width), (1, 1, width)):
            x = (torch.arange(torch.Size(shape).numel()) % 7).view(shape).to(dtype)
            for front in (True, False):
                print(dtype, shape, front, flush=True)
                torch.testing.assert_close(fast(fenced(x, front)), every(x))
print("done")
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages that are not there")
def test_inputs_at_the_edge_of_their_memory(tmp_path: Path) -> None:
    """In a process of its own, which a read outside ends."""
    (tmp_path / "fenced.py").write_text(FENCED)
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "fenced.py")],
        capture_output=True, text=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-300:] + ran.stderr[-2000:]


def kernel_of(function, width, dtype=torch.float32):
    """The kernel of a function of a (batch, seq, width) tensor, whose width is known."""
    b = torch.ones(width, dtype=dtype)
    x = torch.ones(3, 5, width, dtype=dtype)
    (kernel,) = compile_function(lambda x: function(x + b), x).kernels
    return kernel


def test_a_part_that_ends_inside_a_vector_has_hidden_bounds() -> None:
    source = print_kernel(kernel_of(lambda x: torch.cat([x, x * 2, x], -1), 12))
    assert source.count("ttx::hidden(int64_t(12))") == 1
    assert source.count("ttx::hidden(int64_t(24))") == 1


@pytest.mark.parametrize(
    ("width", "dtype", "hidden"),
    [(16, torch.float32, False), (16, torch.bfloat16, True), (64, torch.bfloat16, False)],
)
def test_halves_of_whole_vectors_stay_known(width: int, dtype: torch.dtype, hidden: bool) -> None:
    def turn(x):
        return torch.cat([-x[..., width:], x[..., :width]], -1)

    assert bool(find_hidden(kernel_of(turn, 2 * width, dtype))) == hidden


def test_parts_along_another_dim_stay_known() -> None:
    assert not find_hidden(kernel_of(lambda x: torch.cat([x[:, :3], x], 1), 12))


def test_a_constant_that_no_mask_needs_is_known() -> None:
    kernel = kernel_of(lambda x: torch.cat([x * 3.5, x + 4], -1), 12)
    assert len(find_hidden(kernel)) == 1
