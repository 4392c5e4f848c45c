"""Page data: a report as JSON that the page's scripts draw, and evaluate at any shape.

In: a `Report`. Out: plain dicts and lists. Byte counts are indices into `formulas`, which are
JavaScript over the dims, so that a slider needs no server::

    {"dims": [...], "formulas": ["384*batch*seq", ...], "boxes": [...], "launches": [...], ...}
"""

from __future__ import annotations

import linecache
import sysconfig
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from turbotx import ir
from turbotx.ir.expr import Expr, evaluate, to_javascript
from turbotx.ir.printer import show_expr
from turbotx.memory.planner import ALIGNMENT, CHUNK_NBYTES
from turbotx.memory.planner.symbolic import SymbolicPlanner
from turbotx.report.amounts import find_leaders
from turbotx.report.cost import eager_nbytes, launch_cost
from turbotx.report.draw import lay_out_boxes, shorten
from turbotx.report.layers import find_layers
from turbotx.report.origin import ROUND_NBYTES, find_lives
from turbotx.report.record import Record
from turbotx.report.where import find_place

SLIDER_ENDS = (4096, 2048, 1024, 512, 256, 128)
BATCH_END = 64
SNAPSHOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class _Formulas:
    """All formulas without duplicates, as JavaScript and as readable text."""

    def __init__(self) -> None:
        self._places: dict[Expr, int] = {}

    def place(self, value: Expr) -> int:
        return self._places.setdefault(value, len(self._places))

    def to_lists(self) -> tuple[list[str], list[str]]:
        return [to_javascript(v) for v in self._places], [show_expr(v) for v in self._places]


def page_data(report: Record) -> dict[str, Any]:
    """Return everything that the page shows; its size grows with the model's launches and ops."""
    formulas = _Formulas()
    layer = find_layers(report)
    ops = _ops(report, formulas)
    data: dict[str, Any] = {
        "model": report.name,
        "dims": _dims(report),
        "boxes": _boxes(report),
        "launches": _launches(report, formulas, layer),
        "ops": ops,
        "places": {op["place"]: _place(op["place"]) for op in ops if op["place"]},
        "regions": [
            {
                "name": r.name,
                "launches": r.launches,
                "kernels": r.kernels,
                "reason": r.reason,
                "apart": r.apart,
            }
            for r in report.regions
        ],
        "kernels": {k.name: _kernel(k) for k in report.kernels},
        "externs": [asdict(x) for x in report.externs],
        "resources": report.findings.resources_as_dicts(),
        "numerics": report.findings.numerics_as_dicts(),
        "times": report.findings.times_us(),
        "timed": _timed(report),
        "provenance": asdict(report.provenance),
        "target": report.target,
        "memory": _memory(report, formulas, layer),
    }
    data["formulas"], data["shown"] = formulas.to_lists()
    return data


def _dims(report: Record) -> list[dict[str, Any]]:
    """Return all dims; those that follow another have no slider. end: the largest size offered."""
    leaders = find_leaders(report.dims)
    found = []
    for k, (name, size) in enumerate(report.dims.items()):
        ends = [BATCH_END] if k == 0 and "_d" not in name else SLIDER_ENDS
        end = next((e for e in ends if _allowed(report, name, e)), size)
        found.append(
            {"name": name, "size": size, "follows": leaders.get(name), "end": max(end, size)}
        )
    return found


def _allowed(report: Record, name: str, size: int) -> bool:
    dims = report.at(**{name: size}).dims
    return all(evaluate(e, dims) >= 0 for e, _ in report.compiled.assembly.requirements)


def _boxes(report: Record) -> dict[str, Any]:
    """Return boxes with positions, and arrows with their bends."""
    drawing = lay_out_boxes(report)
    layout = drawing.layout
    launches = {r.name: r.launches for r in report.regions}
    taken = {name for names in launches.values() for name in names}

    def shown(name: str) -> list[str]:
        """Return the launches that a node's arrow goes to; no two boxes show one launch."""
        if launches.get(name):
            return list(launches[name])
        return [x for x in find_place(report, name).launches if x not in taken]

    made: list[dict[str, Any]] = [
        {
            "name": box.name, "kind": box.kind, "title": box.title, "text": shorten(box.text),
            "launches": shown(box.name),
        }
        for box in drawing.boxes
    ]  # fmt: skip
    for entry in made:
        name = str(entry["name"])
        (x, y), (width, height) = layout.centres[name], drawing.sizes[name]
        entry.update(x=round(x, 1), y=round(y, 1), width=round(width), height=height)
    arrows = [
        {"from": a, "to": b, "bends": [[round(x, 1), round(y, 1)] for x, y in points]}
        for (a, b), points in layout.bends.items()
    ]
    return {"list": made, "arrows": arrows, "width": layout.width, "height": layout.height}


def _launches(report: Record, formulas: _Formulas, layer: Any) -> list[dict[str, Any]]:
    found = []
    for entry, launch in zip(report.launches, report.compiled.assembly.launches, strict=True):
        cost = launch_cost(launch)
        found.append(
            {
                "name": entry.name, "kind": entry.kind, "kernel": entry.kernel,
                "op": str(launch.call.target) if isinstance(launch, ir.AtenLaunch) else "",
                "module": entry.module, "source": entry.source, "layer": layer(entry.writes[0]),
                "reads": formulas.place(cost.reads), "writes": formulas.place(cost.writes),
                "flops": formulas.place(cost.flops), "apart": entry.apart,
            }
        )  # fmt: skip
    return found


def _ops(report: Record, formulas: _Formulas) -> list[dict[str, Any]]:
    """Return the captured model's ops in order: what became of each, and the bytes it would move
    alone."""
    moves = eager_nbytes(report.origin)
    found = []
    for n in report.ops:
        place = find_place(report, n.name)
        found.append(
            {
                "name": n.name, "op": n.op, "status": place.status, "launches": place.launches,
                "place": place.source, "module": n.module,
                "moves": formulas.place(moves[n.name]) if n.name in moves else -1,
            }
        )  # fmt: skip
    return found


def _place(place: str) -> dict[str, str]:
    """Return a place with a shortened path, and its line of source code."""
    path, _, line = place.rpartition(":")
    short = path
    for root in (sysconfig.get_paths()["purelib"], str(Path.cwd())):
        short = short.removeprefix(root + "/")
    return {"short": f"{short}:{line}", "code": linecache.getline(path, int(line)).strip()}


def _kernel(kernel: Any) -> dict[str, Any]:
    # Installed with rich, which only reports need.
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import CppLexer, PythonLexer

    formatter = HtmlFormatter(nowrap=True)
    lexers = {"triton": PythonLexer, "cpp": CppLexer}
    return {
        "kind": kernel.kind,
        "signature": kernel.signature,
        "launches": kernel.launches,
        "sources": {
            language: highlight(text, lexers[language](), formatter)
            for language, text in kernel.sources.items()
        },
    }


def _timed(report: Record) -> dict[str, Any] | None:
    """Return the times of a call, None if not measured."""
    found = report.findings.profile
    if found is None:
        return None
    return {
        "total": found.total_us, "between": found.between_us, "guards": found.guards_us,
        "runs": found.runs,
    }  # fmt: skip


def _memory(report: Record, formulas: _Formulas, layer: Any) -> dict[str, Any]:
    """Return lifetimes and sizes, and what determines offsets: orders to walk, or plans at a few
    shapes."""
    program, tensors = report.compiled.program, report.compiled.assembly.tensors
    sharing = Counter(program.liveness.root_of.values())
    buffers = [
        {
            "name": name, "begin": life.begin, "end": life.end, "layer": layer(name),
            "nbytes": formulas.place(tensors[name].nbytes), "tensors": sharing[name],
        }
        for name, life in zip(program.liveness.names, program.liveness.lifetimes, strict=True)
    ]  # fmt: skip
    sizes = {n.name: n.nbytes for n in report.origin.nodes}
    eager = [
        [formulas.place(sizes[name]), *life] for name, life in find_lives(report.origin).items()
    ]
    scratch = {n for x in report.compiled.assembly.launches for n in x.workspaces}
    planner = program.planner
    orders = [
        {"order": list(o.order), "below": [list(b) for b in o.below]}
        for o in (planner.in_use if isinstance(planner, SymbolicPlanner) else [])
    ]
    return {
        "planner": report.planner, "alignment": ALIGNMENT, "chunk": CHUNK_NBYTES,
        "buffers": buffers, "orders": orders,
        "snapshots": [] if orders else _snapshots(report),
        "pytorch": eager, "rounding": ROUND_NBYTES, "method": report.memory.pytorch.method,
        "scratch": [k for k, b in enumerate(buffers) if b["name"] in scratch],
        "weights": report.memory.weights_nbytes, "derived": report.memory.derived_nbytes,
        "packed": report.memory.packed_nbytes,
    }  # fmt: skip


def _snapshots(report: Record) -> list[dict[str, Any]]:
    """Return plans of a planner that the page cannot evaluate, at this shape and along every
    slider."""
    views = [report]
    for dim in _dims(report):
        sizes = [s for s in SNAPSHOTS if s <= dim["end"] and not dim["follows"]]
        views += [report.at(**{dim["name"]: s}) for s in sizes]
    return [
        {
            "dims": list(view.dims.values()), "peak": view.memory.peak_nbytes,
            "offsets": [b.offset for b in view.memory.buffers],
        }
        for view in views
    ]  # fmt: skip
