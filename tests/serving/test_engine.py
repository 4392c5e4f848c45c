"""Engines, pooling and the costs measured with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.sleep_engine import SleepEngine
from tests.serving.conftest import fast_costs
from turbotx.serving.cost import CostTable
from turbotx.serving.engine import (
    Head,
    TorchEngine,
    normalize_rows,
    pad_rows,
)
from turbotx.serving.measure import (
    batch_grid,
    cost_file,
    length_grid,
    load_or_measure,
    measure_costs,
)
from turbotx.serving.sentence_files import Pooling
from turbotx.serving.sentence_modules import Pool, SentenceModel
from turbotx.serving.tokens import TokenRow

ROWS = [TokenRow((5, 6, 7)), TokenRow((8,), (1,))]


class Echo(torch.nn.Module):
    """Hidden state = the id, its type, its position."""

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return {"last_hidden_state": torch.stack([input_ids, types, places], -1).float()}


def test_rows_are_padded_on_the_right():
    ids, mask, types = pad_rows(ROWS, pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert types.tolist() == [[0, 0, 0], [1, 0, 0]]


def pooling_engine(*modes, **options):
    model = SentenceModel(Echo(), [Pooling(3, modes)])
    return TorchEngine(model, Head("embedding", "+".join(modes)), **options)


@pytest.mark.parametrize(
    "modes, first, second",
    [
        (["mean"], [6, 0, 1], [8, 1, 0]),
        (["cls"], [5, 0, 0], [8, 1, 0]),
        (["max"], [7, 0, 2], [8, 1, 0]),
        (["lasttoken"], [7, 0, 2], [8, 1, 0]),
        (["mean_sqrt_len_tokens"], [18 / 3**0.5, 0, 3**0.5], [8, 1, 0]),
        (["weightedmean"], [38 / 6, 0, 8 / 6], [8, 1, 0]),
        (["max", "cls"], [7, 0, 2, 5, 0, 0], [8, 1, 0, 8, 1, 0]),
    ],
)
def test_pooling_ignores_padding(modes, first, second):
    found = pooling_engine(*modes, pad_id=1000).run(ROWS).tolist()
    assert found == [pytest.approx(first), pytest.approx(second)]


def test_types_are_left_out_for_models_without_them():
    engine = pooling_engine("cls", takes_types=False)
    assert engine.run(ROWS)[1].tolist() == [8, 0, 0]


def test_figures_include_an_optimized_modules_own():
    engine = pooling_engine("mean")
    module = engine.module
    engine.run(ROWS)
    assert engine.figures() == {"batches": 1.0}
    module.stats = lambda: {"plans": 2, "mapped_nbytes": 4096}
    assert engine.figures() == {"batches": 1.0, "plans": 2.0, "mapped_nbytes": 4096.0}


def test_max_pooling_of_negative_values():
    hidden = torch.tensor([[[-3.0], [-1.0], [0.0]]])
    assert Pool(["max"])(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[-1.0]]


def test_zero_rows_stay_zero():
    found = normalize_rows(np.array([[3, 4], [0, 0]], dtype=np.float32))
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]


def test_sleeping_answers_depend_on_the_ids_alone():
    engine = SleepEngine(fast_costs())
    together, alone = engine.run(ROWS), engine.run(ROWS[1:])
    assert together[1].tolist() == alone[0].tolist() == [8] * 8


def test_grids_cover_their_range():
    assert length_grid(512) == [1, 16, 32, 64, 128, 256, 512]
    assert length_grid(1) == [1]
    assert batch_grid(32) == [1, 4, 16, 32] and batch_grid(1) == [1]


class Counting(SleepEngine):
    shapes: set = None

    def run(self, rows):
        self.shapes = self.shapes or set()
        self.shapes.add((max(len(r) for r in rows), len(rows)))
        return super().run(rows)


def test_measuring_stays_within_the_token_limit(monkeypatch, caplog):
    engine = Counting(CostTable.from_function(lambda n, b: 0.05 + 0.01 * n * b, 40, 8))
    monkeypatch.setattr("turbotx.serving.measure.TELL_S", -1.0)
    with caplog.at_level("INFO", "turbotx"):
        table = measure_costs(engine, max_length=40, max_batch=8, max_tokens=64)
    assert "measuring costs 1/" in caplog.text and "measuring costs: " in caplog.text
    assert all(n * b <= 64 or b == 1 for n, b in engine.shapes)
    assert (table.max_length, table.max_batch) == (40, 8)
    assert table.cost_ms(40, 8) > table.cost_ms(8, 8) > table.cost_ms(1, 1) > 0


def test_a_spent_budget_still_gives_a_whole_table():
    engine = SleepEngine(CostTable.from_function(lambda n, b: 1.0, 40, 8))
    table = measure_costs(engine, max_length=40, max_batch=8, budget_ms=0.0)
    assert table.cost_ms(40, 8) == pytest.approx(320 * table.cost_ms(1, 1), rel=1e-6)


def test_a_batch_that_would_take_more_than_is_left_is_not_begun():
    engine = Counting(CostTable.from_function(lambda n, b: 0.02 * n * b, 512, 8))
    measure_costs(engine, max_length=512, max_batch=8, budget_ms=20.0)
    assert (1, 1) in engine.shapes and not any(n * b >= 1024 for n, b in engine.shapes)


def test_kept_tables_are_used_only_where_they_fit(tmp_path):
    path = cost_file(tmp_path, "a/b", "r1", "x86 64", "eager")
    assert path.name == "costs-a-b-r1-eager-x86-64.json"
    engine = Counting(fast_costs(scale=0.1))
    kept = CostTable([1, 32], [1, 8], [[1, 2], [3, 4]])
    kept.save(path)
    sizes = {"max_batch": 8, "max_tokens": None}
    assert load_or_measure(path, engine, max_length=32, **sizes).to_dict() == kept.to_dict()
    assert engine.shapes is None
    assert load_or_measure(path, engine, max_length=16, **sizes).max_length == 16
    path.write_text("broken")
    assert load_or_measure(path, engine, max_length=32, **sizes).max_length == 32
