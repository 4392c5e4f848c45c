"""Masks over places where queries stand at the last keys, as behind a cache.

In: attention written with masks over symbolic places. Out: a diagonal and a window of the kernel's,
a boolean bias only where terms disagree.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import turbotx
from tests.passes.test_attention import Attend, positions, recognized
from turbotx.engine.optimize import engine_of

PAST = torch.randn(2, 4, 3, 8)
LATE = {
    "causal": (lambda q, k: k <= q, True, None),
    "the last 3": (lambda q, k: (k <= q) & (k > q - 3), True, (2, -1)),
    "near": (lambda q, k: (q - k).abs() <= 1, False, (1, 1)),
}


def some_rows(said: str):
    """Attention behind earlier keys, as behind a cache, by a mask over places."""

    def function(q, k, v, past):
        k, v = torch.cat([past, k], 2), torch.cat([past, v], 2)
        rows = positions(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
        mask = LATE[said][0](rows, positions(k.shape[2])[None, :])
        return F.scaled_dot_product_attention(q, k, v, mask)

    return function


@pytest.mark.parametrize("said", LATE)
def test_queries_may_stand_at_the_last_keys(said: str) -> None:
    (node,) = recognized(some_rows(said), PAST)
    _, causal, window = LATE[said]
    assert node.kwargs["late"] is True and node.args[3:] == (None, None)
    assert node.kwargs["causal"] is causal and node.kwargs.get("window") == window


def test_places_that_disagree_stay_a_mask() -> None:
    def function(q, k, v, past):
        k, v = torch.cat([past, k], 2), torch.cat([past, v], 2)
        rows, columns = positions(q.shape[2])[:, None], positions(k.shape[2])[None, :]
        late = rows + (k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, (columns <= late) & (columns > rows - 2))

    (node,) = recognized(function, PAST)
    assert node.kwargs["late"] is True and node.kwargs["causal"] is True
    assert node.args[4] is not None


@torch.no_grad()
@pytest.mark.parametrize("way", ["flash", "fused-softmax"])
@pytest.mark.parametrize("said", LATE)
def test_late_queries_through_kernels(said: str, way: str) -> None:
    module = Attend(some_rows(said)).eval()
    fast = turbotx.optimize(module, attention=way)
    for length, before in ((5, 3), (1, 9), (4, 1)):
        x, past = torch.randn(2, length, 16), torch.randn(2, 4, before, 8)
        torch.testing.assert_close(fast(x, past), module(x, past), rtol=2e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [0.25, 1.0 / 3.0, 4.0])
def test_a_mask_that_is_scaled_with_the_scores(factor: float, dtype: torch.dtype) -> None:
    def inner(q, k, v, keys):
        rows, columns = positions(q.shape[2])[:, None], positions(q.shape[2])[None, :]
        shown = (columns <= rows) & keys[:, None, None, :]
        hidden = torch.where(shown, 0.0, torch.finfo(torch.float32).min)
        scores = (q.float() @ k.float().transpose(-1, -2) + hidden) * factor
        return (scores.softmax(-1) @ v.float()).to(q.dtype)

    module = Attend(inner).to(dtype).eval()
    fast = turbotx.optimize(module)
    for length in (5, 1, 40):
        x, keys = torch.randn(3, length, 16, dtype=dtype), torch.rand(3, length) > 0.3
        keys[1] = False  # no key at all: eager takes the mean, of infinities NaN
        want, near = module(x, keys), 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(fast(x, keys), want, equal_nan=True, rtol=near, atol=near)
    program = engine_of(fast).variants()[0].program
    few, more = (program.sizes_at([2, n]) for n in (64, 128))
    assert all(more[name] <= 2 * few[name] for name in few) == (factor <= 1.0)


@torch.no_grad()
@pytest.mark.parametrize("first", ["mask", "slopes"])
def test_slopes_beside_a_mask_take_no_square(first: str) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, 4, 1, 1)

    def inner(q, k, v, keys):
        rows, columns = positions(q.shape[2])[:, None], positions(q.shape[2])[None, :]
        shown = (columns <= rows) & keys[:, None, None, :]
        hidden = torch.where(shown, 0.0, torch.finfo(torch.float32).min)
        places = ((keys.cumsum(-1) - 1) * keys)[:, None, None, :] * slopes
        terms = (hidden, places) if first == "mask" else (places, hidden)
        scores = q @ k.transpose(-1, -2) * 0.3 + terms[0] + terms[1]
        return scores.softmax(-1) @ v

    module = Attend(inner).eval()
    fast = turbotx.optimize(module)
    for length in (5, 1, 40):
        x, keys = torch.randn(3, length, 16), torch.rand(3, length) > 0.3
        keys[1] = False
        torch.testing.assert_close(fast(x, keys), module(x, keys), rtol=1e-4, atol=1e-4)
    program = engine_of(fast).variants()[0].program
    few, more = (program.sizes_at([2, n]) for n in (64, 128))
    assert all(more[name] <= 2 * few[name] for name in few)


class Buffered(torch.nn.Module):
    """Attention whose mask is a part of a buffer, and of keys beside it, as GPT-Neo's."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        band = torch.ones(64, 64, dtype=torch.bool).tril()
        self.register_buffer("band", (band ^ band.tril(-3))[None, None])
        self.dtype = dtype

    def forward(self, q, k, v, keys=None):
        n, least = q.shape[2], torch.finfo(torch.float32).min
        scores = q.float() @ k.float().transpose(-1, -2)
        scores = torch.where(self.band[:, :, :n, :n], scores, least)
        if keys is not None:
            rows, columns = positions(n)[:, None], positions(n)[None, :]
            shown = (columns <= rows) & keys[:, None, None, :]
            nothing = torch.zeros((), dtype=self.dtype)
            scores = scores + torch.where(shown, nothing, torch.finfo(self.dtype).min)
        return scores.softmax(-1).to(q.dtype) @ v


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_buffer_is_read_where_it_is(padded: bool, dtype: torch.dtype) -> None:
    module = Attend(Buffered(dtype)).to(dtype).eval()
    fast = turbotx.optimize(module)
    for length in (5, 1, 40):
        x = torch.randn(3, length, 16, dtype=dtype)
        keys = torch.arange(length)[None] < torch.tensor([length, 1, length // 2])[:, None]
        given = (x, keys) if padded else (x,)
        near = 1e-4 if dtype is torch.float32 else 2e-2
        ours, theirs = fast(*given), module(*given)
        # A query of padding may see no key, and gets a mean that nobody reads.
        shown = (keys if padded else torch.ones_like(keys))[:, None].expand(ours.shape[:3])
        torch.testing.assert_close(ours[shown], theirs[shown], rtol=near, atol=near)
    program = engine_of(fast).variants()[0].program
    few, more = (program.sizes_at([2, n]) for n in (32, 64))
    assert all(more[name] <= 2 * few[name] for name in few)


@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("way", [{}, {"attention": "fused-softmax"}, {"backend": "aten"}], ids=str)
def test_a_query_from_which_a_boolean_hides_all_keys_gets_their_mean(
    biased: bool, way: dict[str, str]
) -> None:
    table = torch.randn(4, 40, 40)

    def inner(q, k, v, shown, keys):
        n, least = q.shape[2], torch.finfo(q.dtype).min
        bias = table[None, :, :n, :n] if biased else torch.zeros(())
        seen = shown[None, None] & keys[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, torch.where(seen, bias, least))

    module = Attend(inner).eval()
    fast = turbotx.optimize(module, **way)
    for length in (5, 1, 40):
        x, shown = torch.randn(2, length, 16), torch.rand(length, length) > 0.5
        shown[length // 2] = False
        keys = torch.rand(2, length) > 0.2
        given = (x, shown, keys)
        torch.testing.assert_close(fast(*given), module(*given), rtol=2e-5, atol=2e-6)
