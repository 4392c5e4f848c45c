"""Resources: registers, spills and access widths of a compiled GPU kernel.

In: a cubin, or AMD assembly. Out: `Resources`, without a device, for example::

    Resources(registers=32, spills=0, shared_nbytes=512, load_bits=128, store_bits=128, ...)
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from turbotx.errors import BuildError


@dataclass(frozen=True)
class Resources:
    """Resources of a kernel.

    registers: per thread (vector registers on AMD). spills: spilled words (on AMD vector registers;
    scalar ones spill into those). shared_nbytes: per program. load_bits, store_bits: the widest
    access to global memory. instructions: of the whole kernel."""

    registers: int
    spills: int
    shared_nbytes: int
    load_bits: int
    store_bits: int
    instructions: int


@functools.cache
def find_tool(name: str) -> str:
    """Return the path of a CUDA binary tool in the Triton wheel. Raises BuildError if missing."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    raise BuildError(f"the installed Triton has no {name}: reinstall it from its wheel")


def read_cubin(path: Path, shared_nbytes: int) -> Resources:
    """Disassemble a cubin. Raises BuildError if the disassembler reports no registers."""
    usage = _run([find_tool("cuobjdump"), "--dump-resource-usage", str(path)])
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise BuildError(f"cuobjdump reports no registers for {path}:\n{usage}")
    text = _run([find_tool("nvdisasm"), "-c", str(path)])
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", text, re.M)
    local = any(op.split(".")[0] in ("LDL", "STL") for op in code)
    return Resources(
        registers=int(registers[1]),
        spills=_ask_ptxas(path.with_suffix(".ptx")) if local else 0,
        shared_nbytes=shared_nbytes,
        load_bits=max(
            (_sass_bits(op) for op in code if op.startswith(("LDG", "LDGSTS"))), default=0
        ),
        store_bits=max((_sass_bits(op) for op in code if op.startswith("STG")), default=0),
        instructions=sum(op != "NOP" for op in code),
    )


def _ask_ptxas(ptx: Path) -> int:
    """Return the spilled words; asked of ptxas, since local memory also holds arrays (sine,
    cosine)."""
    found = re.search(r"^\.target (sm_(\d+)\w*)", ptx.read_text(), re.M)
    if found is None:
        raise BuildError(f"{ptx} names no target")
    said = ""
    # Triton does not report which of the wheel's assemblers it used; an older one rejects the PTX.
    for tool in ("ptxas", "ptxas-blackwell"):
        command = [find_tool(tool), "-v", f"--gpu-name={found[1]}", str(ptx), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        said += f"{' '.join(command)} failed:\n{done.stderr[-1000:]}"
    else:
        raise BuildError(said)
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))) // 4


def _sass_bits(op: str) -> int:
    """Return the access width of a SASS op: LDG.E.128.CONSTANT -> 128, without a width 32."""
    found = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", op)
    return int(found[1]) if found else 32


def read_amdgcn(text: str, shared_nbytes: int) -> Resources:
    """Read AMD assembly with the metadata at its end."""

    def note(key: str) -> int:
        found = re.findall(rf"^\s*\.{key}:\s+(\d+)", text, re.M)
        return max(map(int, found), default=0)

    code = re.findall(r"^\t([a-z]\w+)(?:\s|$)", text, re.M)
    loads = [op for op in code if re.match(r"(global|buffer|flat)_load", op)]
    stores = [op for op in code if re.match(r"(global|buffer|flat)_store", op)]
    return Resources(
        registers=note("vgpr_count"),
        spills=note("vgpr_spill_count"),
        shared_nbytes=max(shared_nbytes, note("group_segment_fixed_size")),
        load_bits=_widest(loads),
        store_bits=_widest(stores),
        instructions=len(code),
    )


def _widest(ops: Iterable[str]) -> int:
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    widest = 0
    for op in ops:
        found = (bits for key, bits in widths.items() if op.endswith(key) or key in op.split("_"))
        widest = max(widest, next(found, 16 if "short" in op else 8))
    return widest


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout
