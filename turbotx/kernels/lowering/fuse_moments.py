"""Moments: replaces hand-written means and variances by one Welford reduction.

In: a kernel after lowering. Out: an equivalent kernel with fewer dependent reductions, and means as
exact as their deviations. For example a LayerNorm of sums, and a mean beside a variance::

    total = sum(x); mean = total / n; squares = sum((x - mean)**2)  ->  mean, squares = welford(x)
    total = sum(x); mean = total / n; _, m2 = welford(x)            ->  mean, m2 = welford(x)

For a row with infinities `welford` returns no mean; if total / n is infinite, it is used instead.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from turbotx import ir
from turbotx.ir.expr import product


def join_moments(kernel: ir.Kernel) -> ir.Kernel:
    """Return the kernel with one `welford` for each value whose mean and deviations it sums.

    Statements that become unused are left to dead-code elimination.
    """
    found = _Moments(kernel)
    if not found.joined:
        return kernel
    squares = {s.results[0]: found.joined[x].results[1] for x, s in found.squares.items()}
    done: set[str] = set()
    body: list[ir.Statement] = []
    for s in kernel.body:
        if isinstance(s, ir.Reduce) and s.op in ("sum", "welford"):
            (x,) = s.args
            if x in found.joined and x not in done:  # its users come after the first sum
                done.add(x)
                body.append(found.joined[x])
        results = ir.results_of(s)
        if results and results[0] in found.replaced:
            continue
        s = ir.rename(s, squares)
        if isinstance(s, ir.Compute) and s.result in found.means:
            body += _choose_mean(s, found.joined[found.means[s.result]].results[0])
        else:
            body.append(s)
    return replace(kernel, body=tuple(body))


def _choose_mean(quotient: ir.Compute, exact: str) -> list[ir.Statement]:
    """Return statements that define the mean: `exact`, or the quotient if that is NaN."""
    mean, dtype = quotient.result, quotient.dtype
    plain, unknown = f"{mean}_plain", f"{mean}_unknown"
    return [
        replace(quotient, result=plain),
        ir.Compute(unknown, "isnan", (exact,), torch.bool),
        ir.Compute(mean, "where", (unknown, plain, exact), dtype),
    ]


class _Moments:
    """The sums of a kernel.

    means: quotient of a sum of x and the count -> x. squares: x -> sum of its squared differences
    from the mean. joined: x -> the reduction that computes both. replaced: the results that replace
    them.
    """

    def __init__(self, kernel: ir.Kernel) -> None:
        self.makers = {r: s for s in kernel.body for r in ir.results_of(s)}
        self.columns = product([a.extent for a in kernel.columns])
        reduces = [s for s in kernel.body if isinstance(s, ir.Reduce)]
        means = {s.result: x for s in kernel.body
                 if isinstance(s, ir.Compute) and (x := self._averaged(s.result))}  # fmt: skip
        self.squares = {x: s for s in reduces if (x := self._deviating(s))}
        self.joined: dict[str, ir.Reduce] = {}
        for mean, x in means.items():
            known = next((s for s in reduces if s.op == "welford" and s.args == (x,)), None)
            if known:
                self.joined[x] = known
            elif x in self.squares:
                squares = self.squares[x]
                results = (f"{mean}_exact", squares.results[0])
                self.joined[x] = ir.Reduce(results, "welford", (x,), squares.dtype)
        self.means = {mean: x for mean, x in means.items() if x in self.joined}
        self.replaced = {s.results[0] for s in (*self.joined.values(), *self.squares.values())}

    def _averaged(self, value: str) -> str | None:
        """Return x if a value is sum(x) / the number of columns."""
        s = self.makers[value]
        if not isinstance(s, ir.Compute) or s.op != "div" or not self._counts(s.args[1]):
            return None
        total = self.makers[s.args[0]]
        return total.args[0] if isinstance(total, ir.Reduce) and total.op == "sum" else None

    def _deviating(self, s: ir.Reduce) -> str | None:
        """Return x if a reduction is the sum of (x - mean(x))**2."""
        square = self.makers[s.args[0]]
        if s.op != "sum" or not isinstance(square, ir.Compute) or square.op != "mul":
            return None
        away = self.makers[square.args[0]]
        if square.args[0] != square.args[1] or not isinstance(away, ir.Compute):
            return None
        if away.op != "sub" or self._averaged(away.args[1]) != away.args[0]:
            return None
        return away.args[0]

    def _counts(self, value: str) -> bool:
        """Return whether a value is the number of columns, as a float."""
        s = self.makers[value]
        if isinstance(s, ir.Compute) and s.op == "cast":
            whole = self.makers[s.args[0]]
            return isinstance(whole, ir.Index) and whole.value == self.columns
        if not isinstance(s, ir.Constant) or not s.dtype.is_floating_point:
            return False
        return bool(self.columns.is_Integer) and s.value == int(self.columns)
