"""Compare: the differences between two reports, of two versions of turbotx or of a model.

In: two parsed report.json. Out: the figures of both side by side, and the names that only one has::

    compare(before, after).figures  ->  [Figure("launches", 47, 45), Figure("bytes moved", ...)]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbotx.errors import InputError

_KEYS = ("model", "dims", "regions", "kernels", "launches", "externs", "memory")


@dataclass(frozen=True)
class Figure:
    """One number of both reports; None if a report does not have it."""

    name: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """The value after over the value before; None if one of them is missing or zero."""
        return self.after / self.before if self.before and self.after is not None else None


@dataclass(frozen=True)
class Comparison:
    """The differences between two reports.

    figures: each in both reports.
    gone, new, changed: names of kernels; changed ones have the same name and compute something
    else.
    other: what makes the two reports not comparable.
    """

    figures: tuple[Figure, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    changed: tuple[str, ...]
    other: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether they differ at most in times."""
        same = all(f.before == f.after for f in self.figures if "us" not in f.name.split())
        return same and not (self.gone or self.new or self.changed or self.other)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Return how `after` differs from `before`. Raises InputError if one is not a report.json."""
    for which, report in (("first", before), ("second", after)):
        missing = [key for key in _KEYS if key not in report]
        if missing:
            raise InputError(f"the {which} file is not a report.json: it has no {missing[0]!r}")
    first, second = _figures(before), _figures(after)
    names = list(dict.fromkeys([*first, *second]))
    old, new = ({k["name"]: k["signature"] for k in r["kernels"]} for r in (before, after))
    return Comparison(
        tuple(Figure(name, first.get(name), second.get(name)) for name in names),
        tuple(sorted(set(old) - set(new))),
        tuple(sorted(set(new) - set(old))),
        tuple(sorted(name for name in set(old) & set(new) if old[name] != new[name])),
        tuple(
            f"{key}: {before[key]} and {after[key]}"
            for key in ("model", "dims")
            if before[key] != after[key]
        ),
    )


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Return what a report counts, by name, in display order."""
    launches, memory = report["launches"], report["memory"]
    found: dict[str, float] = {"launches": len(launches)}
    kinds = Counter(x["kind"] for x in launches)
    found |= {f"launches: {kind}": count for kind, count in kinds.items()}
    found["kernels"] = len(report["kernels"])
    found["bytes moved"] = sum(x["traffic"]["compulsory_nbytes"] for x in launches)
    found["flops"] = sum(x["traffic"]["flops"] for x in launches)
    found["planned bytes"] = memory["peak_nbytes"]
    found["lower bound of bytes"] = memory["lower_bound_nbytes"]
    found |= {f"run by PyTorch: {x['op']}": x["count"] for x in report["externs"]}
    times = report.get("times_us")
    if times:
        found["us a run"] = sum(times.values())
    return found
