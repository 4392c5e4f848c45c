"""The cost table: interpolation, monotony, refinement, persistence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbotx.serving.cost import CostTable, CostTableError, make_monotone


def small_table():
    return CostTable([1, 11], [1, 3], [[1.0, 3.0], [11.0, 33.0]])


def test_nodes_are_kept_and_the_rest_is_bilinear():
    table = small_table()
    assert table.cost_ms(11, 3) == 33.0
    assert table.cost_ms(6, 1) == pytest.approx(6.0)
    assert table.cost_ms(6, 2) == pytest.approx(12.0)


@given(st.lists(st.floats(0.1, 100), min_size=12, max_size=12))
def test_whatever_was_measured_the_table_never_falls(cells):
    dense = CostTable([1, 5, 9, 30], [1, 4, 8], np.array(cells).reshape(4, 3)).dense()
    inner = dense[1:, 1:]
    assert (np.diff(inner, axis=0) >= -1e-9).all()
    assert (np.diff(inner, axis=1) >= -1e-9).all()


def test_a_monotone_grid_is_left_alone():
    grid = np.array([[1.0, 2.0], [1.0, 5.0]])
    assert make_monotone(grid).tolist() == grid.tolist()
    assert make_monotone(np.array([[3.0, 1.0]])).tolist() == [[2.0, 2.0]]


def test_over_the_token_limit_only_single_requests_are_finite():
    dense = small_table().dense(max_tokens=12)
    assert np.isfinite(dense[6, 2]) and np.isinf(dense[7, 2]) and np.isfinite(dense[11, 1])


def test_observations_move_the_table_to_the_truth():
    rng = np.random.default_rng(0)
    table = CostTable([1, 50, 100], [1, 10, 20], [[1] * 3] * 3)
    for _ in range(4000):
        length, batch = int(rng.integers(1, 101)), int(rng.integers(1, 21))
        truth = 4 + 0.022 * length * batch
        table.observe(length, batch, truth * rng.normal(1, 0.05))
    for length, batch in ((10, 1), (50, 10), (75, 15), (100, 20)):
        assert table.cost_ms(length, batch) == pytest.approx(4 + 0.022 * length * batch, rel=0.1)


def test_one_outlier_counts_as_a_factor_of_four():
    table = small_table()
    table.observe(11, 3, 1e6)
    assert table.grid_ms[1, 1] == pytest.approx(33 + 0.1 * 3 * 33)
    table.observe(1, 1, 0.0)
    assert table.grid_ms[0, 0] > 0


def test_saved_and_loaded(tmp_path):
    table = small_table()
    table.observe(5, 2, 9.0)
    table.save(tmp_path / "deep" / "costs.json", model="toy")
    again = CostTable.load(tmp_path / "deep" / "costs.json")
    assert again.to_dict() == table.to_dict()
    assert json.loads((tmp_path / "deep" / "costs.json").read_text())["model"] == "toy"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["costs.json"]


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text('{"lengths": [1]}')
    with pytest.raises(CostTableError, match=r"costs\.json is not a cost table"):
        CostTable.load(path)


@pytest.mark.parametrize(
    "lengths, batches, grid, says",
    [
        ([1, 1], [1], [[1], [1]], "lengths must rise"),
        ([1], [2], [[1]], "batches must begin at 1"),
        ([1], [1], [[1, 2]], "shape"),
        ([1], [1], [[0]], "above zero"),
        ([1], [1], [[float("nan")]], "above zero"),
    ],
)
def test_malformed_grids_are_refused(lengths, batches, grid, says):
    with pytest.raises(CostTableError, match=says):
        CostTable(lengths, batches, grid)


def test_no_cost_outside_the_table():
    with pytest.raises(CostTableError, match="the table ends at 3 requests of 11 tokens"):
        small_table().cost_ms(12, 1)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def refuse(old, new):
        raise OSError(28, "No space left on device")

    table = CostTable([1, 8], [1, 2], [[1, 2], [2, 3]])
    table.save(tmp_path / "costs.json")
    monkeypatch.setattr("turbotx.kernels.build.os.replace", refuse)
    with pytest.raises(OSError, match="No space"):
        table.save(tmp_path / "costs.json")
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]
