"""Packed weight: a GEMM weight in the layout of the C++ products, and conversion back.

In: the tensors whose rows make up the weight; or panels in memory, such as a mapped file. Out: its
address for the runtime, and its rows, bitwise equal::

    packed = PackedWeight.of(load_library("products")[0], [q, k, v])
    packed.address, packed.rows(0, 768)      # q again
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turbotx.ir.int4_ops import dequantize_groups
from turbotx.ir.matmul_kernels import DTYPE_CODES
from turbotx.runtime.cpu.abi import PartRecord


@dataclass(frozen=True)
class PanelLayout:
    """The layout of a weight's panels: `width` columns per panel, of each of which `step`
    consecutive elements are adjacent. Depends on instruction set and dtype.

    depth: rows are zero-padded to a multiple of this.
    flipped: int8 values are stored with their sign bit inverted.
    """

    width: int
    step: int
    depth: int = 1
    flipped: bool = False

    @classmethod
    def of(cls, native: ctypes.CDLL, dtype: torch.dtype) -> PanelLayout:
        """Return the layout that a library of products uses."""
        found = native.ttx_panel_layout(DTYPE_CODES[dtype])
        return cls(found >> 8 & 255, found & 255, found >> 16 & 255, bool(found >> 24))

    def sizes(self, rows: int, depth: int, gated: bool) -> tuple[int, int, int, int, int]:
        """Return the dimensions of panels: (groups, interleaved, steps, width, step)."""
        columns = rows // 2 if gated else rows
        steps = -(-depth // max(self.depth, self.step)) * max(self.depth, self.step) // self.step
        return -(-columns // self.width), 1 + gated, steps, self.width, self.step

    def stored(self, values: torch.Tensor) -> torch.Tensor:
        """Convert values to their stored form, or back."""
        return values ^ -128 if self.flipped else values


class PackedWeight:
    """A GEMM weight of `count` rows of `depth` elements in panels; freed with the object.

    gated: the first half of all rows is the gate, the second its factor. inputs: what a row stands
    for, as many as elements but of int4, of which `group` inputs share a scale.
    """

    group = 0
    shifted = False

    def __init__(
        self, native: ctypes.CDLL, address: int, count: int, depth: int, dtype: torch.dtype,
        gated: bool, held: object = None,
    ) -> None:  # fmt: skip
        """address: of the library's object, owned by this one. held: keeps the panels' memory
        alive."""
        self._native, self.address, self._held = native, address, held
        self.count, self.depth, self.dtype, self.gated = count, depth, dtype, gated
        self.inputs = depth
        self._scale: torch.Tensor | None = None

    @classmethod
    def of(
        cls, native: ctypes.CDLL, parts: Sequence[torch.Tensor], gated: bool = False
    ) -> PackedWeight:
        """Pack parts of (rows, depth) each, of one dtype, with any strides. Raises MemoryError."""
        count, depth = sum(p.shape[0] for p in parts), parts[0].shape[1]
        records = (PartRecord * len(parts))(
            *(PartRecord(p.data_ptr(), p.shape[0], *p.stride()) for p in parts)
        )
        dtype, columns = parts[0].dtype, count // 2 if gated else count
        address = native.ttx_pack_weight(
            DTYPE_CODES[dtype], records, len(parts), columns, depth, gated
        )
        if not address:
            raise MemoryError(f"no memory to pack a weight of {sum(p.nbytes for p in parts)} bytes")
        return cls(native, address, count, depth, dtype, gated)

    @classmethod
    def over(
        cls, native: ctypes.CDLL, panels: torch.Tensor, count: int, depth: int, gated: bool
    ) -> PackedWeight:
        """Return a weight over panels in this processor's layout, without copying them."""
        columns = count // 2 if gated else count
        address = native.ttx_map_weight(
            DTYPE_CODES[panels.dtype], panels.data_ptr(), columns, depth, gated
        )
        return cls(native, address, count, depth, panels.dtype, gated, panels)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._native.ttx_free_weight(self.address)

    def scale_by(self, scale: torch.Tensor, group: int = 0, inputs: int = 0) -> None:
        """Set the scales of integer weights, float32: of int8 one per row, (count, 1); of int4 one
        per group, (count, groups), or with offsets (count, groups, 2), which are packed too."""
        self._scale = scale
        if not group:
            return
        self.group, self.inputs, self.shifted = group, inputs, scale.dim() == 3
        flat = scale.flatten(1)
        narrow = flat.bfloat16()
        wide = not torch.equal(narrow.float(), flat)
        self._scale = pack(flat if wide else narrow, self._scale_layout, self.gated)
        self._native.ttx_set_group_scales(
            self.address, self._scale.data_ptr(), group, scale.shape[1], inputs, wide, self.shifted
        )

    @property
    def _scale_layout(self) -> PanelLayout:
        return PanelLayout(PanelLayout.of(self._native, self.dtype).width, 1)

    @property
    def scale(self) -> torch.Tensor | None:
        """What `scale_by` was given; None where elements are what they are."""
        if self._scale is None or not self.group:
            return self._scale
        columns = self._scale.shape[2]
        flat = unpack(self._scale, self.count, columns, 0, self.count).float()
        return flat.unflatten(1, (-1, 2)) if self.shifted else flat

    @property
    def panels(self) -> torch.Tensor:
        """A view of the panels, (groups, interleaved, steps, width, step); valid while this object
        lives."""
        layout = PanelLayout.of(self._native, self.dtype)
        sizes = layout.sizes(self.count, self.depth, self.gated)
        found = _numbers_at(
            self._native.ttx_weight_panels(self.address), torch.Size(sizes).numel(), self.dtype
        )
        return found.view(sizes)

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Return some rows, (count, depth), as a new tensor."""
        layout = PanelLayout.of(self._native, self.dtype)
        return layout.stored(unpack(self.panels, self.count, self.depth, first, count))

    def values(self, first: int, count: int) -> torch.Tensor:
        """Return what some rows stand for, (count, inputs): themselves, or by scales, float32."""
        rows, scale = self.rows(first, count), self.scale
        if scale is None:
            return rows
        some = scale[first : first + count]
        return dequantize_groups(rows, some, self.inputs) if self.group else rows * some


class PackedExperts:
    """A weight per expert, (experts, n, k), each packed; freed with the object."""

    def __init__(self, native: ctypes.CDLL, weights: torch.Tensor, gated: bool = False) -> None:
        """gated: see `PackedWeight`. Raises MemoryError."""
        self._native = native
        code, address = DTYPE_CODES[weights.dtype], weights.data_ptr()
        self.address = native.ttx_pack_experts(
            code, address, *weights.shape, *weights.stride(), gated
        )
        if not self.address:
            raise MemoryError(f"no memory to pack the experts' {weights.nbytes} bytes")

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._native.ttx_free_experts(self.address)


def _numbers_at(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def unpack(panels: torch.Tensor, rows: int, depth: int, first: int, count: int) -> torch.Tensor:
    """Return rows [first, first + count) of a weight (rows, depth), from panels of any layout."""
    _, alternating, _, width, _ = panels.shape
    columns = rows // alternating
    out = panels.new_empty(count, depth)
    for which in range(alternating):
        begin = max(first, which * columns)
        end = min(first + count, (which + 1) * columns)
        if begin >= end:
            continue
        a, b = begin - which * columns, end - which * columns  # within its columns
        near = panels[a // width : -(-b // width), which]
        dense = near.permute(0, 2, 1, 3).flatten(2)  # (panels, columns, depth)
        dense = dense.flatten(0, 1)[a - a // width * width :][: b - a, :depth]
        out[begin - first : end - first] = dense
    return out


def pack(dense: torch.Tensor, layout: PanelLayout, gated: bool) -> torch.Tensor:
    """Return the panels of a 2-D weight in a layout, possibly of another processor: (groups,
    interleaved, width, steps, step) in its dtype."""
    rows, depth = dense.shape
    sizes = layout.sizes(rows, depth, gated)
    groups, alternating, steps, width, step = sizes
    padded = dense.new_zeros(alternating, groups * width, steps * step)
    padded[:, : rows // alternating, :depth] = dense.view(alternating, -1, depth)
    padded = layout.stored(padded)
    return padded.view(alternating, groups, width, steps, step).permute(1, 0, 3, 2, 4).contiguous()
