"""Packing a graph: what becomes of each op over tokens, what is refused by name, what the checker
rejects.

In: small modules over (batch, seq) with a mask. Out: graphs over tokens, which compute what the
padded ones do for every token that the mask shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from turbotx.capture.capture_sizes import capture_sizes
from turbotx.capture.tracing import tracing
from turbotx.engine.pipeline import rewrite
from turbotx.errors import PackError, VerifyError
from turbotx.passes.pack import TOKENS, PackedCapture, pack
from turbotx.passes.pack_check import check_packed

IDS = torch.randint(0, 20, (3, 5))
MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1, 0, 1, 1, 1]])


class Model(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(20, 8), nn.Embedding(9, 8)
        self.inner, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)
        self.function = function

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.function(self, self.table(input_ids), attention_mask)


def attend(m: Model, x: torch.Tensor, keys: Any, **said: Any) -> torch.Tensor:
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in m.inner(x).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, keys, **said).transpose(1, 2).flatten(2)


def keys_of(mask: torch.Tensor) -> torch.Tensor:
    return mask.to(torch.bool)[:, None, None, :]


def packed(function: Callable[..., Any]) -> PackedCapture:
    model = Model(function).eval()
    captured = capture_sizes(model, (), {"input_ids": IDS, "attention_mask": MASK})
    with tracing():
        rewrite(captured.graph)
        found = pack(captured)
        check_packed(found.graph, TOKENS)
    return found


def targets(found: PackedCapture) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in found.graph.nodes]


def test_rows_and_attention() -> None:
    found = packed(lambda m, x, mask: m.norm(attend(m, x, keys_of(mask)) + x))
    assert "packed_attention" in targets(found) and found.input_sizes[0][0] == 1
    assert found.dims[-1] == TOKENS and not found.packing.from_start
    assert found.packing.outputs[0] is not None


def test_pooling_is_by_sequence() -> None:
    def mean(m: Model, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, shown = attend(m, x, keys_of(mask)), mask[:, :, None].float()
        return (x * shown).sum(1) / shown.sum(1).clamp(min=1)

    found = packed(mean)
    assert targets(found).count("sequence_sum") == 2 and found.packing.outputs == (None,)


def test_largest_and_first() -> None:
    def both(m: Model, x: torch.Tensor, mask: torch.Tensor) -> Any:
        x = attend(m, x, keys_of(mask))
        return x.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1), x[:, 0]

    found = packed(both)
    assert {"sequence_max", "sequence_token"} <= set(targets(found)) and found.packing.from_start


def test_a_largest_of_what_is_never_negative_may_hide_by_zeros() -> None:
    """As SPLADE pools; where values may be negative, a 0 of padding would win."""

    def largest(m: Model, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (torch.log1p(attend(m, x, keys_of(mask)).relu()) * mask[:, :, None]).amax(1)

    assert "sequence_max" in targets(packed(largest))
    with pytest.raises(PackError, match="0 is what it reads"):
        packed(lambda m, x, mask: (attend(m, x, keys_of(mask)) * mask[:, :, None]).amax(1))


def test_positions_are_by_token() -> None:
    def placed(m: Model, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + m.places(torch.arange(x.shape[1]))
        return attend(m, x, keys_of(mask))

    found = packed(placed)
    assert "positions" in found.input_names
    assert not any("arange" in name for name in targets(found))


def test_relative_bias_stays_by_columns() -> None:
    def relative(m: Model, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        bias = -(at[None, :] - at[:, None]).abs().float()[None, None]
        hidden = torch.where(keys_of(mask), 0.0, torch.finfo(torch.float32).min)
        return attend(m, x, bias + hidden)

    (node,) = (n for n in packed(relative).graph.nodes if "packed_attention" in n.name)
    assert node.args[4] is not None and node.kwargs["blind_mean"] is True


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "flip": (lambda m, x, mask: attend(m, x.flip(1), keys_of(mask)), "take each token by itself"),
    "softmax": (lambda m, x, mask: attend(m, x, keys_of(mask)).softmax(1), "so that they meet"),
    "scores": (lambda m, x, mask: attend(m, x, keys_of(mask)) @ x.mT, "with each other"),
    "no keys": (lambda m, x, mask: attend(m, x, None) * mask[:, :, None], "does not hide the keys"),
    "mean": (lambda m, x, mask: attend(m, x, keys_of(mask)).mean(1), "not by sequence"),
    "sum": (lambda m, x, mask: attend(m, x, keys_of(mask)).sum(1), "does not tell what"),
    "sum of all": (lambda m, x, mask: (x * mask[:, :, None]).sum(0), "not by sequence"),
    "conv": (
        lambda m, x, mask: F.conv1d(attend(m, x, keys_of(mask)).mT, torch.ones(8, 8, 3)),
        "take each token by itself",
    ),
    "some columns": (lambda m, x, mask: attend(m, x, keys_of(mask))[:, 1:3], "some columns"),
    "pairs": (
        lambda m, x, mask: (x[:, :, None] - x[:, None]) * mask[:, :, None, None],
        "each pair",
    ),
    "other keys": (lambda m, x, mask: attend(m, x, keys_of(1 - mask)), "the call's mask hides"),
    "the mask itself": (lambda m, x, mask: (attend(m, x, keys_of(mask)), mask), "is returned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    function, why = REFUSED[name]
    with pytest.raises(PackError, match=r"cannot pack Model: \w+") as error:
        packed(function)
    assert why in str(error.value)


def test_a_call_without_a_mask_is_refused() -> None:
    captured = capture_sizes(nn.Linear(4, 4).eval(), (torch.randn(2, 3, 4),), {})
    with pytest.raises(PackError, match="has no attention_mask"):
        pack(captured)


def _reverse(found: PackedCapture) -> None:
    (node,) = (n for n in found.graph.nodes if "layer_norm" in n.name)
    with found.graph.inserting_before(node):
        made = found.graph.call_function(torch.ops.aten.flip.default, (node.args[0], [1]))
    made.meta = dict(node.meta)
    node.args = (made, *node.args[1:])


def _look_up_others(found: PackedCapture) -> None:
    (node,) = (n for n in found.graph.nodes if "layer_norm" in n.name)
    at = next(n for n in found.graph.nodes if n.name == "positions")
    with found.graph.inserting_before(node):
        made = found.graph.call_function(torch.ops.aten.index_select.default, (node.args[0], 1, at))
    made.meta = dict(node.meta)
    node.args = (made, *node.args[1:])


def _sum_all(found: PackedCapture) -> None:
    (node,) = (n for n in found.graph.nodes if "layer_norm" in n.name)
    node.target, node.args = torch.ops.aten.softmax.int, (node.args[0], 1)


def _mix_up_bounds(found: PackedCapture) -> None:
    (node,) = (n for n in found.graph.nodes if "packed_attention" in n.name)
    node.args = (*node.args[:6], node.args[7], node.args[7])


@pytest.mark.parametrize("spoil", [_reverse, _look_up_others, _sum_all, _mix_up_bounds])
def test_the_checker_rejects(spoil: Callable[[PackedCapture], None]) -> None:
    def function(m: Model, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + m.places(torch.arange(x.shape[1]))
        return m.norm(attend(m, x, keys_of(mask)) + x)

    found = packed(function)
    spoil(found)
    with tracing(), pytest.raises(VerifyError):
        check_packed(found.graph, TOKENS)
