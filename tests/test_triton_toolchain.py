"""What turbotx needs of the installed Triton: kernels for every GPU, built without one.

In: a kernel of one load and one store. Out: a binary per target, for example::

    triton.compile(ASTSource(double, ...), target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
tl = pytest.importorskip("triton.language")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@triton.jit
def double(source, target, count, TILE: tl.constexpr):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(target + index, 2 * tl.load(source + index, mask=index < count), mask=index < count)


@pytest.mark.parametrize(
    ("target", "text", "binary"),
    [
        (GPUTarget("cuda", 80, 32), "ptx", "cubin"),
        (GPUTarget("cuda", 90, 32), "ptx", "cubin"),
        (GPUTarget("cuda", 100, 32), "ptx", "cubin"),
        (GPUTarget("hip", "gfx942", 64), "amdgcn", "hsaco"),
    ],
    ids=lambda value: str(value.arch) if isinstance(value, GPUTarget) else None,
)
def test_builds_without_a_gpu(target: GPUTarget, text: str, binary: str) -> None:
    source = ASTSource(
        fn=double,
        signature={"source": "*fp32", "target": "*fp32", "count": "i32", "TILE": "constexpr"},
        constexprs={"TILE": 256},
    )
    built = triton.compile(
        source, target=target, options={"num_warps": 4, "enable_fp_fusion": False}
    )
    assert "double" in built.asm[text]
    assert len(built.asm[binary]) > 0
