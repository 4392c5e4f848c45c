"""Profile of a saved model: the time of every launch, by its name in the file.

In: a module of `turbotx.load` and one call's inputs. Out: a `Profile` without bytes and operations,
which require the model's graph, and the sizes by name::

    profile_saved(model, (), {"input_ids": ids}, runs=30)  ->  Profile(...), {"batch": 2, "seq": 16}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turbotx.capture.arguments import tensors_of
from turbotx.program.executable import CalledLaunch
from turbotx.report.entries import LaunchEntry, TrafficEntry
from turbotx.report.profile import Profile, time_program
from turbotx.saved.load import SavedModule

_UNKNOWN = TrafficEntry(0, 0, 0, "", "", 0, "")


def profile_saved(
    model: SavedModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], runs: int
) -> tuple[Profile, dict[str, int]]:
    """Return medians over `runs` runs, of a step always from the same past; not thread-safe."""
    table, args, plain = model.plain_call(args, dict(kwargs))
    call, binding = table.find(args, plain)
    launches = [
        LaunchEntry(
            x.name, "aten" if isinstance(x, CalledLaunch) else "kernel", "", "", x.source, (),
            x.writes, _UNKNOWN,
        )
        for x in call.program.executable.launches
    ]  # fmt: skip
    found = time_program(call.program, launches, binding, tensors_of(args, plain), runs)
    return found, dict(zip(call.program.dims, binding.dims, strict=True))
