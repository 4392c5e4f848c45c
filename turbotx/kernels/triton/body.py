"""Kernel body: prints a kernel's statements as Triton source: expressions, addresses, masks,
checks.

In: a kernel and its schedule. Out: text for one statement at a time, for example::

    x = tl.load(linear_ptr + row * 384 + col, mask=col_ok)
    gelu = 0.5 * add * (1.0 + tl.erf(add * 0.7071067811865476))
"""

from __future__ import annotations

import builtins
import itertools
import keyword
import re
from collections import Counter
from collections.abc import Set

import sympy

from turbotx import ir
from turbotx.ir.expr import Expr
from turbotx.ir.primitives import COMPARISONS, PRIMITIVES, REDUCTIONS, SCANS
from turbotx.kernels.schedule import Schedule, outer_axes, vector_axes
from turbotx.kernels.triton.functions import FUNCTIONS, variant
from turbotx.kernels.triton.reduce import TYPES
from turbotx.kernels.triton.text import ATOM, LEVELS, ValueText, literal, size_text

RESERVED = frozenset(
    {"tl", "triton", "libdevice", "row_ok", "col_ok", "index", "position", "start", "turn",
     "status_ptr", "ROWS", "COLS", *FUNCTIONS, *keyword.kwlist, *dir(builtins)}
)  # fmt: skip
TENSOR_FUNCTIONS = frozenset(FUNCTIONS) - {"maximum", "minimum"}
# Longest expression that is inlined into another one.
INLINE_CHARS = 44


class KernelBody:
    """Names and texts of a kernel's values under a schedule."""

    def __init__(self, kernel: ir.Kernel, schedule: Schedule) -> None:
        self.kernel, self.schedule = kernel, schedule
        self.varies = kernel.varies_over()
        self.row_names = frozenset(a.name for a in outer_axes(kernel))
        self.col_names = frozenset(a.name for a in vector_axes(kernel))
        self.two_dims = schedule.rows > 1 and bool(self.row_names)
        self.checks = [s for s in kernel.body if isinstance(s, ir.Check)]
        self.makers = {r: s for s in kernel.body for r in ir.results_of(s)}
        self.uses = Counter(a for s in kernel.body for a in ir.needs_of(s))
        self.uses.update(s.value for s in self.checks)
        self.names = self._name_values()
        self.texts: dict[str, ValueText] = {n: ValueText(name) for n, name in self.names.items()}
        self.row_masked = self.two_dims
        self.col_masked = True
        self.lowest_outside: set[str] = set()
        """The tiles that a softmax has set to -inf past the end."""
        # Loads that give zeros past the end, so that a sum of their results needs no mask.
        self.zero_filled = {
            load
            for s in kernel.body
            if isinstance(s, ir.Reduce) and s.op == "welford" and not schedule.looped
            for load in self._loads_of_zeros(s.args[0]) or ()
        }

    def is_zero_outside(self, value: str) -> bool:
        """Return whether a value is 0 in the columns past the end."""
        loads = self._loads_of_zeros(value)
        return loads is not None and loads <= self.zero_filled

    def _loads_of_zeros(self, value: str) -> set[str] | None:
        """Return the loads whose zeros past the end make a value 0 there; None if there are
        none."""
        s = self.makers[value]
        if self.texts[value].text in self.lowest_outside:
            return None
        if isinstance(s, ir.Load):
            return {value} if "c" in self.dims(self.axes_in(s.access.offset)) else None
        if not isinstance(s, ir.Compute) or s.op not in ("add", "sub", "neg", "cast"):
            return None
        found = [self._loads_of_zeros(a) for a in s.args]
        return None if None in found else set().union(*filter(None, found))

    def _name_values(self) -> dict[str, str]:
        """Return unique Python names for all values, without C++'s underscores."""
        taken = set(RESERVED) | {a.name for a in self.kernel.axes} | set(self.kernel.sizes)
        taken |= {f"{p.name}_ptr" for p in self.kernel.params}
        names: dict[str, str] = {}
        nicer = {
            r: n
            for s in self.kernel.body
            if isinstance(s, ir.Reduce)
            for r, n in zip(s.results, REDUCTIONS[s.op].outputs, strict=True)
        }
        loads = {s.result: s.access.param for s in self.kernel.body if isinstance(s, ir.Load)}
        later = {v.rstrip("_") for v in self.makers if v not in loads}
        for value in self.makers:
            name = value.rstrip("_")
            if value in nicer and nicer[value] not in taken:
                name = nicer[value]
            if value in loads:
                name = _numbered(loads[value].rstrip("_"), taken | later)
            while name in taken:
                name += "_"
            taken.add(name)
            names[value] = name
        return names

    # --- shapes and masks ---

    def dims(self, axes: frozenset[str]) -> str:
        """Return the tile dims of a value that varies over `axes`: "", r, c or rc."""
        row = "r" if self.two_dims and axes & self.row_names else ""
        return row + ("c" if axes & self.col_names else "")

    def axes_in(self, value: Expr) -> frozenset[str]:
        """Return the names of the axes that an index expression varies over."""
        return ir.axes_of(value, self.varies)

    def edge_masks(self, dims: str) -> list[str]:
        """Return the masks of a tile's edges along "r" (rows) and "c" (columns), where needed."""
        masks = ["row_ok"] if "r" in dims and self.row_masked else []
        return masks + (["col_ok"] if "c" in dims and self.col_masked else [])

    def _address(self, access: ir.Access, also: str | None = None) -> tuple[str, str, list[str]]:
        """Return pointer, dims and masks of an access; `also` names a value of the same tile."""
        dims = self.dims(self.axes_in(access.offset))
        wanted = set(dims)
        for value in (access.mask, also):
            if value:
                wanted |= set(self.dims(self.varies[value]))
        pointer = f"{access.param}_ptr"
        if access.offset != 0:
            pointer += f" + {self.expr(access.offset)}"
        for letter, name in (("r", self.row_axis()), ("c", self.col_axis())):
            if letter in wanted and letter not in dims:
                pointer += f" + {name} * 0"
        dims = "".join(d for d in "rc" if d in wanted)
        masks = self.edge_masks(dims)
        texts = {v: f"{self.names[v]}_ok" for v in ir.values_in(access.offset) if self._checked(v)}
        if access.mask:
            texts[access.mask] = self.texts[access.mask].inside()
        for value, mask in texts.items():
            if dims and not self.dims(self.varies[value]):
                # Triton's interpreter treats a one-element tile as a scalar.
                axis = self.col_axis() if "c" in dims else self.row_axis()
                mask = f"((({axis} >= 0) & {mask}) != 0)"
            masks.append(mask)
        return pointer, dims, masks

    def row_axis(self) -> str:
        """Return the name of a tile's row axis, "" if there is none."""
        axes = outer_axes(self.kernel)
        return axes[-1].name if axes else ""

    def col_axis(self) -> str:
        """Return the name of a tile's column axis, "" if there is none."""
        axes = vector_axes(self.kernel)
        return axes[-1].name if axes else ""

    def _checked(self, value: str) -> bool:
        return any(c.value == value for c in self.checks)

    # --- statements ---

    def lines(self, s: ir.Statement, inline: bool) -> list[str]:
        """Return the lines of one statement; with `inline` its text may be kept for its user.
        Raises TypeError for a reduction or scan, which other code prints."""
        if isinstance(s, ir.Store):
            return [self._store(s)]
        if isinstance(s, ir.Check):
            return self._check(s)
        if isinstance(s, ir.Constant):
            self.texts[s.result] = ValueText(literal(s.value, s.dtype))
            return []
        if isinstance(s, ir.Load):
            return [f"{self.names[s.result]} = {self._load(s)}"]
        if isinstance(s, ir.Scan):
            return self._scan(s)
        if isinstance(s, ir.Index):
            text = self._index(s)
        elif isinstance(s, ir.Compute):
            text = self._compute(s)
        else:
            raise TypeError(f"{type(s).__name__} is printed by the reductions' own code")
        if (inline and len(text.text) <= INLINE_CHARS) or text.text.isidentifier():
            self.texts[s.result] = text
            return []
        self.texts[s.result] = ValueText(self.names[s.result])
        return [f"{self.names[s.result]} = {text.text}"]

    def _load(self, s: ir.Load) -> str:
        pointer, _, masks = self._address(s.access)
        guarded = s.access.mask or any(self._checked(v) for v in ir.values_in(s.access.offset))
        guarded = guarded or s.result in self.zero_filled
        mask = f", mask={' & '.join(masks)}" if masks else ""
        other = ", other=0" if guarded and masks else ""
        stored = next(p.dtype for p in self.kernel.params if p.name == s.access.param)
        cast = "" if stored is s.dtype else f".to({TYPES[s.dtype]})"
        return f"tl.load({pointer}{mask}{other}){cast}"

    def _store(self, s: ir.Store) -> str:
        pointer, _, masks = self._address(s.access, also=s.value)
        mask = f", mask={' & '.join(masks)}" if masks else ""
        return f"tl.store({pointer}, {self.texts[s.value].text}{mask})"

    def _check(self, s: ir.Check) -> list[str]:
        """Print a check: an index out of range sets the status word, and nothing is read there."""
        name, number = self.names[s.value], self.checks.index(s)
        dims = self.dims(self.varies[s.value])
        # Triton's interpreter treats one element as a scalar, whose ~ is not a mask.
        wrong = f"~{name}_ok" if dims else f"({name}_ok == 0)"
        masks = [wrong, *self.edge_masks(dims)]
        if s.mask:
            masks.append(self.texts[s.mask].inside())
            dims = dims or self.dims(self.varies[s.mask])
        word = f"status_ptr + {number}" if number else "status_ptr"
        status = f"{word} + tl.zeros_like({name})" if dims else word
        return [
            f"{name}_ok = ({name} >= 0) & ({name} < {self.expr(s.limit)})",
            f"tl.store({status}, {number + 1}, mask={' & '.join(masks)})",
        ]

    def _scan(self, s: ir.Scan) -> list[str]:
        """Return a tile's running value; a looped row continues from the previous tile's last
        value."""
        name, axis, row = self.names[s.result], int(self.two_dims), SCANS[s.op]
        text = f"{row.triton}({self.whole_tile(s.args[0])}, {axis})"
        if not self.schedule.looped:
            return [f"{name} = {text}"]
        place = self.col_axis() if len(vector_axes(self.kernel)) == 1 else "position"
        last = f"tl.where({place} == start + COLS - 1, {name}, 0)"
        return [
            f"{name} = {name}_so_far {row.cpp} {text}",
            f"{name}_so_far = tl.sum({last}, {axis}, keep_dims=True)",
        ]

    def start_of_scan(self, s: ir.Scan) -> str:
        """Return the line before a looped row's first tile."""
        rows = "ROWS" if "r" in self.dims(self.varies[s.result]) else "1"
        shape = f"({rows}, 1)" if self.two_dims else "(1,)"
        start = f"tl.full({shape}, {SCANS[s.op].start}, {TYPES[s.dtype]})"
        return f"{self.names[s.result]}_so_far = {start}"

    def whole_tile(self, value: str) -> str:
        """Return a value as text that has a column for each of the tile's."""
        text = self.texts[value].inside()
        if "c" in self.dims(self.varies[value]):
            return text
        return f"tl.where({self.col_axis()} >= 0, {text}, 0)"

    def _index(self, s: ir.Index) -> ValueText:
        text = self.expr(s.value)
        if not self.axes_in(s.value):
            return ValueText(f"tl.cast({text}, tl.int64)")
        atom = text.isidentifier()
        if self._stays_narrow(s.result):
            return ValueText(text, ATOM if atom else 0)
        return ValueText(f"{text if atom else f'({text})'}.to(tl.int64)")

    def _stays_narrow(self, index: str) -> bool:
        """Return whether an index is only compared or converted to float."""

        def plain(value: str) -> bool:
            return isinstance(self.makers[value], (ir.Index, ir.Constant))

        for s in self.kernel.body:
            if index in ir.needs_of(s):
                if not isinstance(s, ir.Compute) or not all(plain(a) for a in s.args):
                    return False
                if s.op not in COMPARISONS and not (s.op == "cast" and s.dtype.is_floating_point):
                    return False
        return True

    def _compute(self, s: ir.Compute) -> ValueText:
        template = PRIMITIVES[s.op].triton
        name = template.partition("(")[0]
        template = variant(name, s.dtype) + template.removeprefix(name)
        call = re.fullmatch(r"[\w.]+\([^()]*\)", template) is not None
        args = [self._argument(a, s) for a in s.args]
        made = [isinstance(self.makers[a], ir.Constant) for a in s.args]
        if s.op == "cast" and made[0]:
            constant = self.makers[s.args[0]]
            assert isinstance(constant, ir.Constant)
            return ValueText(literal(constant.value, s.dtype))
        own, wanted = LEVELS.get(s.op, (0, (ATOM,) * len(args)))
        if s.op == "div" and self._is_total(s.args[1]):
            # At least 1 unless NaN or empty: one division per row, then multiplications.
            args[1] = ValueText(f"(1.0 / {args[1].text})")
            template, own, wanted = PRIMITIVES["mul"].triton, *LEVELS["mul"]
        level = ATOM if call or s.op == "cast" else own
        parts = [x.text if call else x.inside(w) for x, w in zip(args, wanted, strict=True)]
        text = template.format(*parts, type=TYPES[s.dtype])
        values = made[1:] if s.op == "where" else made
        if all(values) and s.op not in COMPARISONS and s.op != "cast":
            return ValueText(f"{ValueText(text, level).inside()}.to({TYPES[s.dtype]})")
        return ValueText(text, level)

    def _is_total(self, value: str) -> bool:
        """Return whether a value is the sum of a softmax's exponentials."""
        maker = self.makers[value]
        return isinstance(maker, ir.Reduce) and maker.op == "softmax" and value != maker.results[0]

    def _argument(self, value: str, user: ir.Compute) -> ValueText:
        """Return a value as source; device functions need tensors, also for constants."""
        text, function = self.texts[value], PRIMITIVES[user.op].triton.partition("(")[0]
        if isinstance(self.makers[value], ir.Constant) and function in TENSOR_FUNCTIONS:
            tensors = [a for a in user.args if not isinstance(self.makers[a], ir.Constant)]
            return ValueText(f"tl.zeros_like({self.texts[tensors[0]].text}) + {text.text}", 1)
        return text

    def may_inline(self, s: ir.Statement, user: ir.Statement | None) -> bool:
        """Return whether `s` may be written inside `user`, the only statement that needs it."""
        if not isinstance(s, ir.Compute) or not isinstance(user, (ir.Compute, ir.Store)):
            return False
        if isinstance(user, ir.Store):
            return user.value == s.result and user.access.mask != s.result
        return not re.search(r"\{0\}.*\{0\}", PRIMITIVES[user.op].triton)

    def expr(self, value: Expr) -> str:
        """Return an index expression as Triton source."""
        plain = {
            x: sympy.Symbol(self.names[x.name[1:]] if x.name[0] == "%" else x.name[1:])
            for x in value.free_symbols
            if x.name[0] in "@%"
        }
        return size_text(value.xreplace(plain))


def _numbered(name: str, taken: Set[str]) -> str:
    """Return the name of a value loaded from a tensor, numbered if already taken."""
    if name not in taken:
        return name
    return next(f"{name}{k}" for k in itertools.count(1) if f"{name}{k}" not in taken)
