"""The kernels of a saved GPU program: cubins, selected by tables; nothing is compiled.

In: the entries of a file, a device. Out: kernels in the order of their indices, and a queue that
launches them as `CudaRuntime` does those that it compiles::

    variants = read_variants("sm_90", entries)
    SavedQueue(executable, [SavedFamily.of(t, variants) for t in families], weights, device)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from turbotx.errors import BuildWarning, SavedFileError
from turbotx.kernels.job import Binary, Job
from turbotx.program.executable import Executable
from turbotx.runtime.cuda.queue import CudaQueue
from turbotx.runtime.cuda.settings import uses_tf32
from turbotx.runtime.device import Device
from turbotx.runtime.weights import Weights
from turbotx.saved.families import SavedFamily


def variants_entry(target: str) -> str:
    """Return the name of the entry that lists a target's kernels."""
    return f"gpu-{target}.json"


def image_entry(binary: Binary) -> str:
    """Return the path of a kernel's cubin in the file."""
    return f"cubins/{binary.digest[:32]}.cubin"


_NOT_WRITTEN = {"target", "image", "before_wait", "cells", "contracts"}


def describe_kernel(kernel: Binary | Job) -> dict[str, Any]:
    """Return a kernel for JSON: one as machine code without that, which is an entry of its own, or
    one as source."""
    names = [f.name for f in fields(kernel) if f.name not in _NOT_WRITTEN]
    found = {name: getattr(kernel, name) for name in names}
    return found | ({"cubin": image_entry(kernel)} if isinstance(kernel, Binary) else {})


def read_variants(target: str, entries: Mapping[str, bytes]) -> list[Binary | Job]:
    """Return the kernels of a file's target, in the order of their indices."""
    found: list[Binary | Job] = []
    for one in json.loads(entries[variants_entry(target)]):
        if "cubin" in one:
            given = {k: v for k, v in one.items() if k != "cubin"}
            found.append(Binary(target=target, image=entries[one["cubin"]], **given))
        else:
            pairs = ("signature", "constexprs")
            given = {k: tuple(map(tuple, v)) if k in pairs else v for k, v in one.items()}
            given["divisible"] = tuple(one["divisible"])
            found.append(Job(target=target, **given))
    return found


class NoVariantError(SavedFileError):
    """A kernel that the file only has as source was needed, and cannot be compiled here."""


class SavedQueue(CudaQueue):
    """Launches with the kernels of a file, which are loaded all at once."""

    def __init__(
        self, executable: Executable, families: Sequence[SavedFamily], weights: Weights,
        device: Device,
    ) -> None:  # fmt: skip
        super().__init__(executable, families, weights, device)
        # Loaded now, so that no new shape, and no graph capture of the caller's, loads one later.
        self.load([b for family in families for b in family.binaries(uses_tf32())])

    def _obtain(self, jobs: Sequence[Any]) -> Sequence[Any]:
        binaries = [job for job in jobs if isinstance(job, Binary)]
        sources = [job for job in jobs if isinstance(job, Job)]
        loaded = dict(zip(map(id, binaries), self.device.place(binaries), strict=True))
        if sources:
            loaded |= dict(zip(map(id, sources), self._build(sources), strict=True))
        return [loaded[id(job)] for job in jobs]

    def _build(self, jobs: Sequence[Job]) -> Sequence[Any]:
        names = ", ".join(dict.fromkeys(job.name for job in jobs))
        why = f"{names} counts in 64 bits at these sizes, and the file has its source only"
        try:
            functions, compiled = self.device.load(jobs)
        except ImportError as error:
            raise NoVariantError(
                f"{why}: install Triton and SymPy to have it built here, or run fewer tokens at a "
                f"time ({error})"
            ) from error
        self.builds += compiled
        warnings.warn(f"{why}: it was built, and is kept in the cache", BuildWarning, stacklevel=2)
        return functions
