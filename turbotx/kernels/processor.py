"""Processor: the machine's processor name and instruction sets.

In: Linux's /proc/cpuinfo, if it exists. Out: a name, and the names of instruction sets::

    processor_name()  ->  "AMD EPYC 9554 64-Core Processor"      "avx2" in processor_flags()
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path


@functools.cache
def processor_name() -> str:
    """Return the processor's name, or its architecture if unknown."""
    found = re.search(r"^model name\s*:\s*(.*)$", _read(), re.M)
    return found[1] if found else platform.processor() or platform.machine()


@functools.cache
def processor_flags() -> frozenset[str]:
    """Return Linux's names of the instruction sets; empty if unknown."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _read(), re.M)
    return frozenset(found[1].split() if found else ())


def _read() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
