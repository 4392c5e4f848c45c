"""Processor: what this machine calls itself, and what it can do.

In: Linux's /proc/cpuinfo, where there is one. Out: a name, and the names of instruction sets::

    processor_name()  ->  "AMD EPYC 9554 64-Core Processor"      "avx2" in processor_flags()
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path


@functools.cache
def processor_name() -> str:
    """Return the processor's name, as it calls itself; its architecture where it has none."""
    found = re.search(r"^model name\s*:\s*(.*)$", _read(), re.M)
    return found[1] if found else platform.processor() or platform.machine()


@functools.cache
def processor_flags() -> frozenset[str]:
    """Return the names that Linux has for its instruction sets, none where it does not say."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _read(), re.M)
    return frozenset(found[1].split() if found else ())


def _read() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
