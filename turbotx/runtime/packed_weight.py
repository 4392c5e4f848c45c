"""Packed weight: a GEMM weight in the layout that the C++ runtime multiplies by.

In: the parts whose rows make the weight, as tensors. Out: its address for the runtime; freed with
the object. Panels of `width` columns, `step` numbers of one column side by side::

    PackedWeight(native, [q, k, v]).address
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from turbotx.runtime.cpu.abi import PartRecord

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class PackedWeight:
    """A GEMM weight in the native library's layout. Raises MemoryError where there is no room."""

    def __init__(
        self, native: ctypes.CDLL, parts: Sequence[torch.Tensor], gated: bool = False
    ) -> None:
        """parts: (rows, k) each, of one dtype, laid out in any way. gated: the first half of all
        rows is the gate, the second its factor."""
        self._native = native
        self.rows, self.depth = sum(p.shape[0] for p in parts), parts[0].shape[1]
        self.dtype, self.gated = parts[0].dtype, gated
        records = (PartRecord * len(parts))(
            *(PartRecord(p.data_ptr(), p.shape[0], *p.stride()) for p in parts)
        )
        columns = self.rows // 2 if gated else self.rows
        self.address = native.ttx_pack_weight(
            DTYPE_CODES[self.dtype], records, len(parts), columns, self.depth, gated
        )
        if not self.address:
            nbytes = sum(p.nbytes for p in parts)
            raise MemoryError(f"no memory to pack a weight of {nbytes} bytes")

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self._native.ttx_free_weight(self.address)
