"""attention.h under every mask, length and storage type, against its definition in float64.

In: random q, k, v, some read in place from a packed projection; out: head-merged outputs.
Example: ``pytest tests/kernels/cpp/test_attention.py -k every_mask``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.kernels.cpp.cpp_probe import NAMES, build, needs_compiler, pointer
from turbotx.runtime.cpu.launch_table import load_library

pytestmark = needs_compiler

ATTENTIONS = [(torch.float32, 32), (torch.float32, 5), (torch.bfloat16, 64), (torch.float16, 20)]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class Shape(ctypes.Structure):
    """Mirrors the struct of the source below, field by field."""

    _fields_ = [
        ("sizes", ctypes.c_long * 5),
        ("strides", ctypes.c_long * 12),
        ("scale", ctypes.c_double),
        ("key_mask", ctypes.c_void_p),
        ("key_mask_stride", ctypes.c_long),
        ("bias", ctypes.c_void_p),
        ("bias_kind", ctypes.c_long),
        ("bias_strides", ctypes.c_long * 4),
        ("band", ctypes.c_long * 4),
        ("sinks", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
    ]


ATTENTION_SOURCE = """
#include "attention.h"
using namespace ttx;
struct Shape {
  long sizes[5], strides[12]; double scale; const bool* key_mask; long key_mask_stride;
  const void* bias; long bias_kind, bias_strides[4], band[4]; const float* sinks;
  const int64_t* lengths;
};
template <class T, int D>
void run(const void* q, const void* k, const void* v, void* out, const Shape& a) {
  AttentionShape s;
  s.batch = a.sizes[0]; s.heads = a.sizes[1]; s.kv_heads = a.sizes[2];
  s.q_len = a.sizes[3]; s.k_len = a.sizes[4];
  const long* t = a.strides;
  s.q = {t[0], t[1], t[2]}; s.k = {t[3], t[4], t[5]};
  s.v = {t[6], t[7], t[8]}; s.out = {t[9], t[10], t[11]};
  s.scale = static_cast<float>(a.scale);
  s.key_mask = a.key_mask; s.key_mask_stride = a.key_mask_stride;
  s.bias = a.bias; s.bias_kind = static_cast<Bias>(a.bias_kind);
  s.bias_batch = a.bias_strides[0]; s.bias_head = a.bias_strides[1];
  s.bias_q = a.bias_strides[2]; s.bias_k = a.bias_strides[3];
  s.causal = a.band[0]; s.diagonal = a.band[1];
  s.window_left = a.band[2]; s.window_right = a.band[3];
  s.sinks = a.sinks; s.lengths = a.lengths;
  attention<T, D>(static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
                  static_cast<T*>(out), s);
}
"""


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = ATTENTION_SOURCE
    for dtype, dim in ATTENTIONS:
        source += (
            f'extern "C" void attention_{NAMES[dtype]}_{dim}(const void* q, const void* k, '
            f"const void* v, void* o, const Shape* s) "
            f"{{ run<{NAMES[dtype]}, {dim}>(q, k, v, o, *s); }}\n"
        )
    return build(source, tmp_path_factory.mktemp("attention"))


def attend(
    library: ctypes.CDLL,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float = 0.25,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    band: tuple[int, int, int, int] = (0, 0, -1, -1),
    sinks: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """(batch, heads, q_len, dim), written head-merged. `band`: causal, diagonal, left, right."""
    batch, heads, q_len, dim = q.shape
    merged = torch.full((batch, q_len, heads, dim), math.nan, dtype=q.dtype)
    out = merged.transpose(1, 2)
    s = Shape(scale=scale)
    s.sizes[:] = (batch, heads, k.shape[1], q_len, k.shape[2])
    s.strides[:] = [stride for t in (q, k, v, out) for stride in t.stride()[:3]]
    s.band[:] = band
    s.sinks, s.lengths = pointer(sinks).value, pointer(lengths).value
    if key_mask is not None:
        s.key_mask, s.key_mask_stride = key_mask.data_ptr(), key_mask.stride(0)
    if bias is not None:
        s.bias, s.bias_kind = bias.data_ptr(), {torch.bool: 1, torch.float32: 2}.get(bias.dtype, 3)
        s.bias_strides[:] = bias.expand(batch, heads, q_len, k.shape[2]).stride()
    function = getattr(library, f"attention_{NAMES[q.dtype]}_{dim}")
    function(pointer(q), pointer(k), pointer(v), pointer(out), ctypes.byref(s))
    return out


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float = 0.25,
    key_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    band: tuple[int, int, int, int] = (0, 0, -1, -1),
    sinks: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in float64, by the definition; rows that see no key are 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.mT * scale
    seen = torch.ones_like(scores, dtype=torch.bool)
    if bias is not None and bias.dtype == torch.bool:
        seen &= bias
    elif bias is not None:
        scores = scores + bias.double()
    if key_mask is not None:
        seen &= key_mask[:, None, None, :]
    if lengths is not None:
        seen &= torch.arange(k.shape[2]) < lengths[:, None, None, None]
    causal, diagonal, left, right = band
    distance = torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None] - diagonal
    if causal:
        seen &= distance <= 0
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)[..., : k.shape[2]] @ v


LENGTHS = [  # batch, heads, kv_heads, q_len, k_len
    (1, 3, 3, 1, 1),
    (2, 4, 2, 5, 9),
    (1, 2, 2, 17, 33),
    (2, 2, 1, 67, 130),
    (1, 2, 2, 9, 0),
    (1, 3, 1, 3, 1100),
    (1, 2, 1, 150, 1300),  # strips of many rows, across the heads of a group
    (2, 6, 3, 1, 2600),  # as a step of decoding
]


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Let kernels use so many threads."""
    before = torch.get_num_threads()
    load_library("runtime")  # whose threads they are
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype, dim", ATTENTIONS)
def test_attention_under_every_mask(
    attention: ctypes.CDLL, dtype: torch.dtype, dim: int, lengths: tuple[int, ...]
) -> None:
    batch, heads, kv_heads, q_len, k_len = lengths
    torch.manual_seed(sum(lengths))
    packed = torch.randn(batch, q_len, heads * dim + 3).to(dtype)  # rows wider than they need be
    q = packed[..., : heads * dim].unflatten(-1, (heads, dim)).transpose(1, 2)
    k, v = torch.randn(2, batch, k_len, kv_heads, dim).to(dtype).transpose(2, 3)
    key_mask = torch.rand(batch, k_len) > 0.4
    key_mask[0] = batch == 1  # a batch whose every key is hidden, where there are two
    cases: list[dict[str, object]] = [
        {},
        {"scale": 0.05},
        {"key_mask": key_mask},
        {"bias": torch.rand(batch, 1, q_len, k_len) > 0.5},
        {"bias": torch.rand(batch, 1, 1, k_len) > 0.5, "key_mask": key_mask},
        {"bias": torch.randn(1, heads, q_len, k_len)},
        {"bias": torch.randn(batch, 1, 1, k_len).to(dtype)},
        {"bias": torch.randn(heads, q_len, 1)},
        {"band": (1, 0, -1, -1)},
        {"band": (1, k_len - q_len, -1, -1), "key_mask": key_mask},
        {"band": (0, 0, 3, 2)},
        {"band": (1, k_len - q_len, 7, -1)},
        {"band": (0, -2, 0, 600)},
        {"sinks": torch.randn(heads), "key_mask": key_mask},
        {"lengths": torch.randint(k_len // 2, k_len + 1, (batch,))},
    ]
    for case in cases:
        want = reference(q, k, v, **case)  # type: ignore[arg-type]
        for threads in (1, 4, 8) if k_len > 1000 else (1,):  # many keys are shared out to threads
            with threads_of(threads):
                got = attend(attention, q, k, v, **case)  # type: ignore[arg-type]
            error = (got.double() - want).abs().max().item() if got.numel() else 0.0
            assert error <= TOLERANCE[dtype], (case.keys(), threads, error)


def test_attention_agrees_with_torch_where_every_key_is_hidden(attention: ctypes.CDLL) -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 32)
    mask = torch.rand(1, 1, 6, 6) > 0.5
    mask[..., 2, :] = False
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)
    got = attend(attention, q, k, v, bias=mask)
    torch.testing.assert_close(got, want, rtol=0.0, atol=4e-6)
    assert (got[:, :, 2] == 0).all()


def test_attention_keeps_nan_in_its_row(attention: ctypes.CDLL) -> None:
    q, k, v = torch.randn(3, 1, 1, 20, 32)
    q[0, 0, 3, 1] = math.nan
    got = attend(attention, q, k, v)
    assert got[0, 0, 3].isnan().all() and not got[0, 0, :3].isnan().any()
    assert not got[0, 0, 4:].isnan().any()


def test_attention_reads_a_packed_projection_and_survives_large_scores(
    attention: ctypes.CDLL,
) -> None:
    q, k, v = torch.randn(2, 30, 3, 4, 32).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(
        attend(attention, q, k, v).double(), reference(q, k, v), rtol=0.0, atol=4e-6
    )
    got = attend(attention, q, k, v, scale=1e4)  # one key takes all the weight
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("length", [40, 512, 1500])
def test_long_rows_are_as_accurate_as_torch(attention: ctypes.CDLL, length: int) -> None:
    torch.manual_seed(length)
    q, k, v = torch.randn(3, 1, 2, length, 32)
    torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25).double()
    want = reference(q, k, v)
    own = attend(attention, q, k, v).double()
    assert (own - want).square().mean() <= 1.5**2 * (torchs - want).square().mean()


@pytest.mark.parametrize("threads", [1, 2])
def test_attention_follows_torch_threads(attention: ctypes.CDLL, threads: int) -> None:
    q, k, v = torch.randn(3, 3, 5, 100, 32)
    with threads_of(threads):
        got = attend(attention, q, k, v).double()
    torch.testing.assert_close(got, reference(q, k, v), rtol=0.0, atol=4e-6)
