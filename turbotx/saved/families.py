"""Families of a saved GPU program: tables that select a launch's kernel by sizes.

In: the deciding values, as indices into a program's sizes, and a row for every combination. Out:
what a compiled family would select, without tiles, printers or a compiler::

    SavedFamily(tables, variants).pick(sizes)  ->  [Part("kernel", Binary fused_gelu_0, (40, 1, 1))]

A row's key holds TF32, the range of each deciding size, which sizes are multiples of 16 (one bit
each), and whether a size exceeds 32 bits: "0/3/2/0".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from turbotx.errors import SavedFileError
from turbotx.ir.sizes import Sizes
from turbotx.kernels.job import Binary, Job
from turbotx.runtime.cuda.parts import Part
from turbotx.runtime.cuda.settings import uses_tf32
from turbotx.runtime.device import Grid
from turbotx.saved.values import check_texts

ALIGNED = 16


@dataclass(frozen=True)
class TableDeciders:
    """What selects a row of a table; sizes are given as indices into a program's sizes.

    by: the upper bounds of ranges; the last range is unbounded.
    even: sizes that may be multiples of 16.
    large: sizes that may reach `limit`. tf32: whether PyTorch's TF32 setting matters.
    """

    by: Sequence[tuple[int, Sequence[int]]]
    even: Sequence[int]
    large: Sequence[int]
    limit: int
    tf32: bool

    def key(self, sizes: Any) -> str:
        """Return the key of the row for these sizes."""
        ranges = [min(bisect_left(most, sizes[k]), len(most) - 1) for k, most in self.by]
        mask = sum(1 << bit for bit, k in enumerate(self.even) if sizes[k] % ALIGNED == 0)
        wide = any(sizes[k] >= self.limit for k in self.large)
        return make_key(self.tf32 and uses_tf32(), ranges, mask, wide)


def make_key(tf32: bool, ranges: Sequence[int], mask: int, wide: bool) -> str:
    """Return a table's key as text: whether TF32 is on, the range of each deciding size, which
    sizes are multiples of 16 (one bit each), and whether one reaches the limit."""
    return "/".join(str(int(x)) for x in (tf32, *ranges, mask, wide))


@dataclass(frozen=True)
class SavedFamily:
    """All variants of one launch, by rows.

    rows: key -> index of a choice.
    choices: what each queues: (list of arguments, index of a variant or None for PyTorch's part,
    index of a grid).
    grids: texts over sizes named like "s7".
    """

    decision: TableDeciders
    rows: Mapping[str, int]
    choices: Sequence[Sequence[tuple[str, int | None, int]]]
    grids: Sequence[tuple[Sequence[int], Sequence[str]]]
    variants: Sequence[Binary | Job]
    _compiled: dict[int, Callable[..., Grid]] = field(default_factory=dict)

    @classmethod
    def of(cls, tables: Mapping[str, Any], variants: Sequence[Binary | Job]) -> SavedFamily:
        """Return the family from the output of `to_json`."""
        decision = TableDeciders(**tables["decision"])
        return cls(decision, tables["rows"], tables["choices"], tables["grids"], variants)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as lists and numbers, for JSON."""
        return {
            "decision": asdict(self.decision), "rows": self.rows, "choices": self.choices,
            "grids": self.grids,
        }  # fmt: skip

    def pick(self, sizes: Sequence[int]) -> list[Part]:
        """Return what to run at these sizes; a grid with a zero means nothing. Raises
        SavedFileError if the file lacks it."""
        key = self.decision.key(sizes)
        if key not in self.rows:
            names = dict.fromkeys(v.name for v in self._used())
            raise SavedFileError(
                f"the file has no variant {key} of {', '.join(names) or 'a GEMM'}: save the model "
                "again, and report this, since a file is to have all of them"
            )
        return [
            Part(which, None if v is None else self.variants[v], self._grid(grid, sizes))
            for which, v, grid in self.choices[self.rows[key]]
        ]

    def binaries(self, tf32: bool) -> list[Binary]:
        """Return the kernels that the file has as machine code, for one TF32 setting."""
        first = str(int(self.decision.tf32 and tf32))
        chosen = {c for key, c in self.rows.items() if key[0] == first}
        numbers = (v for c in sorted(chosen) for _, v, _ in self.choices[c] if v is not None)
        found = (self.variants[v] for v in dict.fromkeys(numbers))
        return [v for v in found if isinstance(v, Binary)]

    def _used(self) -> list[Binary | Job]:
        return [self.variants[v] for choice in self.choices for _, v, _ in choice if v is not None]

    def _grid(self, grid: int, sizes: Sequence[int]) -> Grid:
        places, texts = self.grids[grid]
        evaluate = self._compiled.get(grid)
        if evaluate is None:
            names = [f"s{int(k)}" for k in places]
            check_texts(texts, names)
            evaluate = self._compiled[grid] = Sizes(tuple(texts)).compile(names)
        return evaluate(*(sizes[k] for k in places))
