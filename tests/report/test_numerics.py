"""Numerics: the rule that every launch is held to, on errors written by hand.

In: errors of launches, and tensors. Out: what is allowed to each.
"""

from __future__ import annotations

import pytest
import torch

import turbotx
from turbotx.report.numerics import Error, compare, pool


def error(eager: float, turbotx: float, largest: float = 1.0) -> Error:
    return Error("linear_0", "", "", eager, turbotx, largest, 1.5 * eager + 0.2 * largest)


def test_a_lucky_launch_is_held_to_what_eager_makes_of_its_kind() -> None:
    lucky, usual = error(0.01, 0.4), error(4.0, 4.0, largest=10.0)  # 0.01 and 0.4 of the largest
    assert not lucky.holds
    alone, other, worse = pool([("a", lucky), ("b", usual), ("a", error(0.02, 0.4))])
    assert not alone.holds and other == usual and not worse.holds
    pooled, same = pool([("a", lucky), ("a", usual)])
    assert pooled.allowed == pytest.approx(1.5 * 0.4 + 0.2) and pooled.holds and same == usual


def test_eagers_infinite_error_allows_others_nothing() -> None:
    first, _ = pool([("a", error(0.01, 0.4)), ("a", error(float("inf"), 0.0))])
    assert not first.holds


def test_nothing_measures_float64_but_a_wrong_result_shows() -> None:
    exact = torch.randn(8, dtype=torch.float64)
    near, far = (compare("x", "", "", exact + d, exact, exact) for d in (1e-12, 1e-6))
    assert not near.applies and near.holds and not far.holds
    assert compare("x", "", "", exact.float(), exact.float(), exact).applies
    assert not compare("x", "", "", exact * float("nan"), exact, exact).holds


def test_what_is_pooled_of_a_sequence_without_a_token_is_not_measured() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=20,
    )  # fmt: skip
    fast = turbotx.optimize(transformers.BertModel(config).eval(), padding="packed")
    ids, mask = torch.arange(15).view(3, 5), torch.ones(3, 5, dtype=torch.int64)
    mask[1], mask[2, 3:] = 0, 0
    call = {"input_ids": ids, "attention_mask": mask}
    found = turbotx.explain(fast, **call).numerics(fast, **call)
    assert found.holds and [x.name for x in found.outputs] == ["output 0", "output 1"]
    assert all(x.largest > 0 for x in found.outputs)
