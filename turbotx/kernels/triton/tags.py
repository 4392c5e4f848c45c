"""Tags: the text form of GEMM and attention tiles, in options, tables and tuning results.

In: a tag such as "m64n32k128w4s3x2l1p1" or a part of it. Out: a schedule with these fields::

    with_tag(schedule, "k128s5")   # the same with 128 steps of k at a time, in five stages
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import TypeVar

from turbotx.errors import OptionsError
from turbotx.kernels.triton.attention import AttentionSchedule
from turbotx.kernels.triton.gemm_template import GemmSchedule
from turbotx.kernels.triton.products import ProductSchedule

LIBRARY = "cublas"
# letter -> field, least, most
PARTS: dict[str, tuple[str, int, int]] = {
    "m": ("m_tile", 16, 256), "n": ("n_tile", 16, 256), "q": ("q_tile", 16, 128),
    "k": ("k_tile", 16, 256), "w": ("num_warps", 1, 16), "s": ("num_stages", 1, 8),
    "x": ("splits", 1, 16), "l": ("late", 0, 1), "p": ("prefetch", 0, 2), "o": ("once", 0, 1),
}  # fmt: skip
Tiled = TypeVar("Tiled", GemmSchedule, AttentionSchedule, ProductSchedule)
AttentionTiles = AttentionSchedule | ProductSchedule


def tag_of(schedule: GemmSchedule | AttentionTiles | None) -> str:
    """Return a schedule's tag; "cublas" for None."""
    if schedule is None:
        return LIBRARY
    return "".join(
        f"{letter}{getattr(schedule, field)}"
        for letter, (field, _, _) in PARTS.items()
        if hasattr(schedule, field)
    )


def with_tag(schedule: Tiled, tag: str) -> Tiled:
    """Return a schedule with the fields of a tag; fields that it does not have are ignored.

    Raises OptionsError for an invalid tag or a value out of range.
    """
    found = re.findall(r"([a-z])(\d+)", tag)
    if not found or "".join(letter + number for letter, number in found) != tag:
        raise OptionsError(f"{tag!r} is not a tag of tiles: write as in {tag_of(schedule)!r}")
    known = {f.name for f in fields(schedule)}
    given: dict[str, int] = {}
    for letter, number in found:
        field, low, high = PARTS.get(letter, ("", 0, 0))
        if field not in known:
            continue
        value = int(number)
        power = value & (value - 1) == 0 or letter in "sx"
        if not low <= value <= high or not power:
            rule = f"{low} to {high}" + ("" if letter in "sx" else ", a power of two")
            raise OptionsError(f"tiles {tag!r}: {letter}{value} is none of {rule}")
        given[field] = value
    return replace(schedule, **given)
