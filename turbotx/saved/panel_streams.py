"""Panel streams: writes a model's packed GEMM weights for given instruction sets.

In: CPU programs, the saved state, names of instruction sets. Out: which packed weights replace the
parameters that they contain; their description as JSON, and a stream per instruction set, with one
weight in memory at a time::

    find_panels(programs, state, first_names)         ->  [Panels(("q.weight", ...), ...), ...]
    describe_panels(panels, state, ["avx2"])  ->  [{...}, ...], {"avx2.panels": Stream(...)}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from turbotx.capture.torchao_weights import join_integers
from turbotx.errors import SaveError
from turbotx.ir.quantized_ops import Scheme
from turbotx.program.executable import Packing
from turbotx.runtime.cpu.abi import products_of
from turbotx.runtime.cpu.executor import CpuExecutor
from turbotx.runtime.cpu.launch_table import load_library
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.runtime.packed_sources import parameters_of, turning
from turbotx.runtime.packed_weight import PackedWeight, PanelLayout, pack
from turbotx.runtime.program import Program
from turbotx.saved.container import PAGE, Stream
from turbotx.saved.parts import SavedPart
from turbotx.saved.tensor_file import NAMES, bytes_of

SCALES = "panels.constants."
"""Prefix of the names of panels' scales among a file's held tensors."""
INSTRUCTION_SETS = {"avx2": (16, 1), "avx512": (32, 1), "avx512_bf16": (32, 2)}
"""Instruction sets besides "native": columns per panel, and adjacent elements of a column in
bfloat16; for other dtypes it is 1."""


@dataclass(frozen=True)
class Panels:
    """One packed weight: the parameters whose rows it is in order, and of each whether these are
    the parameter's columns. scheme: how it is quantised, with scales beside it; None for floats."""

    paths: tuple[str, ...]
    transposed: tuple[bool, ...]
    gated: bool
    scheme: Scheme | None


def check_sets(names: Sequence[str]) -> list[str]:
    """Return names of instruction sets without duplicates; raise SaveError for an unknown one."""
    for name in names:
        if name != "native" and name not in INSTRUCTION_SETS:
            known = ", ".join(map(repr, ("native", *INSTRUCTION_SETS)))
            raise SaveError(f"there are no panels for {name!r}: name some of {known}")
    return list(dict.fromkeys(names))


def find_panels(
    programs: Sequence[tuple[SavedPart, Program]], state: Mapping[str, torch.Tensor],
    first_names: Mapping[str, str],
) -> list[Panels]:  # fmt: skip
    """Return the packed weights that consist of whole parameters that no program reads unpacked.

    first_names: for each name in the state, the first name of the same tensor. Parameters that some
    program multiplies as floats are not written as int8.
    """
    plainly = {
        first_names.get(part.path_of(program.runtime.weights.paths[name]))
        for part, program in programs
        for name in program.runtime.weights.read_plainly()
        if name in program.runtime.weights.paths
    }
    found: dict[tuple[str, ...], Panels] = {}
    taken: set[str] = set()
    floats: set[str] = set()
    for part, program in programs:
        paths = program.runtime.weights.paths
        assert isinstance(program.runtime, CpuExecutor)
        for packing in program.runtime.packings:
            parts = parameters_of(packing)
            names = [first_names.get(part.path_of(paths.get(w.tensor, ""))) for w in parts]
            if not packing.sources:
                floats.update(name for name in names if name is not None)
            panels = _panels_of(packing, names, state)
            if panels is not None and not {*panels.paths} & (plainly | taken):
                found[panels.paths] = panels
                taken.update(panels.paths)
    return [p for p in found.values() if p.scheme is None or not floats & {*p.paths}]


def _panels_of(
    packing: Packing, names: Sequence[str | None], state: Mapping[str, torch.Tensor]
) -> Panels | None:
    known = [name for name in names if name is not None]
    parts = parameters_of(packing)
    if len({*known}) != len(parts):
        return None
    transposed = [turning(part, state[n]) for part, n in zip(parts, known, strict=True)]
    sure = [t for t in transposed if t is not None]
    if len(sure) != len(transposed):
        return None
    scheme = Scheme(True, packing.group) if packing.sources else None
    return Panels(tuple(known), tuple(sure), packing.gated, scheme)


def describe_panels(
    panels: Sequence[Panels], state: Mapping[str, torch.Tensor], sets: Sequence[str],
) -> tuple[list[dict[str, Any]], dict[str, Stream], dict[str, torch.Tensor]]:  # fmt: skip
    """Return what JSON says of panels, the entries that hold them, one an instruction set, and the
    scales of those of integers."""
    described: list[dict[str, Any]] = []
    scales: dict[str, torch.Tensor] = {}
    ends = dict.fromkeys(sets, 0)
    for one in panels:
        rows, first = _row_counts(one, state), state[one.paths[0]]
        depth = held = first.shape[0 if one.transposed[0] else 1]
        dtype, scale, group = first.dtype, None, 0
        if one.scheme is not None:
            dtype, scale = torch.int8, f"{SCALES}{len(described)}"
            scales[scale], group = _scale_of(one, one.scheme, state), one.scheme.group
        if group:
            dtype, held = torch.uint8, -(-depth // group) * group // 2
        places = []
        for name in sets:
            layout = _layout_of(name, dtype)
            nbytes = prod(layout.sizes(sum(rows), held, one.gated)) * dtype.itemsize
            places.append([f"{name}.panels", ends[name], nbytes, *astuple(layout)])
            ends[name] += -(-nbytes // PAGE) * PAGE
        described.append(
            {"paths": list(one.paths), "turned": list(one.transposed), "gated": one.gated,
             "rows": rows, "depth": depth, "dtype": NAMES[dtype], "places": places, "scale": scale,
             "group": group}
        )  # fmt: skip

    def pieces(name: str) -> Iterator[memoryview | bytes]:
        for one, said in zip(panels, described, strict=True):
            if one.scheme is None:
                numbers = _rows(one, state)
            else:
                numbers = _integers(one, one.scheme, state, scales[said["scale"]])
            layout = _layout_of(name, numbers.dtype)
            made = bytes_of(pack(numbers, layout, one.gated))
            yield made
            yield bytes(-len(made) % PAGE)

    streams = {f"{name}.panels": Stream(ends[name], partial(pieces, name)) for name in sets}
    return described, streams, scales


def _scale_of(one: Panels, scheme: Scheme, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the scales of integers: those that are held, or those of the floats."""
    given = join_integers([state[path] for path in one.paths])
    if given is not None:
        return given.scale
    held = _held(one, state)
    scale = None if held is None else held.scale
    return scheme.scale_of(_rows(one, state)) if scale is None else scale


def _integers(
    one: Panels, scheme: Scheme, state: Mapping[str, torch.Tensor], scale: torch.Tensor
) -> torch.Tensor:
    """Return integers: those that are held, or the floats by their scales, see `_scale_of`."""
    given = join_integers([state[path] for path in one.paths])
    if given is not None:
        return given.numbers
    held = _held(one, state)
    if held is not None:
        return held.rows(0, held.count)
    return scheme.integers_of(_rows(one, state), scale)


def _held(one: Panels, state: Mapping[str, torch.Tensor]) -> PackedWeight | None:
    """Return the integers for which all parameters were given up, which they are whole."""
    held = [p for p in map(state.__getitem__, one.paths) if isinstance(p, PackedParameter)]
    if len(held) < len(one.paths) or any(p.weight is not held[0].weight for p in held):
        return None
    weight = held[0].weight
    whole = weight.count == sum(_row_counts(one, state)) and held[0].first == 0
    return weight if whole and weight.scale is not None else None


def _row_counts(one: Panels, state: Mapping[str, torch.Tensor]) -> list[int]:
    """Return the number of rows of each parameter."""
    return [state[p].shape[1 if t else 0] for p, t in zip(one.paths, one.transposed, strict=True)]


def _rows(one: Panels, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the rows of a weight as its parameters have them, in float32 where those are
    integers."""
    parts = [_dense(state[p], t) for p, t in zip(one.paths, one.transposed, strict=True)]
    return torch.cat(parts)


def _dense(tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
    plain = (
        tensor.detach()
        if not isinstance(tensor, PackedParameter)
        else (tensor.unpacked(None if tensor.weight.scale is None else torch.float32))
    )
    return plain.t() if transposed else plain


def _layout_of(name: str, dtype: torch.dtype) -> PanelLayout:
    if name == "native":
        return PanelLayout.of(load_library(products_of(dtype))[0], dtype)
    width, step = INSTRUCTION_SETS[name]
    if dtype in (torch.int8, torch.uint8):
        return PanelLayout(width, 4, 4)
    return PanelLayout(width, step if dtype == torch.bfloat16 else 1)
