"""Provenance: what a report was made from, for its later readers.

In: a compiled call. Out: command, date, device, dtype, versions, and the findings of `turbotx
doctor`, except those that need a compilation::

    find_provenance(compiled).dtypes  ->  "float32"
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from turbotx.engine.compiled import Compiled
from turbotx.errors import versions
from turbotx.kernels.processor import processor_name
from turbotx.report.machine import CHECKS, Diagnosis, check_extras
from turbotx.runtime.cuda.cuda_graphs import CudaGraphProgram


@dataclass(frozen=True)
class Provenance:
    """What a report was made from.

    command: of the process, "" in a notebook.
    date: UTC.
    target: "cpu" or a GPU, such as "sm_90".
    device: what the program runs on; if that is not present, also the machine it was compiled on.
    dtypes: of the floating-point parameters that the program reads, most bytes first.
    """

    command: str
    date: str
    target: str
    device: str
    threads: int
    dtypes: str
    versions: dict[str, str]
    checks: tuple[Diagnosis, ...]


def find_provenance(compiled: Compiled) -> Provenance:
    """Return the provenance of a report of this call, as of now."""
    target = compiled.unbound.target
    checks = [make() for name, make in CHECKS.items() if name != "build"]
    return Provenance(
        _command(),
        datetime.now(timezone.utc).isoformat(" ", "seconds").removesuffix("+00:00"),
        target,
        _device(compiled, target),
        torch.get_num_threads(),
        _dtypes(compiled),
        versions(),
        (*checks, *check_extras()),
    )


def _command() -> str:
    program, *arguments = sys.argv or [""]
    name = Path(program).name
    if "ipykernel" in name:
        return ""
    return shlex.join(["turbotx" if name == "__main__.py" else name, *arguments])


def _device(compiled: Compiled, target: str) -> str:
    if target == "cpu":
        return processor_name()
    program = compiled.program
    if isinstance(program, CudaGraphProgram) and program.runtime.torch_device.type == "cuda":
        return program.runtime.device.describe()
    return f"{target}, which is not here; compiled on {processor_name()}"


def _dtypes(compiled: Compiled) -> str:
    counted: Counter[str] = Counter()
    for _, tensor in compiled.program.runtime.weights.owned():
        if tensor.is_floating_point():
            counted[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return ", ".join(name for name, _ in counted.most_common())
