"""Jobs and binaries: a kernel to compile for a target, and the compiler's result, as plain data.

In: source, signature, tiles. Out: a digest under which the build is kept; machine code with what a
launch of it has to know, which a device loads without Triton::

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
# What a signature promises of an address, in bytes, where nothing else is said.
ALIGNED_NBYTES = 16


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one target.

    signature: the Triton type of every argument, in order ("constexpr" for tiles).
    divisible: arguments that are multiples of 16 (pointers: addresses), so that an access may be
    128 bits wide. pdl: it waits for the kernel before it by itself (see `dependent`); before_wait:
    the lines that it then does first. cells: arguments that it is to read on the device (`cells`).
    contracts: a product and a sum may be one instruction, and so another number in another loop.
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
        """Return a digest of all that shapes the binary, which comments do not: a kernel's header
        names lines of the user's model."""
        source = _COMMENTS.sub("", self.source)
        code = dataclasses.replace(self, source=source, before_wait="")
        shown = (_triton_version(), dataclasses.astuple(code))
        return hashlib.sha256(repr(shown).encode()).hexdigest()[:24]

    @property
    def taken(self) -> int:
        """How many arguments a launch gives it."""
        return sum(kind != "constexpr" for _, kind in self.signature)


@functools.cache
def _triton_version() -> str:
    import triton

    return str(triton.__version__)


@dataclass(frozen=True)
class Binary:
    """A kernel as machine code.

    entry: its name there. arguments: how many its code takes, Triton's own two included.
    shared_nbytes: dynamic shared memory to launch it with. image: the cubin.
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
    """Return the kernel's name in the machine code, its threads and its number of arguments. Raises
    BuildError for PTX that says no number of threads."""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*\.(?:req|max)ntid\s+(\d+)", ptx)
    if entry is None:
        raise BuildError("the PTX has no entry that says how many threads it runs with")
    return entry[1], int(entry[3]), entry[2].count(".param")
