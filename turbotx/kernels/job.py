"""Jobs and binaries: a kernel to compile for a target, and its machine code, as plain data.

In: source, signature, tiles. Out: a digest, the key of cached builds; machine code with its launch
parameters, which a device loads without Triton::

    Binary("fused_gelu_0", "sm_90", entry="fused_gelu_0", threads=128, arguments=6, ...)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from dataclasses import dataclass

from turbotx.errors import BuildError

_COMMENTS = re.compile(r"^#.*\n", re.MULTILINE)
# Default divisibility of pointer arguments, in bytes.
ALIGNED_NBYTES = 16


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one target.

    signature: the Triton type of every argument, in order ("constexpr" for tiles). divisible:
    arguments (addresses for pointers) that are multiples of 16, which allows 128-bit accesses. pdl:
    the kernel waits for its predecessor itself (see `dependent`); before_wait: lines to run before
    the wait. cells: arguments that it reads from device memory. contracts: whether the compiler may
    fuse a product and a sum (FMA), whose rounding may differ between loops.
    """

    name: str
    source: str
    target: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, int], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int = 2
    pdl: bool = False
    before_wait: str = ""
    cells: tuple[str, ...] = ()
    contracts: bool = True

    def digest(self) -> str:
        """Return a digest of everything that affects the binary; comments, which name lines of the
        user's model, are left out."""
        source = _COMMENTS.sub("", self.source)
        code = dataclasses.replace(self, source=source, before_wait="")
        shown = (_triton_version(), dataclasses.astuple(code))
        return hashlib.sha256(repr(shown).encode()).hexdigest()[:24]

    def split(self) -> tuple[str, str]:
        """Return the source up to the function's first line, and from there on."""
        begin = re.search(rf"^def {re.escape(self.name)}\([^)]*\):\n", self.source, re.MULTILINE)
        assert begin is not None, self.source
        return self.source[: begin.end()], self.source[begin.end() :]

    @property
    def taken(self) -> int:
        """Number of arguments of a launch."""
        return sum(kind != "constexpr" for _, kind in self.signature)


@functools.cache
def _triton_version() -> str:
    import triton

    return str(triton.__version__)


@dataclass(frozen=True)
class Binary:
    """A kernel as machine code.

    entry: the function's name. arguments: their number, including Triton's own two. shared_nbytes:
    dynamic shared memory of a launch. image: the cubin.
    """

    name: str
    target: str
    entry: str
    threads: int
    arguments: int
    shared_nbytes: int
    image: bytes
    pdl: bool = False

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the image, in hex."""
        return hashlib.sha256(self.image).hexdigest()


def read_entry(ptx: str) -> tuple[str, int, int]:
    """Return the kernel's name, number of threads and number of arguments from its PTX. Raises
    BuildError if the PTX does not give the number of threads."""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*\.(?:req|max)ntid\s+(\d+)", ptx)
    if entry is None:
        raise BuildError("the PTX has no entry with a number of threads")
    return entry[1], int(entry[3]), entry[2].count(".param")
