"""Tuned: schedules that were asked for or measured, over those of the heuristics.

In: tags such as "r2c1024w8" by kernel name (the option `schedules`) or by structure and length
(what `turbotx tune` found on a device and keeps in the cache directory). Out: a way to choose::

    choose = make_chooser((("fused_softmax*", "w8"),), "sm_90", load_tuned("NVIDIA H100"))
    choose(kernel, length=300, wide=False, strided=False)  ->  Schedule(rows=1, cols=1024, 8)
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from turbotx import ir
from turbotx.errors import OptionsError
from turbotx.kernels.build import cache_directory, write_whole
from turbotx.kernels.heuristics import heuristics_for
from turbotx.kernels.schedule import Schedule, outer_axes, power_above, schedule_for

S = TypeVar("S")
Choose = Callable[[ir.Kernel, int, bool, bool], Schedule]
# digest of a kernel -> length, rounded up to a power of two -> tag
Tuned = dict[str, dict[str, str]]

LARGEST_TILE = 32768  # elements: 64 a thread of 16 warps
# What another schedule must gain to replace one: less is within the spread of measurements.
GAIN = 0.03


def make_chooser(overrides: Sequence[tuple[str, str]], target: str, tuned: Tuned) -> Choose:
    """Return what chooses schedules for a device: overrides, then tuning, then heuristics."""
    numbers = heuristics_for(target)

    def choose(kernel: ir.Kernel, length: int, wide: bool, strided: bool) -> Schedule:
        schedule = schedule_for(kernel, length, wide, strided, numbers)
        found = tuned.get(kernel.digest(), {}).get(str(power_above(length)))
        if found is not None:
            schedule = apply(kernel, schedule, found, length)
        for pattern, tag in overrides:
            if fnmatch.fnmatch(kernel.name, pattern):
                schedule = apply(kernel, schedule, tag, length)
        return schedule

    return choose


def apply(kernel: ir.Kernel, schedule: Schedule, tag: str, length: int) -> Schedule:
    """Return a schedule with the parts that a tag names; what a kernel has no use for is left."""
    parts = parse_tag(tag)
    rows = parts.get("r", schedule.rows) if outer_axes(kernel) else 1
    cols = parts.get("c", schedule.cols)
    looped = cols < length if kernel.columns else False
    programs = parts.get("p", schedule.programs) if kernel.rows and kernel.columns else 0
    return replace(
        schedule, rows=rows, cols=cols, num_warps=parts.get("w", schedule.num_warps), looped=looped,
        programs=0 if looped else programs,
    )  # fmt: skip


def parse_tag(tag: str) -> dict[str, int]:
    """Return {"r": 2, "c": 1024, "w": 8} for "r2c1024w8"; raise OptionsError for what is no tag."""
    found = re.fullmatch(r"(?:r(\d+))?(?:c(\d+))?(?:w(\d+))?(?:p(\d+))?[lx]*", tag)
    parts = {k: int(n) for k, n in zip("rcwp", found.groups(), strict=True) if n} if found else {}
    if not parts or any(n < 1 or n & (n - 1) for n in parts.values()):
        raise OptionsError(
            f"schedule {tag!r} is none: write rows a tile, columns, warps and most programs, each "
            'a power of two, as in "r2c1024w8", "r4" or "w8p32768"'
        )
    return parts


def neighbours(kernel: ir.Kernel, schedule: Schedule, length: int) -> list[Schedule]:
    """Return schedules one step away: rows, columns or warps halved or doubled."""
    found = []
    for field, low, high in (("rows", 1, 64), ("cols", 64, LARGEST_TILE), ("num_warps", 1, 16)):
        if field == "rows" and not outer_axes(kernel):
            continue
        if field == "cols" and kernel.columns and not schedule.looped:
            continue  # a row in registers has the one tile that holds it
        for value in (getattr(schedule, field) // 2, getattr(schedule, field) * 2):
            other = replace(schedule, **{field: value})
            elements, threads = other.rows * other.cols, 32 * other.num_warps
            if kernel.columns and other.looped and other.cols >= length:
                continue
            if low <= value <= high and elements <= LARGEST_TILE and elements <= 64 * threads:
                found.append(other)
    return found


def search(
    start: S,
    step: Callable[[S], Iterable[S]],
    measure: Callable[[Sequence[S]], Sequence[float]],
) -> tuple[S, dict[S, float]]:
    """Walk from `start` to better neighbours until none is better by `GAIN`.

    measure(schedules) gives a time for each, infinity where one cannot run. Returns the best and
    all times.
    """
    times = dict(zip([start], measure([start]), strict=True))
    best = start
    while True:
        new = [s for s in dict.fromkeys(step(best)) if s not in times]
        times.update(zip(new, measure(new), strict=True))
        fastest = min([best, *new], key=lambda s: times[s])
        if times[fastest] >= times[best] * (1 - GAIN):
            return best, times
        best = fastest


def tuned_file(device: str) -> Path:
    """Return where the schedules for a device are kept."""
    return cache_directory() / "tuned" / (re.sub(r"\W+", "-", device).strip("-") + ".json")


def load_tuned(device: str) -> Tuned:
    """Return what was found on devices of this name; nothing where none was tuned."""
    path = tuned_file(device)
    return json.loads(path.read_text()) if path.exists() else {}


def save_tuned(device: str, found: Mapping[str, Mapping[str, str]]) -> Path:
    """Add to what is known of a device; return the file."""
    known, path = load_tuned(device), tuned_file(device)
    for digest, tags in found.items():
        known.setdefault(digest, {}).update(tags)
    write_whole(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return path
