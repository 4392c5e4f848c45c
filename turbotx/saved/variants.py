"""Variants: finds, before saving, every kernel that a GPU program can need at any shape.

In: a compiled family and what decides between its variants. Out: a `SavedFamily` with a row for
each possible combination. Deciding sizes take one value per range, multiples of 16 or not; the
family itself returns what it would launch, on a grid that records its computation::

    pick({length: 1024, seq: 17})  ->  fused_softmax_0 by tiles of 1024, on "-(-s3 // 2)" programs
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partialmethod
from typing import Any, cast

import sympy

from turbotx.errors import SaveError
from turbotx.ir.expr import Expr, compile_evaluator, sizes_of
from turbotx.kernels.gemm_heuristics import bucket_of
from turbotx.kernels.job import Job
from turbotx.kernels.schedule import INT32_LIMIT
from turbotx.runtime.cuda.gemm import GemmFamily
from turbotx.runtime.cuda.runtime import Compiling, LaunchKernels
from turbotx.runtime.cuda.settings import assume_tf32
from turbotx.runtime.cuda.variants import LARGE
from turbotx.saved.families import ALIGNED, SavedFamily, TableDeciders, make_key

# With more combinations of remainders of all dims than this, every mask counts as possible.
MOST_REMAINDERS = 1 << 18
# The value of sizes that decide nothing, while a family is queried.
SOME = 3


class Variants:
    """The kernels of one target's programs, without duplicates. needed: for each, whether it is
    built ahead; kernels only for 64-bit sizes are stored as source."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.needed: list[bool] = []
        self._numbers: dict[str, int] = {}
        self._by_object: dict[int, tuple[Job, int]] = {}

    def number(self, job: Job, wide: bool) -> int:
        """Return a job's index among the file's kernels. wide: it is only used for sizes that need
        64 bits, so its source suffices."""
        found = self._by_object.get(id(job))
        if found is None:
            number = self._numbers.setdefault(job.digest(), len(self.jobs))
            if number == len(self.jobs):
                self.jobs.append(job)
                self.needed.append(False)
            found = self._by_object[id(job)] = (job, number)
        self.needed[found[1]] |= not wide
        return found[1]


class _Traced(int):
    """A size that records, through a grid's arithmetic, how a number was computed from it."""

    text: str
    places: frozenset[int]

    @classmethod
    def make(cls, value: int, text: str, places: frozenset[int]) -> _Traced:
        made = cls(value)
        made.text, made.places = text, places
        return made

    def _join(
        self, other: int, sign: str, compute: Callable[[int, int], int], swapped: bool
    ) -> _Traced:
        text = other.text if isinstance(other, _Traced) else f"({int(other)})"
        places = self.places | (other.places if isinstance(other, _Traced) else frozenset())
        sides, numbers = (self.text, text), (int(self), int(other))
        if swapped:
            sides, numbers = sides[::-1], numbers[::-1]
        return self.make(compute(*numbers), f"({sides[0]} {sign} {sides[1]})", places)

    def bounded(self, size: int, least: int, *most: int) -> _Traced:
        """As `ir.size_functions.bounded`."""
        given = (size, *most)
        places = frozenset[int]().union(*(x.places for x in given if isinstance(x, _Traced)))
        texts = ", ".join(x.text if isinstance(x, _Traced) else str(int(x)) for x in given)
        value = max(least, min(map(int, given)))
        return self.make(value, f"max({least}, min({texts}))", places)

    def __neg__(self) -> _Traced:
        return self.make(-int(self), f"(-{self.text})", self.places)


for _sign, _op in (("//", "floordiv"), ("*", "mul"), ("+", "add"), ("-", "sub")):
    for _swapped in (False, True):
        _how = {"sign": _sign, "compute": getattr(operator, _op), "swapped": _swapped}
        setattr(_Traced, f"__{'r' * _swapped}{_op}__", partialmethod(_Traced._join, **_how))


class _ProgramSizes:
    """A program's sizes by index, most of them arbitrary."""

    def __init__(self, constants: Mapping[int, int], given: Mapping[int, int], traced: bool):
        self._constants, self._given, self._traced = constants, given, traced

    def __getitem__(self, place: int) -> int:
        if place in self._constants:
            return self._constants[place]
        value = self._given.get(place, SOME)
        return _Traced.make(value, f"s{place}", frozenset({place})) if self._traced else value


class Tabulator:
    """Makes tables of one program's families."""

    def __init__(self, kernels: LaunchKernels, variants: Variants) -> None:
        self._kernels, self._executable, self._variants = kernels, kernels.executable, variants
        self._sizes = list(kernels.table.values)
        self._constants = {k: int(e) for k, e in enumerate(self._sizes) if e.is_Integer}
        self._adapted: dict[int, tuple[Job, Job]] = {}

    def tabulate(self, family: Compiling) -> SavedFamily:
        """Return a family as a table; raise SaveError if the table would answer differently."""
        by, even, large = self._deciders(family)
        masks = self._masks(even)
        asked: dict[str, tuple[Any, bool]] = {}
        for tf32, wide in itertools.product((False, True), (False, True) if large else (False,)):
            for ranges in itertools.product(*(range(len(most)) for _, most in by)):
                for mask in masks:
                    given = self._sample(by, ranges, even, mask, large, wide)
                    if given is not None and self._serves(family, given):
                        asked[make_key(tf32, ranges, mask, wide)] = (given, wide)
        table = _Table(TableDeciders(by, even, large, LARGE, True), self._variants)
        for key, (given, wide) in asked.items():
            with assume_tf32(key[0] == "1"):
                plain, traced = (
                    family.pick(
                        cast(Sequence[int], _ProgramSizes(self._constants, given, is_traced))
                    )
                    for is_traced in (False, True)
                )
            assert [p.job for p in plain] == [p.job for p in traced]
            table.add(key, [(p.which, p.job, p.grid) for p in traced], wide, self._adapt)
        return table.finish()

    def _adapt(self, job: Job) -> Job:
        """Return a job as it is built; equal objects for equal jobs, since rows identify them by
        object."""
        if id(job) not in self._adapted:
            self._adapted[id(job)] = job, self._kernels.adapt(job)
        return self._adapted[id(job)][1]

    def _deciders(
        self, family: Compiling
    ) -> tuple[list[tuple[int, list[int]]], list[int], list[int]]:
        """Return the sizes that decide, without duplicates and constants."""
        found, bounds = family.deciders, dict[int, set[int]]()
        for place, most in found.by:
            if place not in self._constants:
                bounds.setdefault(place, set()).update(most)
        even, large = (
            [k for k in dict.fromkeys(places) if k not in self._constants]
            for places in (found.even, found.large)
        )
        return [(k, sorted(most)) for k, most in bounds.items()], even, large

    def _serves(self, family: Compiling, given: Mapping[int, int]) -> bool:
        """Return whether the program serves calls with this many tokens."""
        served = self._executable.token_range
        if served is None or not isinstance(family, GemmFamily) or family.tokens not in given:
            return True
        tokens = sizes_of([self._sizes[family.tokens]])
        return bucket_of(given[family.tokens]) in served.buckets_of(tokens)

    def _sample(
        self, by: Sequence[tuple[int, Sequence[int]]], ranges: Sequence[int],
        even: Sequence[int], mask: int, large: Sequence[int], wide: bool,
    ) -> dict[int, int] | None:  # fmt: skip
        """Return sizes that lead to this row; None if there are none."""
        multiple = {place: bool(mask >> bit & 1) for bit, place in enumerate(even)}
        given = {place: 16 if yes else 17 for place, yes in multiple.items()}
        for (place, most), k in zip(by, ranges, strict=True):
            least, open_ended = most[k - 1] + 1 if k else 0, k + 1 == len(most)
            # The last range is unbounded: its least value keeps other sizes small.
            value = least if open_ended and k else most[k]
            if place in multiple and multiple[place] != (value % ALIGNED == 0):
                down = value // ALIGNED * ALIGNED if multiple[place] else value - 1
                up = -(-value // ALIGNED) * ALIGNED if multiple[place] else value + 1
                value = up if down < least and open_ended else down
            if value < least:
                return None
            given[place] = value
        if wide:
            last = {
                place for (place, most), k in zip(by, ranges, strict=True) if k + 1 == len(most)
            }
            ranged = {place for place, _ in by}
            free = [k for k in large if k not in ranged] or [k for k in large if k in last]
            if not free:
                return None
            given[free[0]] = INT32_LIMIT + (not multiple.get(free[0], True))
        return given

    def _masks(self, even: Sequence[int]) -> list[int]:
        """Return which of the sizes can be multiples of 16 at the same time, as bit masks."""
        sizes = [self._sizes[k] for k in even]
        names = sorted({s.name for e in sizes for s in e.free_symbols})
        period = ALIGNED * math.lcm(1, *(_divisor(e) for e in sizes))
        if period ** len(names) > MOST_REMAINDERS:
            return list(range(1 << len(even)))
        evaluate = compile_evaluator(sizes, names)
        return sorted(
            {
                sum(1 << bit for bit, v in enumerate(evaluate(*dims)) if v % ALIGNED == 0)
                for dims in itertools.product(range(period, 2 * period), repeat=len(names))
            }
        )


def _divisor(size: Expr) -> int:
    """Return a number with which all floor divisions and remainders in a size are periodic."""
    found = 1
    for node in sympy.preorder_traversal(size):
        if len(node.args) == 2 and type(node).__name__ in ("FloorDiv", "Mod", "PythonMod"):
            by = node.args[1]
            found *= int(by) if by.is_Integer else MOST_REMAINDERS
    return found


class _Table:
    """Collects rows; equal choices and grids are stored once."""

    def __init__(self, decision: TableDeciders, variants: Variants) -> None:
        self._decision, self._variants = decision, variants
        self._rows: dict[str, int] = {}
        self._choices: dict[tuple[tuple[str, int | None, int], ...], int] = {}
        self._grids: dict[tuple[tuple[int, ...], tuple[str, ...]], int] = {}

    def add(
        self, key: str, parts: Sequence[tuple[str, Any, Any]], wide: bool,
        adapt: Callable[[Job], Job],
    ) -> None:  # fmt: skip
        choice = tuple(
            (which, None if job is None else self._variants.number(adapt(job), wide),
             self._grid(grid))
            for which, job, grid in parts
        )  # fmt: skip
        self._rows[key] = self._choices.setdefault(choice, len(self._choices))

    def _grid(self, grid: Sequence[int]) -> int:
        places = sorted({k for x in grid if isinstance(x, _Traced) for k in x.places})
        texts = tuple(x.text if isinstance(x, _Traced) else str(x) for x in grid)
        return self._grids.setdefault((tuple(places), texts), len(self._grids))

    def finish(self) -> SavedFamily:
        """Return the table, without TF32 if that makes no difference."""
        rows = self._rows
        plain = {k: c for k, c in rows.items() if k[0] == "0"}
        tf32 = any(rows["1" + k[1:]] != c for k, c in plain.items())
        decision = replace(self._decision, tf32=tf32)
        rows = rows if tf32 else plain
        return SavedFamily(decision, rows, list(self._choices), list(self._grids), ())


def check_table(
    family: Compiling, saved: SavedFamily, adapt: Callable[[Any], Job],
    sizes: Iterator[Sequence[int]],
) -> None:  # fmt: skip
    """Raise SaveError if a table's answer differs from its family's at one of these sizes."""
    for values in sizes:
        for tf32 in (False, True):
            with assume_tf32(tf32):
                expected = family.pick(values)
                found = saved.pick(values)
            wanted = [(p.which, p.job and adapt(p.job), tuple(p.grid)) for p in expected]
            kept = [(p.which, p.job, tuple(p.grid)) for p in found]
            if kept != wanted:
                raise SaveError(
                    f"a launch chooses its kernel by more than a file can say: {found} for "
                    f"{expected}; please report it"
                )
