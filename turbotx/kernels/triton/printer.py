"""Print a kernel as Triton: stand-alone source that imports nothing but Triton.

In: an `ir.Kernel` and a `Schedule` (chosen where none is given). Out: readable Python source of
one @triton.jit function and the device functions that it calls. Its arguments are the kernel's
params by pointer, `status_ptr` where indices are checked, and the sizes by value::

    row = tl.program_id(0)
    col = tl.arange(0, COLS)
    col_ok = col < 384
    x = tl.load(linear_ptr + row * 384 + col, mask=col_ok)
    ...
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace

import sympy

from turbotx import ir
from turbotx.ir.expr import product
from turbotx.ir.printer import show_expr, show_shape
from turbotx.kernels.schedule import (
    Schedule,
    choose_schedule,
    outer_axes,
    tiles_columns,
    vector_axes,
)
from turbotx.kernels.triton.body import KernelBody
from turbotx.kernels.triton.functions import stand_alone
from turbotx.kernels.triton.reduce import HELD, Group, HeldTile
from turbotx.kernels.triton.text import wrap

# Row tiles up to this many elements load later operands (weights) before the first reduction, to
# hide the latency; larger ones would run out of registers.
EAGER_TILE = 4096


def print_triton(
    kernel: ir.Kernel, schedule: Schedule | None = None, name: str | None = None
) -> str:
    """Return the Triton source of `kernel`, called `name` (its own name by default)."""
    return _Printer(kernel, schedule or choose_schedule(kernel), name or kernel.name).run()


class _Printer:
    def __init__(self, kernel: ir.Kernel, schedule: Schedule, name: str) -> None:
        self.kernel, self.schedule, self.name = kernel, schedule, name
        self.body = KernelBody(kernel, schedule)
        self.rows, self.cols = outer_axes(kernel), vector_axes(kernel)
        self.length = product([a.extent for a in self.cols])
        exact = self.length.is_Integer and int(self.length) % schedule.cols == 0
        self.body.col_masked = bool(self.cols) and not exact
        self.phase = kernel.phases()
        self.sweeps = 1 + max((ir.phase_of(s, self.phase) for s in kernel.body), default=0)
        self.emitted: set[str] = set()
        self.lines: list[str] = []
        self.functions: dict[str, str] = {}
        self.depth = 1

    # --- analysis ---

    def _in_columns(self, s: ir.Statement) -> bool:
        """Return whether a statement varies along the row, so that a looped row repeats it."""
        along = ir.axes_along(s, self.body.varies)
        return isinstance(s, ir.Reduce) or bool(along & self.body.col_names)

    def _needed(self, ends: Iterable[ir.Statement]) -> set[str]:
        """Return the values that `ends` need and that are not available yet."""
        found: set[str] = set()
        todo = [a for s in ends for a in ir.needs_of(s)]
        while todo:
            value = todo.pop()
            if value in found or value in self.emitted:
                continue
            found.add(value)
            todo += ir.needs_of(self.body.makers[value])
            todo += [c.mask for c in self.body.checks if c.value == value and c.mask]
        return found

    def _ends(self, sweep: int) -> list[ir.Statement]:
        """Return the statements that a sweep must compute: reductions, stores, and early loads."""
        ends = (s for s in self.kernel.body if isinstance(s, (ir.Reduce, ir.Store)))
        return [s for s in ends if ir.phase_of(s, self.phase) == sweep]

    # --- text ---

    def run(self) -> str:
        self._where()
        if self.schedule.looped:
            self._looped()
        else:
            self._straight()
        head = [f"def {self.name}(", *(f"    {a}," for a in self.arguments()), "):"]
        main = "\n".join(["@triton.jit", *head, *self.lines]) + "\n"
        return stand_alone(self._header(), "\n\n".join([*self.functions.values(), main]))

    def arguments(self) -> list[str]:
        names = [f"{p.name}_ptr" for p in self.kernel.params]
        names += ["status_ptr"] if self.body.checks else []
        return [*names, *self.kernel.sizes, *(f"{t}: tl.constexpr" for t in self._tiles())]

    def _tiles(self) -> list[str]:
        return ["ROWS"] * self.body.two_dims + ["COLS"] * bool(self.cols)

    def _header(self) -> list[str]:
        k, s = self.kernel, self.schedule
        lines = [f"{k.name}"]
        for source in k.sources:
            computed = textwrap.wrap(f"computes {source}", 90, subsequent_indent="  ")
            lines += [f"  {line}" for line in computed]
        for p in k.params:
            way = "reads " if p.role == "in" else "writes"
            lines.append(f"  {way} {p.name}: {str(p.dtype)[6:]}{show_shape(p.shape)}")
        rows = " x ".join(show_expr(a.extent) for a in self.rows) or "1"
        cols = " x ".join(show_expr(a.extent) for a in self.cols) or "1"
        kind = "reduced over" if k.columns else "by"
        held = f"in turns of {s.cols}" if s.looped else f"in tiles of {s.rows} x {s.cols}"
        held += f", about {s.programs} programs at most" if s.programs else ""
        lines.append(f"  rows {rows}, {kind} columns {cols}, {held}, {s.num_warps} warps")
        return lines

    def put(self, line: str) -> None:
        self.lines += wrap("    " * self.depth + line)

    def _where(self) -> None:
        """Print the program's row and, unless looped, column indices."""
        s = self.schedule
        wide = ".to(tl.int64)" if s.wide else ""
        if s.programs:
            self._where_in_columns(wide)
            self._turns(wide)
        elif self.rows:
            self._where_in_rows(f"tl.program_id(0){wide}")
        if not s.programs:
            self._where_in_columns(wide)

    def _turns(self, wide: str) -> None:
        """Begin the loop over a program's tiles. Values common to all tiles are loaded again for
        each, from the cache, to save registers."""
        tiles = self.body.expr(product([a.extent for a in self.rows]))
        if self.body.two_dims:
            tiles = f"tl.cdiv({tiles}, ROWS)"
        self.put(f"for turn in range(tl.program_id(0){wide}, {tiles}, tl.num_programs(0){wide}):")
        self.depth += 1
        self._where_in_rows("turn")

    def _where_in_rows(self, place: str) -> None:
        body = self.body
        if body.two_dims:
            place += " * ROWS + tl.arange(0, ROWS)[:, None]"
        self._unpack(place, self.rows, "index")
        if body.two_dims:
            flat = self.rows[0].name if len(self.rows) == 1 else "index"
            extent = product([a.extent for a in self.rows])
            self.put(f"row_ok = {flat} < {body.expr(extent)}")

    def _where_in_columns(self, wide: str) -> None:
        s = self.schedule
        if self.cols and not s.looped:
            span = "tl.arange(0, COLS)" + ("[None, :]" if self.body.two_dims else "")
            if tiles_columns(self.kernel, s):
                span = f"tl.program_id({1 if self.rows else 0}){wide} * COLS + {span}"
            self._columns(span)

    def _columns(self, span: str) -> None:
        self._unpack(span, self.cols, "position")
        if self.body.col_masked:
            flat = self.cols[0].name if len(self.cols) == 1 else "position"
            self.put(f"col_ok = {flat} < {self.body.expr(self.length)}")

    def _unpack(self, place: str, axes: tuple[ir.Axis, ...], flat: str) -> None:
        """Print the indices of the axes, computed from the flat index."""
        if len(axes) == 1:
            self.put(f"{axes[0].name} = {place}")
            return
        self.put(f"{flat} = {place}")
        below = sympy.Integer(1)
        for k, axis in enumerate(reversed(axes)):
            text = flat if below == 1 else f"{flat} // {self._atom(below)}"
            if k < len(axes) - 1:
                text += f" % {self._atom(axis.extent)}"
            self.put(f"{axis.name} = {text}")
            below = product([below, axis.extent])

    def _atom(self, value: sympy.Expr) -> str:
        text = self.body.expr(value)
        return text if text.isidentifier() or text.isdigit() else f"({text})"

    # --- rows in registers ---

    def _straight(self) -> None:
        eager = self.schedule.rows * self.schedule.cols <= EAGER_TILE
        for sweep in range(self.sweeps):
            ends = self._ends(sweep)
            needed = self._needed(ends)
            if eager:
                early = [s for s in self.kernel.body if isinstance(s, ir.Load)
                         and self.phase[s.result] <= sweep]  # fmt: skip
                needed |= self._needed(early) | {s.result for s in early}
            chosen = [s for s in self.kernel.body if self._chosen(s, needed, ends)]
            self._section(chosen)
            held = [s for s in ends if isinstance(s, ir.Reduce) and s.op in HELD]
            for group in self._groups([s for s in ends if s not in held]):
                self._reduce_tile(group)
            for r in held:
                self._reduce_held(r)

    def _chosen(self, s: ir.Statement, needed: set[str], ends: list[ir.Statement]) -> bool:
        if isinstance(s, ir.Store):
            return s in ends
        if isinstance(s, ir.Check):
            return s.value in needed and s.value not in self.emitted
        if isinstance(s, ir.Reduce):
            return False
        return s.result in needed and s.result not in self.emitted

    def _section(self, chosen: Sequence[ir.Statement]) -> None:
        """Print statements in order; values with one reader are inlined."""
        users = {}
        for s in chosen:
            for a in ir.needs_of(s):
                if self.body.uses[a] == 1:
                    users[a] = s
        for s in chosen:
            results = ir.results_of(s)
            user = users.get(results[0]) if results else None
            for line in self.body.lines(s, self.body.may_inline(s, user)):
                self.put(line)
            self.emitted.update(results)

    # --- reductions ---

    def _groups(self, ends: list[ir.Statement]) -> list[Group]:
        """Group a sweep's reductions by the shape of their tiles: one `tl.reduce` each."""
        by_shape: dict[str, list[ir.Reduce]] = {}
        for s in ends:
            if isinstance(s, ir.Reduce):
                row = "r" in self.body.dims(self.body.varies[s.args[0]])
                shape = "(ROWS, COLS)" if row else "(1, COLS)" if self.body.two_dims else "(COLS,)"
                by_shape.setdefault(shape, []).append(s)
        groups = []
        for shape, reduces in by_shape.items():
            empty = not self.length.is_Integer
            group = Group(tuple(reduces), shape, self.body.col_masked, "combine", empty)
            text = group.function()
            same = next((n for n, t in self.functions.items() if t == text), None)
            if text and same is None and "combine" in self.functions:
                group = replace(group, combine=f"combine{len(self.functions)}")
                text = group.function()
            if text:
                self.functions[group.combine] = text
            groups.append(group)
        return groups

    def _inputs(self, group: Group) -> dict[str, str]:
        """Return the names of a group's inputs, as whole tiles."""
        return {r.args[0]: self.body.whole_tile(r.args[0]) for r in group.reduces}

    def _note(self, group: Group) -> None:
        results = ", ".join(self.body.names[n] for r in group.reduces for n in r.results)
        over = ", ".join(a.name for a in self.cols)
        together = " in one pass" if len(group.parts()) > 1 else ""
        self.put(f"# {results} over {over}{together}")

    def _results(self, group: Group) -> list[str]:
        known = self.body.names
        return [known.get(n, f"{known[r.results[0]]}_{p}") for r, p, n in group.parts()]

    def _reduce_tile(self, group: Group) -> None:
        self._note(group)
        axis = 1 if self.body.two_dims else 0
        elements = group.elements(self._inputs(group))
        for line in group.finish(self._results(group), elements, axis):
            self.put(line)
        self._mark(group)

    def _reduce_held(self, r: ir.Reduce) -> None:
        over = ", ".join(a.name for a in self.cols)
        results, x = [self.body.names[n] for n in r.results], self.body.whole_tile(r.args[0])
        self.put(f"# {', '.join(results)} over {over}, of the row in registers")
        tile = HeldTile(
            x, self.body.expr(self.length), self.body.col_masked,
            self.body.is_zero_outside(r.args[0]), int(self.body.two_dims),
        )  # fmt: skip
        for line in tile.reduce(r.op, results):
            self.put(line)
        if r.op == "softmax":
            self.body.lowest_outside.add(x)
        self.emitted.update(r.results)

    def _mark(self, group: Group) -> None:
        for r in group.reduces:
            self.emitted.update(r.results)

    # --- rows walked along ---

    def _looped(self) -> None:
        for sweep in range(self.sweeps):
            ends = self._ends(sweep)
            within = [s for s in ends if self._in_columns(s)]
            self._outside(within)
            if within:
                self._loop(within)
            after = [s for s in ends if not self._in_columns(s)]
            needed = self._needed(after)
            self._section([s for s in self.kernel.body if self._chosen(s, needed, after)])

    def _outside(self, within: list[ir.Statement]) -> None:
        """Print the statements of a sweep that are constant in a row."""
        needed = self._needed(within)
        chosen = [s for s in self.kernel.body if not isinstance(s, ir.Store)
                  and self._chosen(s, needed, []) and not self._in_columns(s)]  # fmt: skip
        self._section(chosen)

    def _loop(self, within: list[ir.Statement]) -> None:
        groups = self._groups(within)
        carried = {id(g): [f"{n.rstrip('_')}_so_far" for n in self._results(g)] for g in groups}
        for group in groups:
            self._note(group)
            for line in group.start(carried[id(group)]):
                self.put(line)
        kept = set(self.emitted)
        needed = self._needed(within)
        for s in self.kernel.body:
            if isinstance(s, ir.Scan) and s.result in needed:
                self.put(self.body.start_of_scan(s))
        bound = self.body.expr(self.length)
        self.put(f"for start in range(0, {bound}, COLS):")
        self.depth += 1
        self._columns("start + tl.arange(0, COLS)" + ("[None, :]" if self.body.two_dims else ""))
        self._section([s for s in self.kernel.body if self._chosen(s, needed, within)])
        for group in groups:
            for line in group.step(carried[id(group)], group.elements(self._inputs(group))):
                self.put(line)
        self.depth -= 1
        self.emitted = kept
        axis = 1 if self.body.two_dims else 0
        for group in groups:
            for line in group.finish(self._results(group), carried[id(group)], axis):
                self.put(line)
            self._mark(group)
