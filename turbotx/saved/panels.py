"""Panels: packed GEMM weights of a saved file, used in place in the mapped file.

In: a file's entries and the JSON description of its panels. Out: packed parameters over the mapped
file; or plain ones, if the panels are for other processors::

    open_panels(entries, described, state, library_of, held)["q.weight"]    ->  a PackedParameter
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from turbotx.errors import SavedFileError
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.runtime.packed_weight import PackedWeight, PanelLayout, unpack
from turbotx.saved.tensor_file import DTYPES, tensor_over
from turbotx.saved.values import decode_constant

LibraryOf = Callable[[torch.dtype], ctypes.CDLL]


def open_panels(
    entries: Mapping[str, Any], described: Sequence[Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]], library_of: LibraryOf, held: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return the parameters that a file stores as panels, by their first names.

    state: what JSON says of them. library_of: what multiplies weights of a dtype.
    held: the file's tensors beside those, scales among them.
    Raises SavedFileError where the panels are not as they were written.
    """
    found: dict[str, torch.Tensor] = {}
    for one in described:
        try:
            library = library_of(DTYPES[one["dtype"]])
            weight = _open(entries, one, library)
            if one["scale"] is not None:  # integers have to stay what they are
                if not isinstance(weight, PackedWeight):
                    weight = PackedWeight.of(library, [weight], one["gated"])
                weight.scale_by(held[one["scale"]], one["group"], one["depth"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise SavedFileError(f"the file's panels are not as they were: {error}") from error
        first = 0
        for path, transposed, rows in zip(one["paths"], one["turned"], one["rows"], strict=True):
            said = state[path]
            dtype = decode_constant(said["dtype"])
            like = torch.empty_strided(said["shape"], said["strides"], dtype=dtype)
            if isinstance(weight, PackedWeight):
                found[path] = PackedParameter(like, weight, first, transposed, path)
            else:
                part = weight[first : first + rows]
                found[path] = like.copy_(part.t() if transposed else part)
            first += rows
    return found


def _open(
    entries: Mapping[str, Any], one: Mapping[str, Any], native: ctypes.CDLL
) -> PackedWeight | torch.Tensor:
    """Return a weight over mapped panels if they have this processor's layout; otherwise unpack
    it."""
    dtype, rows, depth = DTYPES[one["dtype"]], sum(one["rows"]), one["depth"]
    if one["group"]:  # two numbers to a byte, of whole groups
        depth = -(-depth // one["group"]) * one["group"] // 2
    own = PanelLayout.of(native, dtype)
    places = [(*place[:3], PanelLayout(*place[3:])) for place in one["places"]]
    fitting = [place for place in places if place[-1] == own]
    name, begin, nbytes, layout = (fitting or places)[0]
    sizes = list(layout.sizes(rows, depth, one["gated"]))
    panels = tensor_over(entries[name], dtype, sizes, begin, begin + nbytes)
    if fitting:
        return PackedWeight.over(native, panels, rows, depth, one["gated"])
    return layout.stored(unpack(panels, rows, depth, 0, rows))
