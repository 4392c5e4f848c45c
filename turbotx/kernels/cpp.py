"""Print a kernel as C++: exact loop bounds, vector loops over columns, rows across threads.

In: an `ir.Kernel`. Out: one extern "C" function with the uniform signature of every launch::

    int fused_add_gelu(void* const* args, const int64_t* sizes)   // 0, or the number of a failed check
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import sympy
import torch

from turbotx import ir
from turbotx.kernels.sequential import make_sequential
from turbotx.primitives import PRIMITIVES
from turbotx.sizes import Expr, product, to_c

STORAGE = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "ttx::bf16",
    torch.float16: "ttx::f16", torch.int64: "int64_t", torch.int32: "int32_t",
    torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "uint8_t", torch.bool: "bool",
}  # fmt: skip
KEYWORDS = frozenset(
    "and or xor not bool int float double long short char auto const static new delete this if else "
    "for while do switch case default return break continue struct class enum union void true "
    "false template typename namespace using operator public private protected signed unsigned "
    "register volatile inline extern goto try catch throw row col args sizes status".split()
)
# Rows times columns below which a second thread costs more than it brings (two-core laptop and
# EPYC, any of the fused BERT kernels: about 4 microseconds of work).
GRAIN = 16384
# Columns summed into one set of vector lanes before the lanes are added up: keeps the error of
# a long sum near that of pairwise summation.
SUM_BLOCK = 4096


def print_kernel(kernel: ir.Kernel, name: str | None = None) -> str:
    """Return the C++ definition of `kernel`, called `name` (its own name by default)."""
    return _Printer(make_sequential(kernel), name or kernel.name).run()


class _Printer:
    def __init__(self, kernel: ir.Kernel, name: str) -> None:
        self.kernel, self.name = kernel, name
        self.varies = kernel.varies_over()
        self.columns = frozenset(a.name for a in kernel.columns)
        self.makers = {r: s for s in kernel.body for r in ir.results_of(s)}
        self.phase = self._phases()
        self.checks = [s for s in kernel.body if isinstance(s, ir.Check)]
        self.lines: list[str] = []
        self.depth = 1
        self.kept = self._choose_kept()

    # --- analysis ---

    def _phases(self) -> dict[str, int]:
        """How many reductions, one after another, a value waits for."""
        phase: dict[str, int] = {}
        for s in self.kernel.body:
            below = max((phase[a] for a in ir.needs_of(s)), default=0)
            for result in ir.results_of(s):
                phase[result] = below + isinstance(s, ir.Reduce)
        return phase

    def in_column(self, s: ir.Statement) -> bool:
        """Tell whether a statement belongs inside the column loop."""
        if isinstance(s, ir.Store):
            offset = {x.name[1:] for x in s.access.offset.free_symbols if x.name[0] == "@"}
            return bool((self.varies[s.value] | offset) & self.columns)
        if isinstance(s, ir.Check):
            return bool(self.varies[s.value] & self.columns)
        if isinstance(s, ir.Reduce):
            return True
        return bool(self.varies[ir.results_of(s)[0]] & self.columns)

    def _sweep_of(self, s: ir.Statement) -> int:
        """The number of the column loop in which a reduction or a store happens."""
        return max((self.phase[a] for a in ir.needs_of(s)), default=0)

    def _choose_kept(self) -> dict[str, int]:
        """Values worth keeping in scratch between column loops, and the loop that makes them."""
        first: dict[str, int] = {}
        again: set[str] = set()
        if not self.columns:
            return {}
        for sweep in range(self._sweeps()):
            needed = self._closure(self._ends(sweep), first)
            for v in needed:
                if v in first:
                    again.add(v)
            for v in needed:
                first.setdefault(v, sweep)
        kept: dict[str, int] = {}
        for v in [v for v in self.makers if v in again]:
            made = self._closure([v], {k: 0 for k in kept})
            cost = sum(1 if m in kept else self._cost(self.makers[m]) for m in made)
            if cost > 3:
                kept[v] = first[v]
        inner = {a for v in kept for a in self._closure([v], {}) if a != v}
        used_elsewhere = {
            a
            for s in self.kernel.body
            if isinstance(s, (ir.Compute, ir.Reduce, ir.Store)) and not set(ir.results_of(s)) & set(kept)
            for a in ir.needs_of(s)
        }
        return {v: k for v, k in kept.items() if v not in inner or v in used_elsewhere}

    def _cost(self, s: ir.Statement) -> int:
        if isinstance(s, ir.Compute):
            return PRIMITIVES[s.op].cost
        return 1 if isinstance(s, ir.Load) else 0

    def _sweeps(self) -> int:
        return 1 + max((self._sweep_of(s) for s in self.kernel.body if self.in_column(s)), default=0)

    def _ends(self, sweep: int) -> list[str]:
        """What the column loop `sweep` is there for: its reductions' arguments, its stores."""
        ends: list[str] = []
        for s in self.kernel.body:
            if isinstance(s, (ir.Reduce, ir.Store)) and self.in_column(s):
                if self._sweep_of(s) == sweep:
                    ends += ir.needs_of(s)
        return ends

    def _closure(self, ends: Iterable[str], kept: dict[str, int]) -> list[str]:
        """Column values needed for `ends`, in order; kept ones end the search."""
        found: dict[str, None] = {}

        def visit(v: str) -> None:
            if v in found or not self.varies[v] & self.columns:
                return
            if v not in kept:
                for a in ir.needs_of(self.makers[v]):
                    visit(a)
            found[v] = None

        for v in ends:
            visit(v)
        return list(found)

    # --- text ---

    def run(self) -> str:
        k = self.kernel
        for source in k.sources:
            self.lines.append(f"// {source}")
        self.lines.append(f'extern "C" int {self.name}(void* const* args, const int64_t* sizes) {{')
        for i, p in enumerate(k.params):
            const = "const " if p.role == "in" else ""
            kind = STORAGE[p.dtype]
            self.put(f"{const}{kind}* {var(p.name)} = static_cast<{const}{kind}*>(args[{i}]);")
        for i, size in enumerate(k.sizes):
            self.put(f"const int64_t {size} = sizes[{i}];")
        if self.checks:
            self.put("int status = 0;")
        if not self.columns:
            self._elementwise()
        else:
            self._rows()
        self.put("return status;" if self.checks else "return 0;")
        self.lines.append("}")
        return "\n".join(self.lines) + "\n"

    def put(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    def open(self, line: str) -> None:
        self.put(line + " {")
        self.depth += 1

    def close(self) -> None:
        self.depth -= 1
        self.put("}")

    def loop(self, axis: ir.Axis) -> None:
        name = var(axis.name)
        self.open(f"for (int64_t {name} = 0; {name} < {to_c(axis.extent)}; ++{name})")

    def _elementwise(self) -> None:
        """No reduction: the innermost axis is the vector loop, cut in blocks where it is long."""
        axes = list(self.kernel.axes)
        if not axes:
            for s in self.kernel.body:
                self.statement(s)
            return
        inner, total = axes[-1], product([a.extent for a in axes])
        block = 4096
        short = inner.extent.is_Integer and int(inner.extent) <= block
        outer = axes[:-1] if short else axes
        collapse = f" collapse({len(outer)})" if len(outer) > 1 else ""
        if outer:
            self.put(f"#pragma omp parallel for{collapse} if ({to_c(total)} > {GRAIN})")
        for axis in axes[:-1]:
            self.loop(axis)
        name, extent = var(inner.name), to_c(inner.extent)
        if not short:
            self.open(f"for (int64_t begin = 0; begin < {extent}; begin += {block})")
            self.put(f"const int64_t end = begin + {block} < {extent} ? begin + {block} : {extent};")
        for s in self.kernel.body:
            if not self._inside(s, inner):
                self.statement(s)
        self._simd("")
        bounds = (f"0; {name} < {extent}" if short else f"begin; {name} < end")
        self.open(f"for (int64_t {name} = {bounds}; ++{name})")
        for s in self.kernel.body:
            if self._inside(s, inner):
                self.statement(s)
        self.close()
        for _ in range(len(axes) - 1 + (not short)):
            self.close()

    def _inside(self, s: ir.Statement, axis: ir.Axis) -> bool:
        if isinstance(s, ir.Store):
            return True
        names = {s.value} if isinstance(s, ir.Check) else set(ir.results_of(s))
        return any(axis.name in self.varies[n] for n in names)

    def _simd(self, clauses: str) -> None:
        if not any(self.in_column(c) for c in self.checks) and (self.columns or not self.checks):
            self.put(f"#pragma omp simd{clauses}")

    def _rows(self) -> None:
        """Reductions: one row after another on each thread, its column loops in turn."""
        rows, columns = self.kernel.rows, self.kernel.columns
        total = product([a.extent for a in self.kernel.axes])
        width = product([a.extent for a in columns])
        scratch = {v: k for k, v in enumerate(self.kept)}
        if rows:
            collapse = f" collapse({len(rows)})" if len(rows) > 1 else ""
            self.put(f"#pragma omp parallel for{collapse} if ({to_c(total)} > {GRAIN})")
        for axis in rows:
            self.loop(axis)
        if scratch:
            kinds = {self._type(v) for v in scratch}
            size = max(8 if "64" in k or k == "double" else 4 for k in kinds)
            padded = f"({to_c(width)} + 15) / 16 * 16"
            need = f"{len(scratch)} * ({padded}) * {size} / 4"
            self.put(f"float* scratch = ttx::detail::thread_scratch({need});")
            for v, k in scratch.items():
                at = f"scratch + {k} * ({padded}) * {size} / 4"
                kind = self._type(v)
                self.put(f"{kind}* kept_{v} = reinterpret_cast<{kind}*>({at});")
        for sweep in range(self._sweeps()):
            self._row_values(sweep)
            self._columns(sweep)
        self._row_values(self._sweeps())
        for _ in rows:
            self.close()

    def _row_values(self, sweep: int) -> None:
        """Statements that are the same for the whole row, once their reductions are done."""
        for s in self.kernel.body:
            if not self.in_column(s) and self._ready(s) == sweep:
                self.statement(s)

    def _ready(self, s: ir.Statement) -> int:
        return max((self.phase[a] for a in ir.needs_of(s)), default=0)

    def _columns(self, sweep: int) -> None:
        ends = self._ends(sweep)
        reduces = [s for s in self.kernel.body
                   if isinstance(s, ir.Reduce) and self._sweep_of(s) == sweep]  # fmt: skip
        stores = [s for s in self.kernel.body
                  if isinstance(s, ir.Store) and self.in_column(s)
                  and self._sweep_of(s) == sweep]  # fmt: skip
        if not reduces and not stores:
            return
        clauses = ""
        for r in reduces:
            clauses += self._declare(r)
        available = {v: k for v, k in self.kept.items() if k < sweep}
        values = self._closure(ends, available)
        columns = self.kernel.columns
        last = columns[-1]
        for axis in columns[:-1]:
            self.loop(axis)
        blocked = any(r.op == "sum" and r.dtype.is_floating_point for r in reduces) and not (
            last.extent.is_Integer and int(last.extent) <= SUM_BLOCK
        )
        self._column_loop(sweep, last, blocked, clauses, reduces, values, stores, available)
        for _ in columns[:-1]:
            self.close()
        for r in reduces:
            self._finish(r)

    def _column_loop(
        self, sweep: int, axis: ir.Axis, blocked: bool, clauses: str, reduces: list[ir.Reduce],
        values: list[str], stores: list[ir.Store], available: dict[str, int],
    ) -> None:  # fmt: skip
        name, extent = var(axis.name), to_c(axis.extent)
        sums = [var(r.results[0]) for r in reduces if r.op == "sum"]
        if blocked:
            self.open(f"for (int64_t begin = 0; begin < {extent}; begin += {SUM_BLOCK})")
            self.put(
                f"const int64_t end = begin + {SUM_BLOCK} < {extent} ? begin + {SUM_BLOCK} : {extent};"
            )
            for r in reduces:
                if r.op == "sum":
                    kind = self._type(r.results[0])
                    self.put(f"{kind} part_{var(r.results[0])} = 0;")
            for total in sums:
                clauses = clauses.replace(f"(+:{total})", f"(+:part_{total})")
        self._simd(clauses)
        bounds = f"begin; {name} < end" if blocked else f"0; {name} < {extent}"
        self.open(f"for (int64_t {name} = {bounds}; ++{name})")
        place = self._place()
        for v in values:
            if v in available:
                self.put(f"const {self._type(v)} {var(v)} = kept_{v}[{place}];")
                continue
            self.statement(self.makers[v])
            for c in self.checks:
                if c.value == v:
                    self.statement(c)
            if self.kept.get(v) == sweep:
                self.put(f"kept_{v}[{place}] = {var(v)};")
        for r in reduces:
            self._accumulate(r, blocked)
        for s in stores:
            self.statement(s)
        self.close()
        if blocked:
            for total in sums:
                self.put(f"{total} += part_{total};")
            self.close()

    def _place(self) -> str:
        """The position in the row, for scratch."""
        flat: Expr = sympy.Integer(0)
        for axis in self.kernel.columns:
            flat = flat * axis.extent + axis.symbol
        return self.expr(sympy.expand(flat))

    def _declare(self, r: ir.Reduce) -> str:
        """Declare an accumulator and return its clause for the vector loop."""
        name, kind = var(r.results[0]), self._type(r.results[0])
        start, operator = {
            "sum": ("0", "+"), "prod": ("1", "*"), "any": ("false", "||"), "all": ("true", "&&"),
            "max": (f"{_lowest(kind)}", "max"), "min": (f"{_highest(kind)}", "min"),
        }[r.op]  # fmt: skip
        self.put(f"{kind} {name} = {start};")
        clause = f" reduction({operator}:{name})"
        if r.op in ("max", "min") and r.dtype.is_floating_point:
            self.put(f"int {name}_nan = 0;")
            clause += f" reduction(|:{name}_nan)"
        return clause

    def _accumulate(self, r: ir.Reduce, blocked: bool) -> None:
        name, x = var(r.results[0]), var(r.args[0])
        if r.op == "sum":
            self.put(f"{'part_' if blocked else ''}{name} += {x};")
        elif r.op == "prod":
            self.put(f"{name} *= {x};")
        elif r.op in ("any", "all"):
            self.put(f"{name} = {name} {'||' if r.op == 'any' else '&&'} {x};")
        else:
            sign = ">" if r.op == "max" else "<"
            self.put(f"{name} = {x} {sign} {name} ? {x} : {name};")
            if r.dtype.is_floating_point:
                self.put(f"{name}_nan |= {x} != {x};")

    def _finish(self, r: ir.Reduce) -> None:
        if r.op in ("max", "min") and r.dtype.is_floating_point:
            name, kind = var(r.results[0]), self._type(r.results[0])
            self.put(f"if ({name}_nan) {name} = std::numeric_limits<{kind}>::quiet_NaN();")

    # --- statements ---

    def statement(self, s: ir.Statement) -> None:
        if isinstance(s, ir.Load):
            read = f"ttx::read({var(s.access.param)} + {self.expr(s.access.offset)})"
            if s.access.mask:
                read = f"{var(s.access.mask)} ? {read} : {self._type(s.result)}(0)"
            self._let(s.result, read)
        elif isinstance(s, ir.Index):
            self._let(s.result, self.expr(s.value))
        elif isinstance(s, ir.Constant):
            self._let(s.result, _literal(s.value, s.dtype))
        elif isinstance(s, ir.Compute):
            text = PRIMITIVES[s.op].cpp.format(
                *(var(a) for a in s.args), type=STORAGE[s.dtype]
            )
            self._let(s.result, text)
        elif isinstance(s, ir.Store):
            target = f"{var(s.access.param)} + {self.expr(s.access.offset)}"
            self.put(f"ttx::write({target}, {var(s.value)});")
        elif isinstance(s, ir.Check):
            self._check(s)

    def _check(self, s: ir.Check) -> None:
        name, number = var(s.value), self.checks.index(s) + 1
        guard = f"{var(s.mask)} && " if s.mask else ""
        self.open(f"if ({guard}({name} < 0 || {name} >= {to_c(s.limit)}))")
        self.put("#pragma omp atomic write")
        self.put(f"status = {number};")
        self.put(f"{name} = 0;")
        self.close()

    def _let(self, name: str, text: str) -> None:
        const = "" if any(c.value == name for c in self.checks) else "const "
        self.put(f"{const}{self._type(name)} {var(name)} = {text};")

    def _type(self, name: str) -> str:
        s = self.makers[name]
        return STORAGE[s.dtype]  # type: ignore[union-attr]

    def expr(self, value: Expr) -> str:
        plain = {x: sympy.Symbol(var(x.name[1:])) for x in value.free_symbols if x.name[0] in "@%"}
        return to_c(value.xreplace(plain))


def var(name: str) -> str:
    """Return a C++ identifier for a value, a param or an axis."""
    return f"{name}_" if name in KEYWORDS - {"row", "col"} else name


def _literal(value: bool | int | float, dtype: torch.dtype) -> str:
    kind = STORAGE[dtype]
    if dtype is torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        return f"{kind}({int(value)})"
    if math.isnan(value):
        return f"std::numeric_limits<{kind}>::quiet_NaN()"
    if math.isinf(value):
        sign = "-" if value < 0 else ""
        return f"{sign}std::numeric_limits<{kind}>::infinity()"
    return f"{float(value)!r}{'f' if dtype is torch.float32 else ''}"


def _lowest(kind: str) -> str:
    if kind in ("float", "double"):
        return f"-std::numeric_limits<{kind}>::infinity()"
    return f"std::numeric_limits<{kind}>::lowest()"


def _highest(kind: str) -> str:
    if kind in ("float", "double"):
        return f"std::numeric_limits<{kind}>::infinity()"
    return f"std::numeric_limits<{kind}>::max()"
