"""Walk: the folders and files that a call enters, in order, as a reader goes through them.

In: nothing. Out: for `turbotx.optimize(f)(x)`, a first call and a second one, the folders of the
package as a tree, each below the one that calls it, with the files in it that run; and the folders
that are entered again by one that they called::

    python -m tests.layout.walk
        engine: optimize.py, engine.py, ...
          capture: arguments.py, trace.py, ...
            ir: expr.py, ...
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

import turbotx

PACKAGE = Path(turbotx.__file__).parent

Way = tuple[str, ...]
"""The folders from the call down to a function, neighbours that are equal once."""


def ways_down(call: Callable[[], object]) -> dict[Way, list[str]]:
    """Return every way down through the folders, with the files entered at its end, both in order.

    A folder is one of the package, or a file at its top.
    """
    found: dict[Way, dict[str, None]] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and (file := file_of(frame)):
            files = found.setdefault(way_to(frame), {})
            files.setdefault(file.partition("/")[2] or file)

    gc.collect()  # what other code left is not cleared during the call
    was_on = gc.isenabled()
    gc.disable()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        if was_on:
            gc.enable()
    return {way: list(files) for way, files in found.items()}


def file_of(frame: FrameType) -> str:
    """Return the file of a function of the package, relative to it; empty for other frames and for
    bodies of modules and classes, which run at an import and are no calls."""
    name = frame.f_code.co_filename
    if not name.startswith(str(PACKAGE)) or not frame.f_code.co_flags & inspect.CO_NEWLOCALS:
        return ""
    return Path(name).relative_to(PACKAGE).as_posix()


def way_to(frame: FrameType) -> Way:
    """Return the folders from the first function of the package down to `frame`.

    A nested function that is passed down, such as a predicate, is part of the function that holds
    it: what it calls is called by that one.
    """
    folders: list[str] = []
    at: FrameType | None = frame
    while at is not None:
        if file := file_of(at):
            folder = file.partition("/")[0]
            if folders[-1:] != [folder]:
                folders.append(folder)
        at = holder_of(at) or at.f_back
    return tuple(reversed(folders))


def holder_of(frame: FrameType) -> FrameType | None:
    """Return the running frame whose function defines this nested one, or None."""
    at = frame.f_back if frame.f_code.co_flags & inspect.CO_NESTED else None
    while at is not None and frame.f_code not in at.f_code.co_consts:
        at = at.f_back
    return at


def entered_again(ways: dict[Way, list[str]]) -> dict[Way, list[str]]:
    """Return the ways at whose end a folder is entered that is on the way already."""
    return {way: files for way, files in ways.items() if way[-1] in way[:-1]}


def as_tree(ways: Iterable[Way]) -> list[Way]:
    """Return the ways and the beginnings of each, every way behind the one it goes on from."""
    order = {way[:k]: None for way in ways for k in range(1, len(way) + 1)}
    place = {way: k for k, way in enumerate(order)}
    return sorted(order, key=lambda way: [place[way[:k]] for k in range(1, len(way) + 1)])


def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Softmax over a product: a GEMM and a fused run."""
    return F.softmax(F.linear(x, weight) * 0.5, dim=-1)


def main() -> None:
    fast = turbotx.optimize(block)
    x, weight = torch.randn(2, 5, 16), torch.randn(16, 16)
    for title in ("first call", "second call"):
        ways = ways_down(lambda: fast(x, weight))
        print(f"{title}, {len({way[-1] for way in ways})} folders:")
        for way in as_tree(ways):
            print(f"{'  ' * len(way)}{way[-1]}: {', '.join(ways.get(way, []))}")
        for way, files in entered_again(ways).items():
            print(f"  entered again: {' > '.join(way)}: {', '.join(files)}")


if __name__ == "__main__":
    main()
