"""`turbotx tune`: finds the fastest schedules of a model's kernels on this GPU and stores them.

In: MODEL and shapes. Out: a table of the gains; schedules stored for devices of this name, which
all later programs on such devices use::

    turbotx tune minilm --shape batch=1,seq=40 --shape batch=32,seq=128 --dtype float16
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.utils._pytree as pytree
from rich.table import Column, Table

import turbotx.report as reports
from turbotx.cli.inputs import EXAMPLE_SHAPE, parse_shape, resize
from turbotx.cli.models import Source
from turbotx.cli.output import OK, Output
from turbotx.engine.compiled import Compiled
from turbotx.engine.tune import TuningResult, gains, tune_call, tune_norms
from turbotx.kernels.tuned import save_tuned
from turbotx.report.amounts import show_shape
from turbotx.report.report import Report
from turbotx.report.table import right, titled_table
from turbotx.runtime.cuda.cuda_graphs import CudaGraphProgram
from turbotx.runtime.cuda.device import require_cuda, require_triton


def tune_model(model: Source, shapes: Sequence[str], output: Output) -> int:
    """Tune every shape, store and print what is faster; raise DeviceError if there is no GPU."""
    require_cuda()
    require_triton()
    wanted = [parse_shape(text) for text in shapes]
    found: list[TuningResult] = []
    with output.steps(f"load {model}", total=3 + max(1, len(wanted))) as steps:
        loaded = model.load({**EXAMPLE_SHAPE, **(wanted[0] if wanted else {})})
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda x: x.cuda(), (loaded.args, loaded.kwargs)
        )
        steps("capture, fuse and build")
        report = reports.explain(loaded.model.cuda(), *args, **kwargs)
        device = _describe_device(report.compiled)
        for dims, tensors, shown in _calls(report, wanted, args, kwargs):
            steps(f"time kernels at {shown}")
            found += tune_call(report.compiled, dims, tensors)
        file = save_tuned(device, gains(found))
        steps("time folded norms")
        report = reports.explain(loaded.model, *args, **kwargs)  # with the tuned tiles
        for dims, tensors, _ in _calls(report, wanted, args, kwargs):
            found += tune_norms(report.compiled, dims, tensors)
        save_tuned(device, gains(found))
    output.console.print(found_table(device, found))
    output.console.print(f"kept in {file}")
    output.result({"device": device, "file": str(file), "kernels": [asdict(f) for f in found]})
    return OK


def _describe_device(compiled: Compiled) -> str:
    assert isinstance(compiled.program, CudaGraphProgram)
    return compiled.program.runtime.device.describe()


def _calls(
    report: Report, wanted: Sequence[dict[str, int]], args: Any, kwargs: Any
) -> Iterator[tuple[tuple[int, ...], list[torch.Tensor], str]]:
    """Yield the dims and tensors of each requested shape, and the shape as text."""
    for view in [report.at(**dims) for dims in wanted] or [report]:
        leaves = pytree.tree_leaves(resize(view, args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        dims = report.compiled.captured.matcher.match([t.shape for t in tensors])
        assert dims is not None
        yield dims, tensors, show_shape(view.dims)


def found_table(device: str, found: Sequence[TuningResult]) -> Table:
    """Tabulate tuned kernels: schedule and microseconds per launch, before and after."""
    kernel = Column("kernel", overflow="fold", min_width=24)
    numbers = right("length", "before", "best", "before µs", "best µs", "tried")
    table = titled_table(f"Kernels on {device}", kernel, *numbers)
    for f in found:
        table.add_row(
            f.kernel, str(f.length), f.before, f.best, f"{f.before_us:.2f}",
            f"{f.best_us:.2f}", str(f.tried),
        )  # fmt: skip
    return table
