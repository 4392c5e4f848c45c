"""weight_memory.h: weights lie side by side, keep what was written, and give back what they held.

In: weights of many sizes, made and deleted in turns. Out: none overlaps another one, and the memory
of the process falls as they go.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tests.kernels.cpp.cpp_probe import build, needs_compiler

pytestmark = needs_compiler

SOURCE = """
#include "weight_memory.h"
#include <cstring>
#include <vector>
extern "C" {
void* make(long nbytes) { return new ttx::WeightMemory(nbytes); }
void* address(void* memory) { return static_cast<ttx::WeightMemory*>(memory)->as<char>(); }
void fill(void* memory, int value, long nbytes) { std::memset(address(memory), value, nbytes); }
long count(void* memory, int value, long nbytes) {
  const char* p = static_cast<const char*>(address(memory));
  long found = 0;
  for (long i = 0; i < nbytes; ++i) found += p[i] == value;
  return found;
}
void drop(void* memory) { delete static_cast<ttx::WeightMemory*>(memory); }
}
"""
SIZES = (1, 64, 100_000, 1_179_648, 3_538_944, 40_000_000)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = build(SOURCE, tmp_path_factory.mktemp("weight_memory"))
    built.make.restype = built.address.restype = ctypes.c_void_p
    built.make.argtypes = [ctypes.c_long]
    built.address.argtypes = built.drop.argtypes = [ctypes.c_void_p]
    built.fill.argtypes = built.count.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long]
    built.count.restype = ctypes.c_long
    return built


def resident_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_weights_do_not_overlap(library: ctypes.CDLL) -> None:
    held = []
    for number in range(60):
        nbytes = SIZES[number % len(SIZES)]
        memory = library.make(nbytes)
        assert library.address(memory) % 64 == 0
        library.fill(memory, number, nbytes)
        held.append((memory, number, nbytes))
        if number % 3 == 2:
            library.drop(held.pop(number % len(held))[0])
    for memory, number, nbytes in held:
        assert library.count(memory, number, nbytes) == nbytes
        library.drop(memory)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
def test_a_weight_gives_back_its_memory_while_its_neighbours_stay(library: ctypes.CDLL) -> None:
    nbytes, many = 4 << 20, 24
    before = resident_nbytes()
    held = [library.make(nbytes) for _ in range(many)]
    for memory in held:
        library.fill(memory, 1, nbytes)
    full = resident_nbytes() - before
    assert full > 0.9 * many * nbytes
    for memory in held[::2]:
        library.drop(memory)
    assert resident_nbytes() - before < 0.6 * full
    assert all(library.count(memory, 1, nbytes) == nbytes for memory in held[1::2])
    for memory in held[1::2]:
        library.drop(memory)
    assert resident_nbytes() - before < 0.1 * full
