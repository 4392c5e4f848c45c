"""Targets of `turbotx compile`: builds the Triton kernels for GPUs that need not be present.

In: a call, names such as sm_90, a folder. Out: kernels/TARGET/ with every artifact of the kernels
that a GPU launches at one shape, and resources.json with their registers, spills and access
widths::

    kernels/sm_90/gemm_float16_1536x384_layer_norm_bias_gelu.ptx, .cubin, .py, ..., resources.json
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Column, Table

from turbotx.cli.output import Steps
from turbotx.engine.engine import Engine
from turbotx.engine.pipeline import jobs
from turbotx.errors import InputError
from turbotx.kernels.job import Job
from turbotx.kernels.triton.compiler import TARGETS, Built, build
from turbotx.kernels.triton.resources import Resources
from turbotx.report.dump import make_folder
from turbotx.report.report import Report
from turbotx.report.table import right, titled_table
from turbotx.runtime.cpu.launch_table import kernel_key
from turbotx.runtime.cuda.runtime import LaunchJob


@dataclass(frozen=True)
class NamedJob:
    """A kernel of a target's program, with a unique name."""

    name: str
    job: Job


@dataclass(frozen=True)
class NamedBuild:
    """A built kernel."""

    name: str
    built: Built


def parse_targets(names: Sequence[str]) -> list[str]:
    """Return the GPU targets among `names` without duplicates; raise InputError for an unknown
    one."""
    for name in names:
        if name not in TARGETS and name != "cpu":
            raise InputError(f"--target {name!r} is not one of cpu, {', '.join(TARGETS)}")
    return [n for n in dict.fromkeys(names) if n != "cpu"]


def find_jobs(report: Report, engine: Engine, targets: Sequence[str]) -> list[NamedJob]:
    """Return the kernels that the call of a report launches on every target, at the report's
    shape."""
    dims, found = tuple(report.dims.values()), list[NamedJob]()
    for target in targets:
        compiled = report.compiled
        if target != report.target:
            compiled = engine.compile(compiled.captured, target)
        found += name_jobs(report, jobs(compiled.unbound, dims))
    return found


def name_jobs(report: Report, launched: Iterable[LaunchJob]) -> list[NamedJob]:
    """Return every kernel once, named by its function in the report, or by its own name."""
    found: dict[str, Job] = {}
    seen: set[str] = set()
    for x in launched:
        digest = x.job.digest()
        if digest not in seen:
            seen.add(digest)
            base = report.view.functions.get(kernel_key(x.launch), x.job.name)
            more = (f"{base}_{k}" for k in itertools.count(1))
            found[next(n for n in itertools.chain([base], more) if n not in found)] = x.job
    return [NamedJob(name, job) for name, job in found.items()]


def build_jobs(named: Sequence[NamedJob], steps: Steps) -> list[NamedBuild]:
    """Build kernels; raise BuildError with the compiler's output."""
    done = build([n.job for n in named], workers=2, progress=lambda done, total, what: steps(what))
    return [NamedBuild(n.name, b) for n, b in zip(named, done, strict=True)]


def write_builds(built: Sequence[NamedBuild], folder: Path) -> list[Path]:
    """Copy build artifacts into kernels/TARGET/; return the files."""
    files: list[Path] = []
    targets = dict.fromkeys(b.built.job.target for b in built)
    for target in targets:
        chosen = [b for b in built if b.built.job.target == target]
        place = make_folder(folder / "kernels" / target)
        for b in chosen:
            for kind, path in b.built.files.items():
                files.append(Path(shutil.copy(path, place / f"{b.name}.{kind}")))
        table = place / "resources.json"
        found = {b.name: asdict(b.built.resources) for b in chosen}
        table.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        files.append(table)
    return files


def resources_of(built: Sequence[NamedBuild]) -> dict[str, dict[str, Resources]]:
    """Return kernel -> target -> its resources there."""
    found: dict[str, dict[str, Resources]] = {}
    for b in built:
        found.setdefault(b.name, {})[b.built.job.target] = b.built.resources
    return found


def resources_table(built: Sequence[NamedBuild]) -> Table:
    """Tabulate registers per thread, spills, shared memory and the widest accesses of each
    kernel."""
    kernel = Column("kernel", overflow="fold", min_width=24)
    columns = right("regs", "spills", "shared", "load", "store")
    table = titled_table("On GPUs", kernel, "target", *columns)
    table.caption, table.caption_justify = "shared: bytes; load, store: widest, in bits", "left"
    for b in built:
        r = b.built.resources
        numbers = (r.registers, r.spills, r.shared_nbytes, r.load_bits, r.store_bits)
        table.add_row(b.name, b.built.job.target, *map(str, numbers))
    return table
