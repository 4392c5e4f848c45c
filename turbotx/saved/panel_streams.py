"""Panel streams: the packed GEMM weights of a model, to be written for some instruction sets.

In: programs for CPUs, the state that is saved, names of instruction sets. Out: which weights are
written so, in the place of the parameters that they hold; what JSON says of them, and a stream an
instruction set, of one weight at a time::

    find_panels(programs, state, first_names)         ->  [Panels(("q.weight", ...), ...), ...]
    describe_panels(panels, state, ["avx2"], native)  ->  [{...}, ...], {"avx2.panels": Stream(...)}
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from turbotx.errors import SaveError
from turbotx.program.executable import Packing
from turbotx.runtime.cpu.executor import CpuExecutor
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.runtime.packed_sources import turning
from turbotx.runtime.packed_weight import PanelLayout, pack
from turbotx.runtime.program import Program
from turbotx.saved.container import PAGE, Stream
from turbotx.saved.parts import SavedPart
from turbotx.saved.tensor_file import NAMES, bytes_of

INSTRUCTION_SETS = {"avx2": (16, 1), "avx512": (32, 1), "avx512_bf16": (32, 2)}
"""What panels may be asked for, beside "native": columns of a panel, and how many elements of a
column lie side by side in bfloat16; in other dtypes one does."""


@dataclass(frozen=True)
class Panels:
    """One packed weight: the parameters whose rows it is in order, and of each whether these are
    the parameter's columns."""

    paths: tuple[str, ...]
    turned: tuple[bool, ...]
    gated: bool


def check_sets(names: Sequence[str]) -> list[str]:
    """Return names of instruction sets, each once; raise SaveError for one that is none."""
    for name in names:
        if name != "native" and name not in INSTRUCTION_SETS:
            known = ", ".join(map(repr, ("native", *INSTRUCTION_SETS)))
            raise SaveError(f"there are no panels for {name!r}: name some of {known}")
    return list(dict.fromkeys(names))


def find_panels(
    programs: Sequence[tuple[SavedPart, Program]], state: Mapping[str, torch.Tensor],
    first_names: Mapping[str, str],
) -> list[Panels]:  # fmt: skip
    """Return the packed weights that hold whole parameters, none of which a program reads as it is.

    first_names: of each name in the state the first one of the same tensor.
    """
    plainly = {
        first_names.get(part.path_of(program.runtime.weights.paths[name]))
        for part, program in programs
        for name in program.runtime.weights.read_plainly()
        if name in program.runtime.weights.paths
    }
    found: dict[tuple[str, ...], Panels] = {}
    taken: set[str] = set()
    for part, program in programs:
        paths = program.runtime.weights.paths
        assert isinstance(program.runtime, CpuExecutor)
        for packing in program.runtime.packings:
            names = [first_names.get(part.path_of(paths.get(w.tensor, ""))) for w in packing.parts]
            panels = _panels_of(packing, names, state)
            if panels is not None and not {*panels.paths} & (plainly | taken):
                found[panels.paths] = panels
                taken.update(panels.paths)
    return list(found.values())


def _panels_of(
    packing: Packing, names: Sequence[str | None], state: Mapping[str, torch.Tensor]
) -> Panels | None:
    known = [name for name in names if name is not None]
    if len({*known}) != len(packing.parts):
        return None
    turned = [turning(part, state[n]) for part, n in zip(packing.parts, known, strict=True)]
    sure = [t for t in turned if t is not None]
    whole = len(sure) == len(turned)
    return Panels(tuple(known), tuple(sure), packing.gated) if whole else None


def describe_panels(
    panels: Sequence[Panels], state: Mapping[str, torch.Tensor], sets: Sequence[str],
    native: ctypes.CDLL,
) -> tuple[list[dict[str, Any]], dict[str, Stream]]:  # fmt: skip
    """Return what JSON says of panels, and the entries that hold them, one an instruction set."""
    described: list[dict[str, Any]] = []
    ends = dict.fromkeys(sets, 0)
    for one in panels:
        shapes = [state[path].shape for path in one.paths]
        rows = [s[1] if t else s[0] for s, t in zip(shapes, one.turned, strict=True)]
        depth, dtype = shapes[0][0 if one.turned[0] else 1], state[one.paths[0]].dtype
        places = []
        for name in sets:
            layout = _layout_of(name, dtype, native)
            nbytes = prod(layout.sizes(sum(rows), depth, one.gated)) * dtype.itemsize
            places.append([f"{name}.panels", ends[name], nbytes, layout.width, layout.step])
            ends[name] += -(-nbytes // PAGE) * PAGE
        described.append(
            {"paths": list(one.paths), "turned": list(one.turned), "gated": one.gated, "rows": rows,
             "depth": depth, "dtype": NAMES[dtype], "places": places}
        )  # fmt: skip

    def pieces(name: str) -> Iterator[memoryview | bytes]:
        for one in panels:
            parts = [_dense(state[p], t) for p, t in zip(one.paths, one.turned, strict=True)]
            layout = _layout_of(name, parts[0].dtype, native)
            made = bytes_of(pack(torch.cat(parts), layout, one.gated))
            yield made
            yield bytes(-len(made) % PAGE)

    streams = {
        f"{name}.panels": Stream(ends[name], lambda name=name: pieces(name))  # type: ignore[misc]
        for name in sets
    }
    return described, streams


def _dense(tensor: torch.Tensor, turned: bool) -> torch.Tensor:
    plain = tensor.unpacked() if isinstance(tensor, PackedParameter) else tensor.detach()
    return plain.t() if turned else plain


def _layout_of(name: str, dtype: torch.dtype, native: ctypes.CDLL) -> PanelLayout:
    if name == "native":
        return PanelLayout.of(native, dtype)
    width, step = INSTRUCTION_SETS[name]
    return PanelLayout(width, step if dtype == torch.bfloat16 else 1)
