"""Tiles: reductions over strided columns, for many contiguous rows at a time.

In: a kernel such as the mean over seq of (batch, seq, hidden), whose rows (hidden) are contiguous
in memory and whose columns (seq) are not. Out: loops with vectors along the rows::

    for (begin...)  for (col...)  for (k < count)  total[k] += x[col * 384 + begin + k];
"""

from __future__ import annotations

from turbotx import ir
from turbotx.ir.expr import product, to_c
from turbotx.ir.primitives import SCANS
from turbotx.kernels.cpp.sweeps import Sweeps
from turbotx.kernels.cpp.text import COMBINED, FunctionText, start_of, var, wider

# Rows of a tile: 256 bytes of floats, four AVX-512 vectors, so that whole cache lines are used.
TILE = 64


def wants_tiles(kernel: ir.Kernel, sweeps: Sweeps) -> bool:
    """Return whether rows rather than columns are contiguous in memory for most loads."""
    if not kernel.rows or any(sweeps.in_column(c) for c in kernel.body if isinstance(c, ir.Check)):
        return False
    row, column = kernel.rows[-1], kernel.columns[-1]
    if row.extent.is_Integer and int(row.extent) < 8:
        return False
    along_row = along_column = 0
    for s in kernel.body:
        if isinstance(s, ir.Load) and sweeps.in_column(s):
            steps = s.access.stride(row), s.access.stride(column)
            along_row += steps[0] == 1 and steps[1] not in (0, 1)
            along_column += steps[1] == 1 and steps[0] not in (0, 1)
    return along_row > along_column


def print_tiles(text: FunctionText, sweeps: Sweeps, grain: int) -> None:
    """Write the loops of a kernel that `wants_tiles`."""
    _Tiles(text, sweeps).write(grain)


class _Tiles:
    def __init__(self, text: FunctionText, sweeps: Sweeps) -> None:
        self.text, self.sweeps, self.kernel = text, sweeps, text.kernel
        self.row = self.kernel.rows[-1]
        self.tiled = self._tiled_values()
        self.running: set[str] = set()

    def _tiled_values(self) -> set[str]:
        """Return the row values that other loops read; each gets an array per tile."""
        found: set[str] = set()
        for s in self.kernel.body:
            for v in ir.needs_of(s):
                maker = self.sweeps.makers[v]
                if self.row.name not in self.sweeps.varies[v]:
                    continue
                if isinstance(maker, ir.Reduce) or (
                    not self.sweeps.in_column(maker)
                    and (self.sweeps.in_column(s) or self.sweeps.of(s) != self.sweeps.of(maker))
                ):
                    found.add(v)
        return found

    def write(self, grain: int) -> None:
        text, rows = self.text, self.kernel.rows
        total = product([a.extent for a in self.kernel.axes])
        extent = to_c(self.row.extent)
        loops = [(var(a.name), to_c(a.extent)) for a in rows[:-1]]
        loops.append(("block", text.count_blocks(extent, TILE)))
        text.open_shared(loops, f"{to_c(total)} > {grain}")
        text.put(f"const int64_t begin = block * {TILE};")
        text.put(f"const int64_t count = {extent} - begin < {TILE} ? {extent} - begin : {TILE};")
        for v in [v for v in self.sweeps.makers if v in self.tiled]:
            text.put(f"{text.type_of(v)} tile_{v}[{TILE}];")
        for sweep in range(self.sweeps.count):
            self._row_values(sweep)
            self._sweep(sweep)
        self._row_values(self.sweeps.count)
        text.close_shared()

    def _open_lanes(self, vectorized: bool = True) -> None:
        if vectorized:
            self.text.put("#pragma omp simd")
        self.text.open("for (int64_t k = 0; k < count; ++k)")
        self.text.put(f"const int64_t {var(self.row.name)} = begin + k;")

    def _fetch(self, statements: list[ir.Statement]) -> None:
        """Define the row values of other loops that these statements read."""
        made = {r for s in statements for r in ir.results_of(s)}
        needed = dict.fromkeys(v for s in statements for v in ir.needs_of(s) if v not in made)
        for v in needed:
            if v in self.tiled:
                self.text.put(f"const {self.text.type_of(v)} {var(v)} = tile_{v}[k];")

    def _row_values(self, sweep: int) -> None:
        statements = self.sweeps.row_statements(sweep)
        plain = [s for s in statements if not self._varies(s)]
        for s in plain:
            self.text.statement(s)
        lanes = [s for s in statements if self._varies(s)]
        if not lanes:
            return
        self._open_lanes(not any(isinstance(s, ir.Check) for s in lanes))
        self._fetch(lanes)
        for s in lanes:
            self.text.statement(s)
        for v in [r for s in lanes for r in ir.results_of(s) if r in self.tiled]:
            self.text.put(f"tile_{v}[k] = {var(v)};")
        self.text.close()

    def _varies(self, s: ir.Statement) -> bool:
        return isinstance(s, ir.Store) or self.row.name in ir.axes_along(s, self.sweeps.varies)

    def _sweep(self, sweep: int) -> None:
        text = self.text
        reduces, stores = self.sweeps.reduces(sweep), self.sweeps.stores(sweep)
        if not reduces and not stores:
            return
        for r in reduces:
            kind = text.type_of(r.results[0])
            start, name = start_of(r.op, kind), f"total_{r.results[0]}"
            kind = wider(kind) if r.op == "sum" else kind
            text.put(f"{kind} {name}[{TILE}];")
            text.put(f"ttx::fill({name}, {kind}({start}));")
        values = self.sweeps.closure(self.sweeps.ends(sweep))
        for scan in self.sweeps.scans(values):
            kind = wider(text.type_of(scan.result))
            if scan.result not in self.running:  # an earlier sweep may have computed it
                text.put(f"{kind} {scan.result}_so_far[{TILE}];")
            self.running.add(scan.result)
            start = f"{kind}({SCANS[scan.op].start})"
            text.put(f"ttx::fill({scan.result}_so_far, {start});")
        for axis in self.kernel.columns:
            text.loop(axis)
        statements = [self.sweeps.makers[v] for v in values]
        self._open_lanes()
        self._fetch([*statements, *reduces, *stores])
        text.lane = "[k]"
        for s in statements:
            text.statement(s)
        for r in reduces:
            self._accumulate(r)
        for store in stores:
            text.statement(store)
        text.close(len(self.kernel.columns) + 1)
        for v in [v for r in reduces for v in r.results]:
            if v in self.tiled:
                text.open("for (int64_t k = 0; k < count; ++k)")
                text.put(f"tile_{v}[k] = static_cast<{text.type_of(v)}>(total_{v}[k]);")
                text.close()
            elif self.row.name not in self.sweeps.varies[v]:  # such as a count: uniform in a tile
                text.put(f"const {text.type_of(v)} {var(v)} = {text.type_of(v)}(total_{v}[0]);")

    def _accumulate(self, r: ir.Reduce) -> None:
        x, place = var(r.args[0]), f"total_{r.results[0]}[k]"
        if r.op in COMBINED:
            self.text.put(COMBINED[r.op].format(place, x))
        else:
            sign = ">" if r.op == "max" else "<"
            nan = f" || {x} != {x}" if r.dtype.is_floating_point else ""
            self.text.put(f"{place} = {x} {sign} {place}{nan} ? {x} : {place};")
