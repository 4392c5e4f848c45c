"""C++ text: statements of a kernel as C++, whatever loops they stand in.

In: statements, values and index expressions. Out: lines of source, for example::

    Compute("exp", "exp", ("sub",), float32)  ->  const float exp = ttx::exp(sub);
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
import torch

from turbotx import ir
from turbotx.ir.expr import Expr, to_c
from turbotx.ir.primitives import PRIMITIVES, SCANS
from turbotx.kernels.cpp.barriers import find_hidden, find_products

STORAGE = {
    torch.float32: "float", torch.float64: "double", torch.bfloat16: "ttx::bf16",
    torch.float16: "ttx::f16", torch.int64: "int64_t", torch.int32: "int32_t",
    torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "uint8_t", torch.bool: "bool",
    torch.float8_e4m3fn: "ttx::f8",  # for reports only: `passes.quantize` refuses it on CPUs
}  # fmt: skip
COMBINED = {
    "sum": "{0} += {1};", "prod": "{0} *= {1};", "any": "{0} = {0} || {1};",
    "all": "{0} = {0} && {1};",
}  # fmt: skip
"""Reductions as a statement on their total and the next value; max and min ask for NaN too."""
_NAMED = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t
    char32_t char8_t class co_await co_return co_yield compl concept const const_cast
    consteval constexpr constinit continue decltype default delete do double
    dynamic_cast else enum explicit export extern false float for friend goto if inline
    int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private
    protected public register reinterpret_cast requires return short signed sizeof
    static static_assert static_cast struct switch template this thread_local throw true
    try typedef typeid typename union unsigned using virtual void volatile wchar_t while
    xor xor_eq
    args at begin block blocks count end errno k last scratch sizes status std ttx linux unix
"""
KEYWORDS = frozenset(_NAMED.split())
"""Of C++, then what a kernel's own text names."""


class FunctionText:
    """Lines of one function; `makers` maps a value to the statement that makes it."""

    def __init__(self, kernel: ir.Kernel) -> None:
        self.kernel = kernel
        self.makers = {r: s for s in kernel.body for r in ir.results_of(s)}
        self.checks = [s for s in kernel.body if isinstance(s, ir.Check)]
        self.checked = {c.value for c in self.checks}
        self.hidden, self.products = find_hidden(kernel), find_products(kernel)
        self.lines: list[str] = []
        self.depth = 1
        self.step = ""  # advances to the next iteration of the parallel loop
        self.lane = ""  # index of a row's running value if rows are processed together

    def put(self, line: str) -> None:
        """Append a line, indented by the depth of the block."""
        self.lines.append("  " * self.depth + line)

    def open(self, line: str) -> None:
        """Append a line that opens a block."""
        self.put(line + " {")
        self.depth += 1

    def close(self, count: int = 1) -> None:
        """Close `count` blocks."""
        for _ in range(count):
            self.depth -= 1
            self.put("}")

    def loop(self, axis: ir.Axis) -> None:
        """Open a loop over all iterations of an axis."""
        name = var(axis.name)
        self.open(f"for (int64_t {name} = 0; {name} < {to_c(axis.extent)}; ++{name})")

    def open_shared(self, loops: Sequence[tuple[str, str]], pays: str) -> None:
        """Open nested loops of (variable, extent) as one parallel loop; pays: condition for
        threads."""
        outermost, at = loops[0][0], loops[0][0]
        if len(loops) > 1:
            at = "at"
            loops = [(v, e if e.isidentifier() or e.isdigit() else f"({e})") for v, e in loops]
        total, status = " * ".join(e for _, e in loops), ", &status" if self.checks else ""
        self.open(f"ttx::share_rows({total}, {pays}, [={status}](int64_t {at}, int64_t last)")
        place, self.step = at, f"++{outermost};"
        for name, extent in reversed(loops[1:]):
            self.put(f"int64_t {name} = {place} % {extent};")
            place += f" / {extent}"
        if place != at:
            self.put(f"int64_t {outermost} = {place};")
        self.open(f"for (; {at} < last; ++{at})")
        for name, extent in loops[1:]:
            self.step = f"if (++{name} == {extent}) {{ {name} = 0; {self.step} }}"
        self.step = self.step if place != at else ""

    def close_shared(self) -> None:
        """Close the loop opened by `open_shared`."""
        if self.step:
            self.put(self.step)
        self.close()
        self.depth -= 1
        self.put("});")

    def open_block(self, extent: str, size: int) -> str:
        """Open a loop over blocks of `size` elements; return the variable of a block's end."""
        self.open(f"for (int64_t begin = 0; begin < {extent}; begin += {size})")
        return self.end_of_block(extent, size)

    def count_blocks(self, extent: str, size: int) -> str:
        """Define the number of blocks of `size` elements; return its name."""
        self.put(f"const int64_t blocks = ({extent} + {size - 1}) / {size};")
        return "blocks"

    def end_of_block(self, extent: str, size: int) -> str:
        """Return the end of the block of `size` elements from `begin` on, defining it if needed."""
        if extent.isdigit() and int(extent) % size == 0:
            return f"begin + {size}"
        self.put(f"const int64_t end = begin + {size} < {extent} ? begin + {size} : {extent};")
        return "end"

    def header(self, name: str) -> None:
        """Write the signature and name every param and size."""
        for source in self.kernel.sources:
            self.lines.append(f"// computes {source}")
        self.lines.append(f'extern "C" int {name}(void* const* args, const int64_t* sizes) {{')
        for i, p in enumerate(self.kernel.params):
            const = "const " if p.role == "in" else ""
            kind = STORAGE[p.dtype]
            self.put(f"{const}{kind}* {var(p.name)} = static_cast<{const}{kind}*>(args[{i}]);")
        for i, size in enumerate(self.kernel.sizes):
            self.put(f"const int64_t {size} = sizes[{i}];")
        if self.checks:
            self.put("int status = 0;")

    def statement(self, s: ir.Statement) -> None:
        """Append the C++ of one statement of a kernel's body."""
        if isinstance(s, ir.Load):
            read = f"ttx::read({var(s.access.param)} + {self.expr(s.access.offset)})"
            if s.access.mask:
                read = f"{var(s.access.mask)} ? {read} : {self.type_of(s.result)}(0)"
            self._let(s.result, read)
        elif isinstance(s, ir.Index):
            self._let(s.result, self.expr(s.value))
        elif isinstance(s, ir.Constant):
            value = literal(s.value, s.dtype)
            self._let(s.result, f"ttx::hidden({value})" if s.result in self.hidden else value)
        elif isinstance(s, ir.Compute):
            names = (var(a) for a in s.args)
            text = PRIMITIVES[s.op].cpp
            if s.result in self.products:
                text = "ttx::product({0}, {1})" if s.op == "mul" else f"ttx::rounded({text})"
            self._let(s.result, text.format(*names, type=STORAGE[s.dtype]))
        elif isinstance(s, ir.Scan):
            running = f"{s.result}_so_far{self.lane}"
            self.put(f"{running} {SCANS[s.op].cpp}= {var(s.args[0])};")
            self._let(s.result, f"static_cast<{STORAGE[s.dtype]}>({running})")
        elif isinstance(s, ir.Store):
            target = f"{var(s.access.param)} + {self.expr(s.access.offset)}"
            guard = f"if ({var(s.access.mask)}) " if s.access.mask else ""
            self.put(f"{guard}ttx::write({target}, {var(s.value)});")
        elif isinstance(s, ir.Check):
            self._check(s)

    def _check(self, s: ir.Check) -> None:
        name, number = var(s.value), self.checks.index(s) + 1
        guard = f"{var(s.mask)} && " if s.mask else ""
        self.open(f"if ({guard}({name} < 0 || {name} >= {to_c(s.limit)}))")
        self.put(f"__atomic_store_n(&status, {number}, __ATOMIC_RELAXED);")
        self.put(f"{name} = 0;")
        self.close()

    def _let(self, name: str, text: str) -> None:
        const = "" if name in self.checked else "const "
        self.put(f"{const}{self.type_of(name)} {var(name)} = {text};")

    def type_of(self, name: str) -> str:
        """Return the C++ type of a value."""
        made = self.makers[name]
        assert not isinstance(made, (ir.Store, ir.Check)), f"{name} is made by no value"
        return STORAGE[made.dtype]

    def expr(self, value: Expr) -> str:
        """Return an index expression as C++, with loop indices and gathered values as variables."""
        plain = {x: sympy.Symbol(var(x.name[1:])) for x in value.free_symbols if x.name[0] in "@%"}
        return to_c(value.xreplace(plain))


def var(name: str) -> str:
    """Return a C++ identifier for a value, a param or an axis."""
    return f"{name}_" if name in KEYWORDS or name.isupper() else name  # a macro, maybe


def literal(value: bool | int | float, dtype: torch.dtype) -> str:
    """Return a number as a C++ literal of the dtype, infinities and NaN included."""
    kind = STORAGE[dtype]
    if dtype is torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        lowest = dtype is torch.int64 and int(value) == -(2**63)
        return f"std::numeric_limits<{kind}>::min()" if lowest else f"{kind}({int(value)})"
    if math.isnan(value):
        return f"std::numeric_limits<{kind}>::quiet_NaN()"
    if math.isinf(value):
        sign = "-" if value < 0 else ""
        return f"{sign}std::numeric_limits<{kind}>::infinity()"
    return f"{float(value)!r}{'f' if dtype is torch.float32 else ''}"


def start_of(op: str, kind: str) -> str:
    """Return the initial value of a reduction, in C++."""
    limits = f"std::numeric_limits<{kind}>"
    real = kind in ("float", "double")
    return {
        "sum": "0", "prod": "1", "any": "false", "all": "true",
        "max": f"-{limits}::infinity()" if real else f"{limits}::lowest()",
        "min": f"{limits}::infinity()" if real else f"{limits}::max()",
    }[op]  # fmt: skip


def wider(kind: str) -> str:
    """Return the accumulator type of a sum."""
    return "double" if kind == "float" else kind
