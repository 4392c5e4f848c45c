"""A saved program on a GPU: kernels from cubins, chosen by tables; decides and compiles nothing.

In: the tables of `saved.describe_gpu`, the kernels of one target, a device. Out: the outputs of a
call, plain or as a replayed graph, as `graphed.GraphedProgram` would give them::

    variants = read_variants("sm_90", entries)
    program = SavedGpuProgram(tables, SavedGpuRuntime(tables, variants, weights, device), pool)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from turbotx.errors import BuildWarning, SavedFileError
from turbotx.kernels.job import Binary, Job
from turbotx.memory.pool import ChunkPool
from turbotx.runtime.cuda.arguments import ArgumentLayout
from turbotx.runtime.cuda.cuda_graphs import CudaGraphCall, GraphCache, Inputs
from turbotx.runtime.cuda.library_gemm import Call, make_gemm
from turbotx.runtime.cuda.queue import CudaQueue, Queued
from turbotx.runtime.cuda.settings import uses_tf32
from turbotx.runtime.device import Device
from turbotx.runtime.executable import Binding
from turbotx.runtime.state import RunState, Step
from turbotx.runtime.watch import Watch
from turbotx.runtime.weights import Weights
from turbotx.saved.families import SavedFamily
from turbotx.saved.program import SavedProgram
from turbotx.saved.steps import make_step, window_of
from turbotx.saved.values import compile_texts, decode_constant


def variants_entry(target: str) -> str:
    """Return the name of the entry that lists a target's kernels."""
    return f"gpu-{target}.json"


def describe_binary(binary: Binary) -> dict[str, Any]:
    """Return all of a kernel but its machine code."""
    return {
        "name": binary.name, "entry": binary.entry, "threads": binary.threads,
        "arguments": binary.arguments, "shared_nbytes": binary.shared_nbytes, "pdl": binary.pdl,
        "cubin": image_entry(binary),
    }  # fmt: skip


def image_entry(binary: Binary) -> str:
    return f"cubins/{binary.digest[:32]}.cubin"


def describe_job(job: Job) -> dict[str, Any]:
    """Return a kernel that is not in the file as machine code: what it is compiled from."""
    return {
        "name": job.name, "source": job.source, "signature": job.signature,
        "constexprs": job.constexprs, "divisible": job.divisible, "num_warps": job.num_warps,
        "num_stages": job.num_stages, "pdl": job.pdl,
    }  # fmt: skip


def read_variants(target: str, entries: Mapping[str, bytes]) -> list[Binary | Job]:
    """Return the kernels of a file's target, in the order in which programs number them."""
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
    """A kernel that is in the file as source only was needed where nothing can compile it."""


class SavedGpuRuntime(CudaQueue):
    """Launches from a file's tables and kernels."""

    def __init__(
        self, tables: Mapping[str, Any], variants: Sequence[Binary | Job], weights: Weights,
        device: Device,
    ) -> None:  # fmt: skip
        dims, place = tables["dims"], device.torch_device
        saved = [SavedFamily.of(t, variants) for t in tables["families"]]
        gemms: dict[int, tuple[Callable[[RunState], Call], bool]] = {}
        families: dict[int, SavedFamily] = {}
        steps: dict[int, Step] = {}
        for i, launch in enumerate(tables["launches"]):
            if launch["family"] is not None:
                families[i] = saved[launch["family"]]
            if "aten" in launch:
                steps[i] = make_step(launch["aten"], dims, place)
            if "gemm" in launch:
                gemms[i] = (_read_gemm(launch["gemm"], dims), launch["gemm"]["fixed"])
        layouts = {
            (i, which): ArgumentLayout(tuple((a, b) for a, b in pointers), cell, tuple(sizes))
            for i, which, pointers, cell, sizes in tables["layouts"]
        }
        weight_slots = tables["weights"]["slots"]
        queued = Queued(
            families, layouts, gemms, steps, tables["checks"], weight_slots,
            tables["slot_count"], len(tables["values"]), tables["turns"], tables["depends"],
        )  # fmt: skip
        super().__init__(device, weights, queued)
        # All at once: no stream of shapes, and no capture of the caller's, loads one later.
        self.load([b for family in saved for b in family.binaries(uses_tf32())])

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


def _read_gemm(gemm: Mapping[str, Any], dims: Sequence[str]) -> Callable[[RunState], Call]:
    x, weight, bias, out = gemm["windows"]
    biases = None if bias is None else window_of(bias, dims)
    looks = (window_of(x, dims), window_of(weight, dims), biases, window_of(out, dims))
    return make_gemm(*looks, gemm["relu"])


class SavedGpuProgram(CudaGraphCall, SavedProgram):
    """One compiled call on a GPU, or a part of its shapes."""

    runtime: SavedGpuRuntime

    def __init__(
        self,
        tables: Mapping[str, Any],
        runtime: SavedGpuRuntime,
        pool: ChunkPool,
        graphs: GraphCache,
    ) -> None:
        SavedProgram.__init__(self, tables, runtime, pool)
        self.runtime = runtime
        extents = compile_texts(tables["input_extents"], self.dims)
        kinds = [(rank, decode_constant(dtype)) for rank, dtype in tables["input_kinds"]]
        self.keep_graphs(graphs, Inputs(extents, kinds))
        share = tables["share"]
        self._tokens = None if share is None else compile_texts(share[0], self.dims)
        self._ends: Sequence[tuple[int, int | None]] = () if share is None else share[1]

    @property
    def builds(self) -> int:
        return self.runtime.builds

    def serves(self, dims: Sequence[int]) -> bool:
        if self._tokens is None:
            return True
        tokens = max(self._tokens(*dims))
        return any(
            least < tokens and (most is None or tokens <= most) for least, most in self._ends
        )

    def run(
        self, binding: Binding, tensors: Sequence[torch.Tensor], ticks: Any = None,
        watch: Watch | None = None,
    ) -> list[Any]:  # fmt: skip
        try:
            return super().run(binding, tensors, ticks, watch)
        except NoVariantError as error:
            shown = ", ".join(f"{n}={v}" for n, v in zip(self.dims, binding.dims, strict=True))
            raise SavedFileError(f"a call of {shown} cannot run: {error}") from error
