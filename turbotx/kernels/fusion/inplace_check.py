"""An independent check of in-place reuse, on the source that a compiler gets.

In: C++ or Triton source of one kernel, and pairs of its pointers that may be the same bytes. Out:
nothing, or a VerifyError that names the kernel, the pair and the rule. It shares no code with the
choice of the pairs, and ignores sweeps, phases and schedules::

    VerifyError: fused_add_0 writes add over x in place, and reads x at 'row * 16 + col' after it
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from turbotx.errors import VerifyError

_TOUCH = re.compile(r"(?:ttx::|\btl\.)(read|load|write|store)\(")
_COMMENT = re.compile(r"^\s*(?://|#(?!pragma)).*$", re.MULTILINE)
# Masks that only exclude elements past the end of a row or of the rows.
_EDGES = frozenset({"row_ok", "col_ok"})


@dataclass(frozen=True)
class _Touch:
    """A read or write of memory as printed: the pointer, the text of its offset, and whether it is
    unconditional or under a mask of the kernel's own."""

    writes: bool
    pointer: str
    offset: str
    masked: bool


def check_inplace(
    name: str, source: str, axes: Collection[str], pairs: Sequence[tuple[str, str]]
) -> None:
    """Raise VerifyError if a pair (written, read) of pointers must not be the same bytes.

    axes: names of the kernel's loops of more than one iteration, as printed. Rules: the output is
    written once, at a different offset in each iteration; the input is read only at that offset;
    neither is masked; and no read follows the write.
    """
    touches = list(_touches(_COMMENT.sub("", source))) if pairs else []
    for written, read in pairs:
        _check_pair(f"{name} writes {written} over {read} in place", touches, axes, written, read)


def _check_pair(
    what: str, touches: Sequence[_Touch], axes: Collection[str], written: str, read: str
) -> None:
    own = [t for t in touches if t.pointer in (written, read)]
    writes = [k for k, t in enumerate(own) if t.pointer == written]
    if len(writes) != 1 or not own[writes[0]].writes:
        raise VerifyError(f"{what}, and has {len(writes)} accesses to {written}")
    place = own[writes[0]].offset
    missing = set(axes) - set(re.findall(r"\w+", place))
    if missing:
        raise VerifyError(f"{what}, once for every {sorted(missing)[0]} at {place!r}")
    for k, t in enumerate(own):
        if t.masked:
            raise VerifyError(f"{what}, and touches {t.pointer} at {t.offset!r} under a mask")
        if t.pointer == read and (t.offset != place or t.writes):
            raise VerifyError(f"{what} at {place!r}, and touches {read} at {t.offset!r}")
        if t.pointer == read and k > writes[0]:
            raise VerifyError(f"{what}, and reads {read} at {t.offset!r} after it")


def _touches(source: str) -> Iterator[_Touch]:
    """Yield the reads and writes in source order."""
    for found in _TOUCH.finditer(source):
        arguments = _split(source, found.end())
        pointer, _, offset = (x.strip() for x in arguments[0].partition("+"))
        mask = next((a[5:] for a in arguments if a.startswith("mask=")), "")
        line = source[source.rfind("\n", 0, found.start()) + 1 : found.start()]
        guarded = line.rstrip().endswith("?") or line.strip().startswith("if (")
        masked = guarded or not set(filter(None, mask.split(" & "))) <= _EDGES
        yield _Touch(found[1] in ("write", "store"), pointer, offset, masked)


def _split(source: str, begin: int) -> list[str]:
    """Return the arguments of a call whose parenthesis opens before `begin`, with normalized
    spaces."""
    found, start, depth = [], begin, 0
    for k in range(begin, len(source)):
        if source[k] in "([{":
            depth += 1
        elif source[k] in ")]}":
            depth -= 1
        if depth < 0 or (source[k] == "," and depth == 0):
            found.append(" ".join(source[start:k].split()))
            start = k + 1
        if depth < 0:
            return found
    raise VerifyError(f"a bracket is never closed behind {source[begin : begin + 40]!r}")
