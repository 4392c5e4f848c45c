"""Reductions as Triton source: carried values, combine functions, one `tl.reduce` for several.

In: the reductions of one sweep over the same tile. Out: the text of one combine function and of the
calls around it. Independent reductions share it, and with it shuffles and barriers::

    mean, m2, mean_low, mean_count = tl.reduce((part, zero, zero, count), 0, combine)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turbotx import ir

TYPES = {
    torch.float32: "tl.float32", torch.float64: "tl.float64", torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16", torch.int64: "tl.int64", torch.int32: "tl.int32",
    torch.int16: "tl.int16", torch.int8: "tl.int8", torch.uint8: "tl.uint8", torch.bool: "tl.int1",
    torch.float8_e4m3fn: "tl.float8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """The state that a reduction carries.

    parts: the carried values. join: lines that combine two states, `_a` and `_b`. neutral: the
    state of no elements ("lowest" and "highest": the dtype's limits). element: the state of one
    element x. finish: lines after the last combination; of_nothing: further lines if there may be
    no elements.
    """

    parts: tuple[str, ...]
    join: tuple[str, ...]
    neutral: tuple[str, ...]
    element: tuple[str, ...] = ("{x}",)
    finish: tuple[str, ...] = ()
    of_nothing: tuple[str, ...] = ()


STATES = {
    "sum": State(("total",), ("{total} = {total}_a + {total}_b",), ("0",)),
    "prod": State(("product",), ("{product} = {product}_a * {product}_b",), ("1",)),
    "max": State(("largest",), ("{largest} = maximum({largest}_a, {largest}_b)",), ("lowest",)),
    "min": State(
        ("smallest",), ("{smallest} = minimum({smallest}_a, {smallest}_b)",), ("highest",)
    ),
    "any": State(("some",), ("{some} = {some}_a | {some}_b",), ("0",), ("{x}.to(tl.int32)",)),
    "all": State(("every",), ("{every} = {every}_a & {every}_b",), ("1",), ("{x}.to(tl.int32)",)),
    # Parts of any size merge without cancellation (Chan, Golub & LeVeque 1979), however large
    # the mean is beside the deviation. Near 1e4 float32 has steps of 1e-3: `low` carries what
    # rounding took from the mean (a sum in two words, Dekker 1971), or m2 would be off by 4e-4.
    "welford": State(
        ("mean", "m2", "low", "count"),
        (
            "{count} = {count}_a + {count}_b",
            "{share} = {count}_b / tl.maximum({count}, 1.0)  # of nothing and nothing: 0",
            "{delta} = {mean}_b - {mean}_a",
            "{below} = {low}_b - {low}_a",
            "{step} = {delta} * {share}",
            "{mean} = {mean}_a + {step}",
            "{low} = {low}_a + {below} * {share} + ({step} - ({mean} - {mean}_a))",
            "{delta} += {below}",
            "{m2} = {m2}_a + {m2}_b + {delta} * {delta} * {count}_a * {share}",
        ),
        ("0", "0", "0", "0"),
        ("{x}", "tl.zeros_like({x})", "tl.zeros_like({x})", "tl.zeros_like({x}) + 1.0"),
        ("{mean} += {low}",),
        ('{mean} = tl.where({count} > 0, {mean}, float("nan"))',),
    ),
    # Largest value and sum of exp(x - largest) together (Milakov & Gimelshein 2018). Equal
    # maxima fade by exp(0) also where they are infinite; an infinite element itself gives NaN.
    "softmax": State(
        ("largest", "total"),
        (
            "{largest} = maximum({largest}_a, {largest}_b)",
            "{gap} = tl.abs({largest}_a - {largest}_b)",
            "{fade} = tl.where({largest}_a == {largest}_b, 1.0, tl.exp(-{gap}))",
            "{ahead} = {largest}_a > {largest}_b",
            "{total} = {total}_a * tl.where({ahead}, 1.0, {fade})"
            " + {total}_b * tl.where({ahead}, {fade}, 1.0)",
        ),
        ("lowest", "0"),
        ("{x}", 'tl.where({x} == float("inf"), float("nan"), 1.0)'),
    ),
}
# Reductions for which a row in registers is looked at again, in steps of plain sums and maxima. It
# costs no memory: joining elements one by one took a warp about 1,150 instructions for 768 of them,
# as many as it has slots for while memory brings the next row (H200, a norm or a softmax alone at
# 58 % of a copy).
HELD = ("welford", "softmax")
LOCALS = ("share", "delta", "below", "step", "gap", "fade", "ahead")


@dataclass(frozen=True)
class HeldTile:
    """A tile kept in registers: its name, number of columns as text, whether it has columns past
    the end, whether it is 0 there, and the reduced axis."""

    x: str
    count: str
    masked: bool
    is_zero_outside: bool
    axis: int

    def among(self, text: str, otherwise: str = "0.0") -> str:
        """Return `text` masked to the existing columns."""
        return f"tl.where(col_ok, {text}, {otherwise})" if self.masked else text

    @property
    def keep(self) -> str:
        """The argument that keeps the reduced axis, "" for a one-dimensional tile."""
        return ", keep_dims=True" if self.axis else ""

    def reduce(self, op: str, results: Sequence[str]) -> list[str]:
        """Return the lines that compute the results of a reduction in `HELD`."""
        return {"welford": self._welford, "softmax": self._softmax}[op](*results)

    def _welford(self, mean: str, m2: str) -> list[str]:
        share, off, low = f"{mean}_share", f"{mean}_off", f"{mean}_low"
        x = self.x if self.is_zero_outside else self.among(self.x)
        # Shares are added, since the sum of large elements may overflow. `low` is what rounding
        # took from the mean: near 1e4 float32 has steps of 1e-3, and m2 would be off by 4e-4.
        return [
            f"{share} = 1.0 / ({self.count})",
            f"{mean} = {self._sum(f'{x} * {share}')}",
            f"{off} = {self.among(f'{self.x} - {mean}')}",
            f"{low} = {self._sum(f'{off} * {share}')}",
            f"{off} = {self.among(f'{off} - {low}')}",
            f"{m2} = {self._sum(f'{off} * {off}')}",
            f"{mean} += {low}",
        ]

    def _softmax(self, largest: str, total: str) -> list[str]:
        lowest = neutral("lowest", torch.float32)
        # Columns past the end are never looked at again: as -inf they need no mask, and whoever
        # wants exp(x - largest) finds it computed.
        lines, seen = [], self.among(self.x, lowest)
        if self.masked and self.x.isidentifier():
            lines, seen = [f"{self.x} = {seen}"], self.x
        return [
            *lines,
            f"{largest} = tl.reduce({seen}, {self.axis}, maximum{self.keep})",
            f"{total} = {self._sum(f'tl.exp({seen} - {largest})')}",
            # No elements, or all -inf.
            f"{total} = tl.where({largest} == {lowest}, 0.0, {total})",
        ]

    def _sum(self, text: str) -> str:
        return f"tl.sum({text}, {self.axis}{self.keep})"


def neutral(kind: str, dtype: torch.dtype) -> str:
    """Return the text of a neutral value in `dtype`."""
    floating = dtype.is_floating_point
    if kind in ("lowest", "highest"):
        if floating:
            return 'float("-inf")' if kind == "lowest" else 'float("inf")'
        bounds = torch.iinfo(dtype) if dtype is not torch.bool else None
        low, high = (0, 1) if bounds is None else (bounds.min, bounds.max)
        return str(low if kind == "lowest" else high)
    return f"{kind}.0" if floating else kind


def carried_dtype(r: ir.Reduce) -> torch.dtype:
    """Return the dtype of a reduction's carried parts: int32 for bool."""
    return torch.int32 if r.dtype is torch.bool else r.dtype


@dataclass(frozen=True)
class Group:
    """Reductions that share one `tl.reduce`, and the name of their combine function.

    shape: the tile's shape as text. masked: whether columns past the end must be excluded.
    maybe_empty: whether a row may have no columns.
    """

    reduces: tuple[ir.Reduce, ...]
    shape: str
    masked: bool
    combine: str
    maybe_empty: bool = False

    def parts(self) -> list[tuple[ir.Reduce, str, str]]:
        """Return (reduction, part, name) of all carried parts, in order.

        A part that is a result has the result's name.
        """
        found = []
        for r in self.reduces:
            names = [
                *r.results,
                *(f"{r.results[0]}_{p}" for p in STATES[r.op].parts[len(r.results) :]),
            ]
            found += [(r, p, n) for p, n in zip(STATES[r.op].parts, names, strict=True)]
        return found

    @property
    def simple(self) -> str | None:
        """The built-in reduction that computes it, if there is one."""
        if len(self.reduces) > 1 or self.reduces[0].dtype is torch.bool:
            return None
        return {"sum": "tl.sum", "max": "maximum", "min": "minimum"}.get(self.reduces[0].op)

    def function(self) -> str:
        """Return the text of the combine function, "" if a built-in one is used."""
        if self.simple:
            return ""
        lines, arguments = [], []
        for k, r in enumerate(self.reduces):
            suffix = str(k) if len(self.reduces) > 1 else ""
            state = STATES[r.op]
            names = {n: n + suffix for n in (*state.parts, *LOCALS)}
            lines += ["    " + line.format_map(names) for line in state.join]
            arguments += [names[p] for p in state.parts]
        halves = ", ".join([f"{a}_a" for a in arguments] + [f"{a}_b" for a in arguments])
        body = "\n".join(lines)
        head = f"@triton.jit\ndef {self.combine}({halves}):"
        return f"{head}\n{body}\n    return {', '.join(arguments)}\n"

    def elements(self, name: dict[str, str]) -> list[str]:
        """Return the text of the tile's elements as states; `name`: names of the values."""
        texts = []
        for r in self.reduces:
            state, x = STATES[r.op], name[r.args[0]]
            for form, empty in zip(state.element, state.neutral, strict=True):
                text = form.format(x=x)
                if self.masked and text != f"tl.zeros_like({x})":
                    text = f"tl.where(col_ok, {text}, {neutral(empty, carried_dtype(r))})"
                texts.append(text)
        return texts

    def start(self, names: Sequence[str]) -> list[str]:
        """Return the lines that initialize the carried tiles of a looped row."""
        lines = []
        for (r, _, _), name, empty in zip(self.parts(), names, self._empties(), strict=True):
            dtype = carried_dtype(r)
            lines.append(f"{name} = tl.full({self.shape}, {neutral(empty, dtype)}, {TYPES[dtype]})")
        return lines

    def _empties(self) -> list[str]:
        return [e for r in self.reduces for e in STATES[r.op].neutral]

    def step(self, names: Sequence[str], elements: Sequence[str]) -> list[str]:
        """Return the lines that accumulate a tile's elements into the carried tiles."""
        if self.simple == "tl.sum":
            return [f"{names[0]} += {elements[0]}"]
        function = self.simple or self.combine
        return [f"{', '.join(names)} = {function}({', '.join([*names, *elements])})"]

    def finish(self, results: Sequence[str], tiles: Sequence[str], axis: int) -> list[str]:
        """Return the lines that reduce the tiles along `axis` to the results."""
        keep = ", keep_dims=True" if axis else ""
        if self.simple == "tl.sum":
            return [f"{results[0]} = tl.sum({tiles[0]}, {axis}{keep})"]
        function = self.simple or self.combine
        given, target = ", ".join(tiles), ", ".join(results)
        if len(tiles) > 1:
            given = f"({given})"
        lines = [f"{target} = tl.reduce({given}, {axis}, {function}{keep})"]
        named: dict[ir.Reduce, dict[str, str]] = {}
        for (r, part, _), name in zip(self.parts(), results, strict=True):
            named.setdefault(r, {})[part] = name
            if r.dtype is torch.bool:
                lines.append(f"{name} = {name} != 0")
        for r, names in named.items():
            state = STATES[r.op]
            ending = state.finish + (state.of_nothing if self.maybe_empty else ())
            lines += [line.format_map(names) for line in ending]
        return lines
