"""`turbotx bench`: measures a model at some shapes with every engine that is installed.

In: MODEL, shapes, engines, rounds. Out: a table of medians in ms with their spread, the fastest in
bold, and the engines that failed with reasons; a JSON object with --json::

    turbotx bench minilm --shape batch=1,seq=40 --engine turbotx --engine eager
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import turbotx.report as reports
from turbotx.cli.bench.engines import ASKED_FOR, ENGINES
from turbotx.cli.bench.runner import (
    QUIET_CORES,
    CallPattern,
    OthersUse,
    Runner,
    Spread,
    describe_machine,
)
from turbotx.cli.inputs import EXAMPLE_SHAPE, parse_shape, resize
from turbotx.cli.models import Source
from turbotx.cli.output import OK, Output
from turbotx.engine.optimize import optimize
from turbotx.errors import InputError
from turbotx.report.amounts import show_shape


def bench_model(
    source: Source, shapes: Sequence[str], engines: Sequence[str], load: CallPattern, output: Output
) -> int:
    """Measure and print the results; return the exit code. Raises InputError for an unknown
    engine."""
    unknown = [e for e in engines if e not in ENGINES]
    if unknown:
        raise InputError(f"--engine {unknown[0]}: use one of {', '.join(ENGINES)}")
    wanted = [parse_shape(text) for text in shapes] or [{}]
    saved = source.is_saved
    usual = ["turbotx"] if saved else [e for e in ENGINES if e not in ASKED_FOR]
    chosen = list(engines or usual)
    threads = load.threads or torch.get_num_threads()
    total = 1 + len(chosen) + len(wanted)
    with (
        tempfile.TemporaryDirectory() as folder,
        output.steps(f"load {source}", total=total) as steps,
    ):
        files = write_inputs(source, wanted, Path(folder))
        rows: list[dict[str, Any]] = []
        with Runner(chosen, source, threads, lambda name: steps(f"start {name}")) as runner:
            ready = {e: round(w.ready_s or 0.0, 3) for e, w in runner.workers.items()}
            for dims, file in files:
                steps(show_shape(dims))
                with OthersUse(runner) as others:
                    found = runner.measure(file, load)
                rows.append({"dims": dims, "others_cores": others.cores, "engines": found})
            failed = runner.failed
    at_once = f", {load.streams} streams" if load.streams > 1 else ""
    counted = f"{threads} thread{'' if threads == 1 else 's'}"
    output.console.print(f"{source}, {counted}{at_once}")
    output.console.print(latency_table(rows))
    output.console.print(throughput_table(rows))
    busy = max(r["others_cores"] for r in rows)
    if busy > QUIET_CORES:
        output.console.print(f"others used {busy:.1f} of the cores meanwhile: measure again")
    for engine, why in failed.items():
        output.console.print(f"without {engine}: {why}", markup=False)
    shown = [{**r, "engines": {e: asdict(s) for e, s in r["engines"].items()}} for r in rows]
    output.result({
        "model": str(source), "load": asdict(load), "machine": describe_machine(threads),
        "rows": shown, "ready_s": ready, "failed": failed,
    })  # fmt: skip
    return OK


def write_inputs(
    source: Source, shapes: Sequence[Mapping[str, int]], folder: Path
) -> list[tuple[dict[str, int], Path]]:
    """Write one call's inputs at every shape to files that all engines read; return (dims, file)
    pairs."""
    if source.is_saved:
        return [_write_saved(source, dims, folder / f"{k}.pt") for k, dims in enumerate(shapes)]
    loaded = source.load(EXAMPLE_SHAPE)
    compiled = optimize(loaded.model, backend="aten")
    report = reports.explain(compiled, *loaded.args, **loaded.kwargs)
    files = []
    for k, dims in enumerate(shapes):
        view = report.at(**dims)
        file = folder / f"inputs_{k}.pt"
        torch.save(resize(view, loaded.args, loaded.kwargs), file)
        files.append((dict(view.dims), file))
    return files


def _write_saved(
    source: Source, dims: Mapping[str, int], file: Path
) -> tuple[dict[str, int], Path]:
    """Write inputs for a saved file, which has no graph to derive other sizes from."""
    shape = {**EXAMPLE_SHAPE, **dims}
    loaded = source.load(shape)
    torch.save((loaded.args, loaded.kwargs), file)
    return shape, file


def throughput_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate engines and shapes: percentiles, and calls and sequences per second."""
    table = Table(caption="ms; sequences: calls times the batch", caption_justify="left")
    for name in ("engine", "shape"):
        table.add_column(name, no_wrap=name == "engine")
    for name in ("p50", "p90", "p95", "p99", "calls", "calls/s", "sequences/s"):
        table.add_column(name, justify="right")
    for row in rows:
        for engine, s in row["engines"].items():
            times = (f"{x:.2f}" for x in (s.median_ms, s.high_ms, s.p95_ms, s.p99_ms))
            rate = s.calls_per_s
            batch = row["dims"].get("batch")
            answered = "-" if batch is None else f"{rate * batch:.1f}"
            table.add_row(
                engine, show_shape(row["dims"]), *times, str(s.runs), f"{rate:.1f}", answered
            )
    return table


def latency_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate one row per engine, one column per shape, with the fastest real engine of each in
    bold."""
    table = Table(caption="ms: median (tenths at both ends)", caption_justify="left")
    table.add_column("engine", no_wrap=True)
    for row in rows:
        table.add_column("\n".join(f"{k}={v}" for k, v in row["dims"].items()), justify="right")
    fastest = [
        min(
            (s.median_ms for e, s in row["engines"].items() if not e.startswith("floor")), default=0
        )
        for row in rows
    ]
    for engine in dict.fromkeys(e for row in rows for e in row["engines"]):
        cells = []
        for row, best in zip(rows, fastest, strict=True):
            s: Spread | None = row["engines"].get(engine)
            text = f"{s.median_ms:.2f} ({s.low_ms:.2f}-{s.high_ms:.2f})" if s else "-"
            bold = s is not None and not engine.startswith("floor") and s.median_ms == best
            cells.append(f"[bold]{text}[/bold]" if bold else text)
        table.add_row(engine, *cells)
    return table
