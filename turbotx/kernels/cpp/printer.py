"""Print a kernel as C++: exact loop bounds, vector loops, rows across threads.

In: an `ir.Kernel`. Out: one extern "C" function with the signature of all launches::

    int fused_add_gelu(void* const* args, const int64_t* sizes)  // 0, or a failed check's number
"""

from __future__ import annotations

import sympy

from turbotx import ir
from turbotx.ir.expr import Expr, product, to_c
from turbotx.ir.primitives import SCANS
from turbotx.kernels.cpp.sequential import equal_block, make_sequential
from turbotx.kernels.cpp.sweeps import Sweeps
from turbotx.kernels.cpp.text import COMBINED, STORAGE, FunctionText, start_of, var, wider
from turbotx.kernels.cpp.tiles import print_tiles, wants_tiles

__all__ = ["STORAGE", "print_kernel"]

# Rows times columns below which a second thread costs more than it brings (two-core laptop and
# EPYC, any of the fused BERT kernels: about 4 microseconds of work).
GRAIN = 16384
# Elements per thread and step of a loop without reductions.
BLOCK = 4096
# Columns that are summed in float vectors before the sum is added to one in double: equal blocks of
# 64 to 128 if the extent is known; otherwise this many, for a softmax's exponentials.
SUM_BLOCK = 256


def print_kernel(kernel: ir.Kernel, name: str | None = None) -> str:
    """Return the C++ definition of `kernel`, called `name` (its own name by default)."""
    kernel = make_sequential(kernel)
    text = FunctionText(kernel)
    text.header(name or kernel.name)
    sweeps = Sweeps(kernel)
    if not kernel.columns:
        _Elementwise(text, sweeps).write()
    elif wants_tiles(kernel, sweeps):
        print_tiles(text, sweeps, GRAIN)
    else:
        _Rows(text, sweeps).write()
    text.put("return status;" if text.checks else "return 0;")
    text.lines.append("}")
    return "\n".join(text.lines) + "\n"


class _Elementwise:
    """Without reductions: the innermost axis is the vector loop, in blocks if it is long."""

    def __init__(self, text: FunctionText, sweeps: Sweeps) -> None:
        self.text, self.sweeps, self.kernel = text, sweeps, text.kernel

    def write(self) -> None:
        text, axes = self.text, list(self.kernel.axes)
        if not axes:
            for s in self.kernel.body:
                text.statement(s)
            return
        inner, total = axes[-1], product([a.extent for a in axes])
        short = inner.extent.is_Integer and int(inner.extent) <= BLOCK
        name, extent = var(inner.name), to_c(inner.extent)
        loops = [(var(a.name), to_c(a.extent)) for a in axes[:-1]]
        if not short:
            loops.append(("block", text.count_blocks(extent, BLOCK)))
        if loops:
            text.open_shared(loops, f"{to_c(total)} > {GRAIN}")
        end = extent
        if not short:
            text.put(f"const int64_t begin = block * {BLOCK};")
            end = text.end_of_block(extent, BLOCK)
        for s in self.kernel.body:
            if inner.name not in ir.axes_along(s, self.sweeps.varies):
                text.statement(s)
        if not text.checks:
            text.put("#pragma omp simd")
        begin = "0" if short else "begin"
        text.open(f"for (int64_t {name} = {begin}; {name} < {end}; ++{name})")
        for s in self.kernel.body:
            if inner.name in ir.axes_along(s, self.sweeps.varies):
                text.statement(s)
        text.close()
        if loops:
            text.close_shared()


class _Rows:
    """With reductions: each thread processes rows one by one, with one column loop per sweep."""

    def __init__(self, text: FunctionText, sweeps: Sweeps) -> None:
        self.text, self.sweeps, self.kernel = text, sweeps, text.kernel
        self.kept = sweeps.kept()
        self.running: set[str] = set()
        self.last = self.kernel.columns[-1]
        self.block = equal_block(self.last.extent)
        self.end = ""

    def write(self) -> None:
        text, rows = self.text, self.kernel.rows
        total = product([a.extent for a in self.kernel.axes])
        if rows:
            loops = [(var(a.name), to_c(a.extent)) for a in rows]
            text.open_shared(loops, f"{to_c(total)} > {GRAIN}")
        if self.kept:
            self._scratch()
        for sweep in range(self.sweeps.count):
            for s in self.sweeps.row_statements(sweep):
                text.statement(s)
            self._sweep(sweep)
        for s in self.sweeps.row_statements(self.sweeps.count):
            text.statement(s)
        if rows:
            text.close_shared()

    def _scratch(self) -> None:
        """Declare scratch rows for the values kept between sweeps."""
        text = self.text
        width = product([a.extent for a in self.kernel.columns])
        kinds = [text.type_of(v) for v in self.kept]
        words = 2 if {"double", "int64_t"} & set(kinds) else 1
        padded = f"({to_c(width)} + 15) / 16 * {16 * words}"
        if width.is_Integer:
            padded = str((int(width) + 15) // 16 * 16 * words)
        need = f"{len(kinds)} * ({padded})" if len(kinds) > 1 else padded
        text.put(f"float* scratch = ttx::detail::thread_scratch({need});")
        for k, (v, kind) in enumerate(zip(self.kept, kinds, strict=True)):
            at = f"scratch + {k} * ({padded})" if k else "scratch"
            text.put(f"{kind}* kept_{v} = reinterpret_cast<{kind}*>({at});")

    def _sweep(self, sweep: int) -> None:
        text, sweeps = self.text, self.sweeps
        reduces, stores = sweeps.reduces(sweep), sweeps.stores(sweep)
        if not reduces and not stores:
            return
        for r in reduces:
            self._declare(r)
        known = {v for v, k in self.kept.items() if k < sweep}
        scans = [s for s in sweeps.scans(self._values(sweep)) if s.result not in known]
        for s in scans:
            again = s.result in self.running  # an earlier sweep also computed it
            kind = "" if again else f"{wider(STORAGE[s.dtype])} "
            text.put(f"{kind}{s.result}_so_far = {SCANS[s.op].start};")
            self.running.add(s.result)
        for axis in self.kernel.columns[:-1]:
            text.loop(axis)
        parts = [r for r in reduces if self._in_parts(r)]
        blocked = bool(parts) and self.block != self.last.extent
        if blocked:
            self.end = text.open_block(to_c(self.last.extent), self.block or SUM_BLOCK)
        for r in parts:
            text.put(f"float part_{r.results[0]} = 0;")
        self._vector_loop(sweep, blocked, reduces, stores, in_order=bool(scans))
        for r in parts:
            text.put(f"{total_of(r)} += part_{r.results[0]};")
        text.close(len(self.kernel.columns) - 1 + blocked)
        for r in reduces:
            self._finish(r)

    def _in_parts(self, r: ir.Reduce) -> bool:
        """Return whether a sum uses partial sums in float, which are accurate enough and twice as
        fast."""
        s = self.sweeps.makers[r.args[0]]
        kind = self.text.type_of(r.args[0])
        if r.op != "sum" or wider(kind) == kind:
            return False
        return self.block is not None or (isinstance(s, ir.Compute) and s.op == "exp")

    def _vector_loop(
        self, sweep: int, blocked: bool, reduces: list[ir.Reduce], stores: list[ir.Store],
        in_order: bool,
    ) -> None:  # fmt: skip
        text, sweeps, name = self.text, self.sweeps, var(self.last.name)
        if not in_order and not any(sweeps.in_column(c) for c in text.checks):
            text.put("#pragma omp simd" + "".join(self._clause(r) for r in reduces))
        bounds = f"0; {name} < {to_c(self.last.extent)}"
        if blocked:
            bounds = f"begin; {name} < {self.end}"
        text.open(f"for (int64_t {name} = {bounds}; ++{name})")
        for v in self._values(sweep):
            self._value(v, self.kept.get(v, sweep) < sweep, sweep)
        for r in reduces:
            self._accumulate(r)
        for s in stores:
            text.statement(s)
        text.close()

    def _values(self, sweep: int) -> list[str]:
        """Return the lines of a sweep's column loop: computed values and reads of scratch."""
        available = {v: k for v, k in self.kept.items() if k < sweep}
        return self.sweeps.closure(self.sweeps.ends(sweep), available)

    def _value(self, v: str, known: bool, sweep: int) -> None:
        text = self.text
        place = text.expr(self._place())
        if known:
            text.put(f"const {text.type_of(v)} {var(v)} = kept_{v}[{place}];")
            return
        text.statement(self.sweeps.makers[v])
        for c in text.checks:
            if c.value == v:
                text.statement(c)
        if self.kept.get(v) == sweep:
            text.put(f"kept_{v}[{place}] = {var(v)};")

    def _place(self) -> Expr:
        """Return the position in the row, for scratch."""
        flat: Expr = sympy.Integer(0)
        for axis in self.kernel.columns:
            flat = flat * axis.extent + axis.symbol
        return sympy.expand(flat)

    def _declare(self, r: ir.Reduce) -> None:
        kind = self.text.type_of(r.results[0])
        wide = wider(kind) if r.op == "sum" else kind
        self.text.put(f"{wide} {total_of(r)} = {start_of(r.op, kind)};")
        if is_ordered(r):
            self.text.put(f"int {total_of(r)}_nan = 0;")

    def _clause(self, r: ir.Reduce) -> str:
        """Return a reduction's clause for the vector loop."""
        operator = {"sum": "+", "prod": "*", "any": "||", "all": "&&"}.get(r.op, r.op)
        nan = f" reduction(|:{total_of(r)}_nan)" if is_ordered(r) else ""
        name = f"part_{r.results[0]}" if self._in_parts(r) else total_of(r)
        return f" reduction({operator}:{name}){nan}"

    def _accumulate(self, r: ir.Reduce) -> None:
        x = var(r.args[0])
        name = f"part_{r.results[0]}" if self._in_parts(r) else total_of(r)
        if r.op in COMBINED:
            self.text.put(COMBINED[r.op].format(name, x))
        else:
            sign = ">" if r.op == "max" else "<"
            self.text.put(f"{name} = {x} {sign} {name} ? {x} : {name};")
            if is_ordered(r):
                self.text.put(f"{name}_nan |= {x} != {x};")

    def _finish(self, r: ir.Reduce) -> None:
        kind, name = self.text.type_of(r.results[0]), total_of(r)
        if is_ordered(r):
            self.text.put(f"if ({name}_nan) {name} = std::numeric_limits<{kind}>::quiet_NaN();")
        if name != var(r.results[0]):
            self.text.put(f"const {kind} {var(r.results[0])} = static_cast<{kind}>({name});")


def total_of(r: ir.Reduce) -> str:
    """Return the name of a reduction's accumulator; sums of float have a separate one."""
    name = var(r.results[0])
    wide = r.op == "sum" and wider(STORAGE[r.dtype]) != STORAGE[r.dtype]
    return f"wide_{name}" if wide else name


def is_ordered(r: ir.Reduce) -> bool:
    """Return whether a reduction is a max or min of floats, which need an explicit NaN check."""
    return r.op in ("max", "min") and r.dtype.is_floating_point
