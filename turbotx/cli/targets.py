"""Targets of `turbotx compile`: the Triton kernels built for GPUs that need not be there.

In: a report, names such as sm_90, a folder. Out: kernels/TARGET/ with every artifact, and
resources.json with registers, spills and access widths of every kernel::

    kernels/sm_90/fused_add_gelu_0.ptx, .cubin, .ttir, ..., resources.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.table import Table

from turbotx import ir
from turbotx.engine.pipeline import Compiled
from turbotx.errors import InputError
from turbotx.ir.expr import evaluate
from turbotx.kernels.fusion.epilogue import find_epilogues
from turbotx.kernels.fusion.norm_folding import find_folds
from turbotx.kernels.gemm_heuristics import choose_tiles, gemm_job
from turbotx.kernels.job import Job
from turbotx.kernels.launch_jobs import launch_job
from turbotx.kernels.schedule_selector import Tiles
from turbotx.kernels.triton.compiler import TARGETS, Built, build
from turbotx.kernels.triton.gemm_template import GemmTemplate
from turbotx.kernels.triton.resources import Resources
from turbotx.passes.partition import kind_of
from turbotx.program.assemble import assemble
from turbotx.program.fold_norms import assemble_folded
from turbotx.report.dump import make_folder
from turbotx.report.report import Report
from turbotx.runtime.cuda.dispatch import share_calls
from turbotx.runtime.cuda.gemm import make_template


def parse_targets(names: Sequence[str]) -> list[str]:
    """Return the GPU targets among `names`, each once; raise InputError for an unknown one."""
    for name in names:
        if name not in TARGETS and name != "cpu":
            raise InputError(f"--target {name!r} is not one of cpu, {', '.join(TARGETS)}")
    return [n for n in dict.fromkeys(names) if n != "cpu"]


def build_targets(
    report: Report, targets: Sequence[str], folder: Path, progress: Callable[[str], None]
) -> tuple[list[Built], list[Path]]:
    """Build every generated kernel and GEMM for every target; return what was built and the files.

    Schedules are those for the report's shape. Raises BuildError with the compiler's words.
    """
    jobs = [job for target in targets for job in make_jobs(report, target)]
    jobs += [job for target in targets for job in make_gemm_jobs(report, target)]
    built = build(jobs, workers=2, progress=lambda done, total, what: progress(what))
    files: list[Path] = []
    for target in targets:
        chosen = [b for b in built if b.job.target == target]
        place = make_folder(folder / "kernels" / target)
        for b in chosen:
            for kind, path in b.files.items():
                # Other sources stand beside the folder.
                if kind != "py" or b.job.name.startswith("gemm_"):
                    files.append(Path(shutil.copy(path, place / f"{b.job.name}.{kind}")))
        table = place / "resources.json"
        found = {b.job.name: asdict(b.resources) for b in chosen}
        table.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        files.append(table)
    return built, files


def resources_of(built: Sequence[Built]) -> dict[str, dict[str, Resources]]:
    """Return kernel -> target -> what it uses there."""
    found: dict[str, dict[str, Resources]] = {}
    for b in built:
        found.setdefault(b.job.name, {})[b.job.target] = b.resources
    return found


def make_jobs(report: Report, target: str) -> Iterator[Job]:
    """One job a generated kernel, named as in the report."""
    first = {report.function_of(x): x for x in reversed(report.compiled.assembly.launches)}
    for kernel in report.kernels:
        job = launch_job(first[kernel.name], target, report.dims, kernel.name)
        if job is not None:
            yield job


def make_gemm_jobs(report: Report, target: str) -> Iterator[Job]:
    """One job a GEMM with epilogue and norm, as a GPU program launches it at the report's shape.

    Whether it takes these or the library's GEMM and a kernel is decided when it binds a shape.
    """
    made: set[GemmTemplate] = set()
    left_by: dict[str, GemmTemplate] = {}
    for launch in _find_launches(report.compiled, report.dims, target):
        template = make_template(launch) if isinstance(launch, ir.GemmLaunch) else None
        if template is None or not isinstance(launch, ir.GemmLaunch):
            continue
        left_by |= dict.fromkeys(launch.writes[1:], template)
        if template in made:
            continue
        made.add(template)
        rows, row = (evaluate(e, report.dims) for e in (launch.rows, launch.x_stride))
        down = int(launch.weight.strides[template.flipped])
        even = {"x_row": row, "w_row": down, "out_row": template.n, "residual_row": template.n}
        divisible = [name for name, size in even.items() if size % 16 == 0]
        norm = launch.norm or ir.NormOperands()
        read = (norm.x_stats, norm.residual_stats)
        x_tile, residual_tile = (
            0 if a is None else choose_tiles(left_by[a.tensor], rows, target).n_tile for a in read
        )
        tiles = choose_tiles(template, rows, target)
        tiles = replace(tiles, stat_tile=x_tile, residual_tile=residual_tile)
        yield gemm_job(template, target, tiles, divisible)


def _find_launches(compiled: Compiled, dims: Mapping[str, int], target: str) -> list[ir.Launch]:
    """Return the launches of a GPU program at these dims: of the one with norms folded, if that is
    what the heuristics take there."""
    kinds = {n: kind_of(n, compiled.prepared) for n in compiled.graph.nodes}
    epilogues = find_epilogues(compiled.fused, kinds)
    given = (compiled.graph, compiled.fused, compiled.prepared, compiled.captured.dims, epilogues)
    stored, folds = assemble(*given), find_folds(compiled.fused, kinds, epilogues)
    if folds:
        _, folded, _ = assemble_folded(*given, folds)
        tiles = Tiles((), target, {})
        _, share = share_calls([stored, folded], compiled.captured.dims, tiles)
        if share is not None and share.holds([dims[name] for name in compiled.captured.dims]):
            return folded.launches
    return stored.launches


def resources_table(built: Sequence[Built]) -> Table:
    """Registers a thread, spills, shared memory and the widest accesses of each kernel."""
    table = Table(title="On GPUs", title_justify="left", title_style="bold")
    table.caption, table.caption_justify = "shared: bytes; load, store: widest, in bits", "left"
    table.add_column("kernel", overflow="fold", min_width=24)
    table.add_column("target")
    for name in ("regs", "spills", "shared", "load", "store"):
        table.add_column(name, justify="right")
    for b in built:
        r = b.resources
        numbers = (r.registers, r.spills, r.shared_nbytes, r.load_bits, r.store_bits)
        table.add_row(b.job.name, b.job.target, *map(str, numbers))
    return table
