"""Walk: the files that a call enters, in order: what a reader who follows one goes through.

In: nothing. Out: for `turbotx.optimize(f)(x)`, a first call and a second one, each room of the
package as it is entered, with the files in it that run::

    python -m tests.layout.walk
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

import turbotx

PACKAGE = Path(turbotx.__file__).parent


def files_entered(call: Callable[[], object]) -> list[str]:
    """Return the package's files in the order in which `call` first runs a function of them."""
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        # Bodies of modules and classes, which run at an import, are no calls.
        if event == "call" and name.startswith(str(PACKAGE)) and frame.f_code.co_flags & 2:
            found.setdefault(Path(name).relative_to(PACKAGE).as_posix())

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
    return list(found)


def rooms_entered(files: list[str]) -> dict[str, list[str]]:
    """Return the files by the folder that they lie in, folders in the order they are entered."""
    rooms: dict[str, list[str]] = {}
    for file in files:
        room, _, rest = file.partition("/")
        rooms.setdefault(room, []).append(rest or room)
    return rooms


def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Softmax over a product: a GEMM and a fused run."""
    return F.softmax(F.linear(x, weight) * 0.5, dim=-1)


def main() -> None:
    fast = turbotx.optimize(block)
    x, weight = torch.randn(2, 5, 16), torch.randn(16, 16)
    for title in ("first call", "second call"):
        print(f"{title}:")
        for room, files in rooms_entered(files_entered(lambda: fast(x, weight))).items():
            print(f"  {room}: {', '.join(files)}")


if __name__ == "__main__":
    main()
