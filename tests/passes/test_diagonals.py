"""Biases that tell distances of key and query: held once a distance, and only these.

In: attention with biases over places. Out: eager's results, and programs that hold no element for
each pair of query and key, or do where the bias is no function of the distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from tests.passes.test_attention import Attend, positions
from turbotx.engine.optimize import engine_of
from turbotx.ir.attention_ops import along_diagonals, attention

TABLE = torch.randn(16, 4)
Bias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def holds_squares(fast: Any, few: int = 128) -> bool:
    """Whether a buffer of the program's grows by more than the length."""
    program = engine_of(fast).variants()[0].program
    less, more = (
        program.sizes_at([n if name == "seq" else 9 for name in program.dims])
        for n in (few, 2 * few)
    )
    return any(more[name] > 2.1 * less[name] for name in less)


def adding(bias: Bias) -> Any:
    """Attention with a bias made of the places of queries (q, 1) and of keys (1, k)."""

    def function(q: Any, k: Any, v: Any, *rest: Any) -> torch.Tensor:
        places = positions(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, bias(places[:, None], places[None, :]))

    return function


def looked_up(rows: torch.Tensor) -> torch.Tensor:
    return F.embedding(rows, TABLE).permute(2, 0, 1)[None]


def log_bucket(ahead: torch.Tensor) -> torch.Tensor:
    """T5's: exact for near keys, by the logarithm for others."""
    far = 4 + (torch.log(ahead.abs().float() / 4) * 2).to(torch.long)
    near = torch.where(ahead.abs() < 4, ahead.abs(), torch.min(far, torch.full_like(far, 7)))
    return near + (ahead > 0).to(torch.long) * 8


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
BY_DISTANCE: dict[str, Bias] = {
    "learnt": lambda q, k: looked_up(log_bucket(k - q)),
    "of queries first": lambda q, k: looked_up((q - k).clamp(-7, 7) + 7),
    "ALiBi": lambda q, k: (SLOPES * (k - q))[None],
    "from both sides": lambda q, k: -(SLOPES * (k - q).abs())[None],
    "moved": lambda q, k: looked_up(((k + 3) - (q + 5)).clamp(0, 15)),
    "indexed": lambda q, k: TABLE[(k - q).clamp(-7, 7) + 7].permute(2, 0, 1)[None],
    "in half": lambda q, k: (k - q).to(torch.float16).float()[None, None] * 0.1,
    "with a constant": lambda q, k: (0.1 * (k - q) + torch.zeros_like(k - q) + 1.0)[None, None],
    "expanded": lambda q, k: (0.1 * (k - q))[None, None].expand(2, 4, -1, -1).contiguous(),
    "every second": lambda q, k: ((k - q) % 2 == 0)[None, None],
    "between": lambda q, k: torch.where((k - q) % 3 == 0, 0.25 * (k - q), -torch.inf)[None, None],
}
OTHERS: dict[str, Bias] = {
    "of the key": lambda q, k: (0.1 * k + 0 * q)[None, None],
    "of the sum": lambda q, k: 0.1 * (k + q)[None, None],
    "of the product": lambda q, k: 0.01 * (k * q)[None, None],
    "of halves": lambda q, k: (k.half() - q.half()).float()[None, None] * 0.1,
    "twice as far": lambda q, k: 0.1 * (k + k - q)[None, None],
    "by blocks": lambda q, k: 0.1 * (k // 4 - q // 4)[None, None],
    "squared first": lambda q, k: 0.01 * (k * k - q * q)[None, None],
}
LENGTHS = (6, 1, 2, 33, 300, 0)


@torch.no_grad()
def check(module: Any, fast: Any, *rest: Callable[[int], torch.Tensor]) -> None:
    for n in LENGTHS:
        x = torch.randn(2, n, 16)
        given = [make(n) for make in rest]
        near = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(fast(x, *given), module(x, *given), **near)


@needs_compiler
@pytest.mark.parametrize("name", BY_DISTANCE)
def test_what_tells_distances_is_held_once_for_each(name: str) -> None:
    module = Attend(adding(BY_DISTANCE[name])).eval()
    fast = turbotx.optimize(module)
    check(module, fast)
    (node,) = engine_of(fast).variants()[0].graph.find_nodes(op="call_function", target=attention)
    assert node.args[4].target is along_diagonals and not holds_squares(fast)


@needs_compiler
@pytest.mark.parametrize("name", OTHERS)
def test_what_tells_more_is_not(name: str) -> None:
    module = Attend(adding(OTHERS[name])).eval()
    fast = turbotx.optimize(module)
    check(module, fast)
    assert holds_squares(fast)


@pytest.mark.parametrize("way", [{"backend": "aten"}, {"attention": "fused-softmax"}], ids=str)
def test_other_ways_of_attention(way: dict[str, Any]) -> None:
    module = Attend(adding(BY_DISTANCE["learnt"])).eval()
    check(module, turbotx.optimize(module, **way))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_in_16_bits(dtype: torch.dtype) -> None:
    table = TABLE.to(dtype)

    def bias(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.embedding(log_bucket(k - q), table).permute(2, 0, 1)[None]

    module = Attend(adding(bias)).to(dtype).eval()
    fast = turbotx.optimize(module)
    for n in LENGTHS:
        x = torch.randn(2, n, 16, dtype=dtype)
        torch.testing.assert_close(fast(x), module(x), rtol=3e-2, atol=3e-2)
    assert not holds_squares(fast)


@needs_compiler
@torch.no_grad()
def test_behind_earlier_keys() -> None:
    def inner(q: Any, k: Any, v: Any, past: Any) -> torch.Tensor:
        k, v = torch.cat([past, k], 2), torch.cat([past, v], 2)
        places = positions(q.shape[2])[:, None] + past.shape[2]
        ahead = positions(k.shape[2])[None, :] - places
        mask = torch.where(ahead <= 0, looked_up(log_bucket(ahead)), torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, mask)

    module = Attend(inner).eval()
    fast = turbotx.optimize(module)
    for n, before in ((6, 3), (1, 9), (5, 1), (40, 70), (1, 1)):
        x, past = torch.randn(2, n, 16), torch.randn(2, 4, before, 8)
        near = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(fast(x, past), module(x, past), **near)
    assert not holds_squares(fast)


@needs_compiler
@torch.no_grad()
def test_positions_that_a_mask_counts_stay_as_they_are() -> None:
    """Behind padding on the left, positions are no places."""

    def inner(q: Any, k: Any, v: Any, keys: Any) -> torch.Tensor:
        places = (keys.cumsum(-1) - 1).clamp(min=0)
        bias = -SLOPES * (places[:, None, None, :] - places[:, None, :, None]).abs()
        return F.scaled_dot_product_attention(q, k, v, bias)

    module = Attend(inner).eval()
    fast = turbotx.optimize(module)
    check(module, fast, lambda n: (torch.arange(n)[None] >= torch.tensor([[0], [n // 2]])).long())
    assert holds_squares(fast)


@needs_compiler
@torch.no_grad()
def test_a_lookup_beyond_its_table_is_told() -> None:
    module = Attend(adding(lambda q, k: looked_up(k - q + 7))).eval()
    fast = turbotx.optimize(module)
    for n in (5, 8, 1, 9):  # distances of 9 places are up to 8
        x = torch.randn(2, n, 16)
        if n == 9:
            with pytest.raises(IndexError):
                fast(x)
        else:
            torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-4)


@needs_compiler
@torch.no_grad()
def test_what_adds_nothing_is_left_out() -> None:
    """T5's cross attention adds zeros."""

    def inner(q: Any, k: Any, v: Any) -> torch.Tensor:
        zeros = torch.zeros(1, q.shape[1], q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, zeros)

    module = Attend(inner).eval()
    fast = turbotx.optimize(module)
    check(module, fast)
    (node,) = engine_of(fast).variants()[0].graph.find_nodes(op="call_function", target=attention)
    assert node.args[4] is None


def test_the_ops_own_meaning() -> None:
    line = torch.arange(6.0).view(1, 6)  # 2 queries, 5 keys
    made = along_diagonals(line, 2, 5)
    assert made.tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]]


@needs_compiler
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["t5", "mpnet", "gpt_neo"])
@torch.no_grad()
def test_models_hold_no_square(family: str, packed: bool) -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "mpnet": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "intermediate_size": 48},
        "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5,
                    "attention_types": [[["global", "local"], 1]], "use_cache": False},
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, vocab_size=60, **small[family])
    made = transformers.T5EncoderModel if family == "t5" else transformers.AutoModel.from_config
    model = made(config).eval()
    fast = turbotx.optimize(model, padding="packed" if packed else "padded")
    for n in (7, 1, 40, 12):
        ids, mask = torch.randint(5, 60, (2, n)), torch.ones(2, n, dtype=torch.int64)
        mask[1, max(1, n // 2) :] = 0
        ours, theirs = (f(input_ids=ids, attention_mask=mask)[0] for f in (fast, model))
        shown = mask.bool()
        torch.testing.assert_close(ours[shown], theirs[shown], rtol=1e-4, atol=1e-4)
    assert not holds_squares(fast, 64)
