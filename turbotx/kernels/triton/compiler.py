"""Compiler: compiles kernels with Triton for GPUs, which need not be present.

In: jobs (a printed kernel, a schedule, a target). Out: for each a folder of artifacts (TTIR, PTX or
AMD assembly, cubin or hsaco) and its `Resources`, cached on disk by digest, built in parallel::

    built = build([kernel_job(kernel, schedule, "sm_90")])
    built[0].files["cubin"], built[0].resources.registers
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbotx import ir
from turbotx.errors import BuildError
from turbotx.kernels.build import cache_directory, write_whole
from turbotx.kernels.fusion.inplace import find_inplace
from turbotx.kernels.fusion.inplace_check import check_inplace
from turbotx.kernels.job import Binary, Job, read_entry
from turbotx.kernels.schedule import Schedule, choose_schedule, outer_axes, vector_axes
from turbotx.kernels.triton.printer import print_triton
from turbotx.kernels.triton.resources import Resources, read_amdgcn, read_cubin

# name: (backend, architecture, threads in a warp)
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def target_of(name: str) -> tuple[str, int | str, int]:
    """Return backend, architecture and warp size of a target; any NVIDIA "sm_NN" is accepted.
    Raises BuildError for an unknown name."""
    if name in TARGETS:
        return TARGETS[name]
    if name.startswith("sm_") and name[3:].isdigit():
        return "cuda", int(name[3:]), 32
    raise BuildError(f"{name!r} is not a target: use one of {', '.join(TARGETS)}, or another sm_NN")


POINTEES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A compiled job: files by kind ("ttir", "ptx", "cubin", …) and resources.

    shared_nbytes: dynamic shared memory of a launch. cached: whether it was read from disk.
    scratch_nbytes: global scratch memory that the launcher would have to provide per program.
    """

    job: Job
    files: dict[str, Path]
    shared_nbytes: int
    cached: bool
    scratch_nbytes: int = 0

    @functools.cached_property
    def resources(self) -> Resources:
        """Resources from the disassembled machine code, computed at first access and cached on
        disk."""
        kept = _folder(self.job) / "resources.json"
        if not kept.exists():
            measured = _measure(self.job, kept.parent, self.shared_nbytes)
            write_whole(kept, json.dumps(dataclasses.asdict(measured)))
        return Resources(**json.loads(kept.read_text()))

    def binary(self) -> Binary:
        """Return the machine code with its launch parameters; raise BuildError for unknown PTX."""
        job, ptx = self.job, self.files["ptx"]
        entry, threads, arguments = read_entry(ptx.read_text())
        if arguments < job.taken:
            raise BuildError(
                f"{job.name} was compiled to {arguments} arguments, not {job.taken}: {ptx}"
            )
        if self.scratch_nbytes:
            raise BuildError(
                f"{job.name} needs {self.scratch_nbytes} bytes of global scratch memory a program, "
                "which turbotx does not provide: choose other tiles for it (option schedules), and "
                "unset what instruments kernels, as TRITON_INSTRUMENTATION_MODE does"
            )
        image = self.files["cubin"].read_bytes()
        return Binary(
            job.name, job.target, entry, threads, arguments, self.shared_nbytes, image, job.pdl
        )


def kernel_job(
    kernel: ir.Kernel,
    target: str,
    schedule: Schedule | None = None,
    divisible: Iterable[str] = (),
    cells: tuple[str, ...] = (),
) -> Job:
    """Return the job for a kernel.

    divisible: sizes that are multiples of 16. cells: sizes read from device memory. Raises
    VerifyError if in-place reuse would be wrong for the printed source.
    """
    schedule = schedule or choose_schedule(kernel)
    source = print_triton(kernel, schedule)
    loops = [a.name for a in kernel.axes if a.extent != 1]
    pairs = [(f"{out}_ptr", f"{given}_ptr") for out, given in find_inplace(kernel)]
    check_inplace(kernel.name, source, loops, pairs)
    pointers = [(f"{p.name}_ptr", f"*{POINTEES[p.dtype]}") for p in kernel.params]
    aligned = tuple(name for name, _ in pointers)
    if any(isinstance(s, ir.Check) for s in kernel.body):
        pointers.append(("status_ptr", "*i32"))  # one of several words: only 4-byte aligned
    sizes = [(name, "i64" if schedule.wide else "i32") for name in kernel.sizes]
    tiles = []
    if outer_axes(kernel) and schedule.rows > 1:
        tiles.append(("ROWS", schedule.rows))
    if vector_axes(kernel):
        tiles.append(("COLS", schedule.cols))
    return Job(
        name=kernel.name,
        source=source,
        target=target,
        signature=(*pointers, *sizes, *((name, "constexpr") for name, _ in tiles)),
        constexprs=tuple(tiles),
        divisible=(*aligned, *(n for n in kernel.sizes if n in divisible)),
        num_warps=fit_warps(schedule.num_warps, target),
        cells=cells,
        contracts=False,  # the same op must round equally in all kernels
    )


def fit_warps(num_warps: int, target: str) -> int:
    """Return the number of warps with the same number of threads, for targets with 64 per warp."""
    backend, _, width = target_of(target)
    return max(1, num_warps * 32 // width) if backend == "hip" else num_warps


def build(
    jobs: Sequence[Job],
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    measure: bool = True,
) -> list[Built]:
    """Compile `jobs`, each once, in `workers` processes (the machine's cores by default).

    progress(done, total, what): called after each. measure: also disassemble the machine code.
    Raises BuildError with the compiler's message.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    unique = {job.digest(): job for job in jobs}
    found: dict[str, Built] = {}
    failures: list[str] = []
    lock = threading.Lock()

    def done(digest: str, result: Built | None, error: str = "") -> None:
        with lock:
            if result is not None:
                found[digest] = result
            else:
                failures.append(error)
            if progress:
                job = unique[digest]
                progress(len(found) + len(failures), len(unique), f"{job.name} for {job.target}")

    for digest, job in unique.items():
        if (_folder(job) / "result.json").exists():
            done(digest, _load(job, cached=True))
        else:
            waiting.put(job)
    count = min(waiting.qsize(), workers or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, count), thread_name_prefix="turbotx-triton") as pool:
        for drained in [pool.submit(_drain, waiting, done, measure) for _ in range(count)]:
            drained.result()
    if failures:
        raise BuildError("\n".join(failures[:3]))
    return [found[job.digest()] for job in jobs]


def _drain(waiting: queue.SimpleQueue[Job], done: Callable[..., None], measure: bool) -> None:
    """Run jobs in one compiler process until the queue is empty."""
    path = Path(__file__).with_name("worker.py")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0"}
        process = subprocess.Popen(
            [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True, env=environment,
        )  # fmt: skip
        try:
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    built = compile_job(job, process)
                    if measure:
                        built.resources  # noqa: B018
                    done(job.digest(), built)
                except Exception as error:
                    log.seek(0)
                    tail = log.read()[-2000:]
                    done(job.digest(), None, f"{job.name} for {job.target}: {error}\n{tail}")
        finally:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):  # the process ended while the job was written to it
                process.stdin.close()
            process.stdout.close()
            process.wait()


def _folder(job: Job) -> Path:
    return cache_directory() / "triton" / f"{job.name}-{job.target}-{job.digest()}"


def compile_job(job: Job, process: subprocess.Popen[str]) -> Built:
    """Compile a job in `process` and move its artifacts into place atomically. Raises BuildError
    with Triton's message and the source on failure."""
    assert process.stdin is not None and process.stdout is not None
    folder = _folder(job)
    folder.parent.mkdir(parents=True, exist_ok=True)
    out = Path(tempfile.mkdtemp(dir=folder.parent))
    source = out / f"{job.name}.py"
    source.write_text(job.source)
    request: dict[str, Any] = {
        "path": str(source),
        "name": job.name,
        "signature": dict(job.signature),
        "constexprs": dict(job.constexprs),
        "divisible": job.divisible,
        "target": target_of(job.target),
        "options": {
            "num_warps": job.num_warps, "num_stages": job.num_stages,
            "enable_fp_fusion": job.contracts,
        },
        "out": str(out),
    }  # fmt: skip
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline() or '{"error": "the compiler process ended"}')
        if "error" in answer:
            raise BuildError(f"Triton could not compile it:\n{answer['error']}\n{job.source}")
        (out / "result.json").write_text(json.dumps(answer))
        try:
            os.rename(out, folder)
        except OSError:  # another process has built it
            if not (folder / "result.json").exists():
                raise
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return _load(job, cached=False)


def _measure(job: Job, folder: Path, shared_nbytes: int) -> Resources:
    if target_of(job.target)[0] == "cuda":
        return read_cubin(folder / f"{job.name}.cubin", shared_nbytes)
    return read_amdgcn((folder / f"{job.name}.amdgcn").read_text(), shared_nbytes)


def _load(job: Job, cached: bool) -> Built:
    folder = _folder(job)
    kept = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix != ".json"]
    files = {p.suffix[1:]: p for p in kept}
    answer = json.loads((folder / "result.json").read_text())
    # Cached results without this field are of kernels without scratch.
    scratch = answer.get("scratch_nbytes", 0)
    return Built(job, files, answer["shared_nbytes"], cached, scratch)
