"""Tensor file: tensors by name in safetensors' format, written as a stream, read by mapping.

In: tensors. Out: a stream of their bytes, with one tensor in memory at a time; and tensors over the
bytes of such a file, without copies::

    stream = tensor_stream({"weight": tensor})
    read_tensors(mapped)  ->  {"weight": tensor}
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch

from turbotx.errors import SavedFileError, SaveError
from turbotx.runtime.packed_parameter import PackedParameter
from turbotx.saved.container import PAGE, Stream

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}
ALIGNMENT = 64
"""Alignment of tensors in bytes, which kernels may rely on."""


def tensor_stream(tensors: Mapping[str, torch.Tensor]) -> Stream:
    """Return a file of tensors as a stream; each is copied to the CPU and made contiguous when
    written.

    Raises SaveError for a dtype that the format does not support.
    """
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in _by_alignment(tensors).items():
        if tensor.dtype not in NAMES:
            raise SaveError(f"{name} is {tensor.dtype}, which a file of weights cannot hold")
        nbytes = tensor.numel() * tensor.dtype.itemsize
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)

    def pieces() -> Iterator[memoryview | bytes]:
        yield struct.pack("<Q", len(text)) + text
        for tensor in _by_alignment(tensors).values():
            if tensor.numel():
                yield bytes_of(tensor)

    return Stream(8 + len(text) + at, pieces)


def _by_alignment(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors in an order that aligns each to its element size."""
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    return {name: tensors[name] for name in order}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's elements in order, without a copy if it is contiguous and on the CPU."""
    plain = tensor.unpacked() if isinstance(tensor, PackedParameter) else tensor
    dense = plain.detach().cpu().contiguous().view(-1)
    elements: Any = dense.view(torch.uint8).numpy()
    return memoryview(elements)


def read_tensors(data: memoryview) -> dict[str, torch.Tensor]:
    """Return the tensors of a file over its bytes; raise SavedFileError if it is malformed."""
    if not len(data):
        return {}
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        return {name: _read(data[8 + length :], **entry) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SavedFileError(f"the file's tensors are not as they were written: {error}") from error


def _read(
    data: memoryview, dtype: str, shape: list[int], data_offsets: tuple[int, int]
) -> torch.Tensor:
    return tensor_over(data, DTYPES[dtype], shape, *data_offsets)


def tensor_over(
    data: memoryview, dtype: torch.dtype, shape: list[int], begin: int, end: int
) -> torch.Tensor:
    """Return a tensor over a range of bytes; a copy if they are not aligned. Raises ValueError if
    the number of bytes is wrong."""
    count = prod(shape)
    if end - begin != count * dtype.itemsize or not 0 <= begin <= end <= len(data):
        raise ValueError(f"{end - begin} bytes for {dtype} {shape}")
    if not count:
        return torch.empty(shape, dtype=dtype)
    found = torch.frombuffer(data[begin:end], dtype=torch.uint8)
    if found.data_ptr() % dtype.itemsize:
        found = found.clone()
    return found.view(dtype).view(shape)
