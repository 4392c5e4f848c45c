"""Native: the machine code of a saved file, loaded, or rebuilt for this processor.

In: shared objects and C++ from a file, and the features of the processor that built them. Out:
loaded libraries, or a SavedFileError that names the missing features::

    libraries = Libraries(manifest, entries)
    libraries.open("kernels-0123456789abcdef").fused_gelu_0
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbotx.errors import BuildError, BuildWarning, SavedFileError
from turbotx.kernels.build import HEADERS, build_library
from turbotx.kernels.openmp import share_openmp
from turbotx.kernels.processor import processor_flags
from turbotx.runtime.cpu.abi import SOURCES, declare, units_of

# Features that -march=native may use, as named in /proc/cpuinfo (x86 and ARM).
INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|f16c|bmi|lzcnt|abm|popcnt|movbe|aes|vaes|sha|gfni|pclmul|vpclmul|adx"
    r"|rdseed|rdrnd|asimd|sve|sme|i8mm|bf16|fphp|crc32|atomics|lrcpc|dcpop)"
)


def cpu_features() -> frozenset[str]:
    """Return the instruction sets of this processor; empty if unknown."""
    return frozenset(filter(INSTRUCTIONS.match, processor_flags()))


@functools.cache
def runtime_digest() -> str:
    """Return the digest of this turbotx's C++: a file made with another cannot run here."""
    own = (path for units in SOURCES.values() for path in units.values())
    files = [*own, *sorted(HEADERS.glob("*.h"))]
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


class Libraries:
    """The libraries of one file, each opened once."""

    def __init__(self, manifest: Mapping[str, Any], entries: Mapping[str, bytes]) -> None:
        self._entries = entries
        self._opened: dict[str, ctypes.CDLL] = {}
        if manifest["runtime"] != runtime_digest():
            raise SavedFileError(
                f"the file was saved by turbotx {manifest['turbotx']} with another C++ runtime "
                "than this one's: save the model again with this version"
            )
        self._lacking = _find_lacking(manifest)
        share_openmp()

    def open(self, name: str) -> ctypes.CDLL:
        """Return a library, rebuilt if its machine code is not for this processor."""
        if name not in self._opened:
            library = self._rebuild(name) if self._lacking else _load(self._entries[f"{name}.so"])
            declare(_kind_of(name), library)
            self._opened[name] = library
        return self._opened[name]

    def _rebuild(self, name: str) -> ctypes.CDLL:
        units = {
            Path(entry).stem: data.decode()
            for entry, data in self._entries.items()
            if entry.startswith(f"{name}/") and entry.endswith(".cpp")
        }
        if _kind_of(name) in SOURCES:
            units = units_of(_kind_of(name))
        try:
            library, built = build_library(units)
        except BuildError as error:
            raise SavedFileError(
                f"the file's kernels are for a processor with {self._lacking}, which this one "
                f"lacks, and they cannot be built again here: {error}"
            ) from error
        if built:
            warnings.warn(
                f"the file's kernels are for a processor with {self._lacking}, which this one "
                "lacks: they were built again, and are kept in the cache",
                BuildWarning,
                stacklevel=2,
            )
        return library


def _kind_of(name: str) -> str:
    """Return what a library of a file is: "kernels", or one of turbotx's own by its name."""
    return name.rpartition("-")[0]


def _find_lacking(manifest: Mapping[str, Any]) -> str:
    if manifest["machine"] != platform.machine():
        return str(manifest["machine"])
    return ", ".join(sorted(set(manifest["cpu_features"]) - cpu_features()))


def _load(data: bytes) -> ctypes.CDLL:
    """Load machine code from a uniquely named file, which is deleted once it is mapped."""
    with tempfile.NamedTemporaryFile(prefix="turbotx-", suffix=".so") as file:
        file.write(data)
        file.flush()
        return ctypes.CDLL(file.name)
