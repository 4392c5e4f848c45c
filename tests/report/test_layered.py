"""The layered layout: boxes below what they read, none on another, lanes straight.

In: small graphs, and random ones. Out: what must hold of every layout.
"""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from turbotx.report.layered import LayeredDrawing, lay_out

BOX = (60.0, 20.0)


def overlaps(
    layout: LayeredDrawing, names: list[str], sizes: dict[str, tuple[float, float]]
) -> bool:
    for k, a in enumerate(names):
        for b in names[:k]:
            (xa, ya), (xb, yb) = layout.centres[a], layout.centres[b]
            apart = abs(xa - xb) + 1e-6 >= (sizes[a][0] + sizes[b][0]) / 2
            if not apart and abs(ya - yb) < (sizes[a][1] + sizes[b][1]) / 2:
                return True
    return False


def test_a_chain_is_a_straight_line() -> None:
    names = [f"n{k}" for k in range(6)]
    layout = lay_out(dict.fromkeys(names, BOX), list(itertools.pairwise(names)))
    assert {round(x, 6) for x, _ in layout.centres.values()} == {30.0}
    heights = [layout.centres[n][1] for n in names]
    assert heights == sorted(heights) and layout.width == 60.0


def test_a_long_arrow_is_a_lane_beside_the_boxes() -> None:
    names = [f"n{k}" for k in range(8)]
    arrows = [*itertools.pairwise(names), ("n0", "n7")]
    layout = lay_out(dict.fromkeys(names, BOX), arrows)
    bends = layout.bends["n0", "n7"]
    assert len(bends) == 6
    assert max(x for x, _ in bends[1:-1]) - min(x for x, _ in bends[1:-1]) < 15
    for x, y in bends:
        (beside,) = [c for c in layout.centres.values() if c[1] == y]
        assert abs(x - beside[0]) >= BOX[0] / 2


def test_inputs_stand_over_their_first_reader() -> None:
    arrows = [("a", "b"), ("b", "c"), ("late", "c")]
    layout = lay_out(dict.fromkeys(["a", "late", "b", "c"], BOX), arrows)
    assert layout.centres["late"][1] == layout.centres["b"][1]


def test_nothing_is_an_empty_layout() -> None:
    assert lay_out({}, []) == LayeredDrawing({}, {}, 0.0, 0.0)


@given(st.integers(1, 14), st.data())
def test_any_graph_flows_down_without_overlap(count: int, data: st.DataObject) -> None:
    names = [f"n{k}" for k in range(count)]
    pairs = [(a, b) for k, b in enumerate(names) for a in names[:k]]
    arrows = data.draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []
    sizes = {n: (data.draw(st.floats(10, 200)), 20.0) for n in names}
    layout = lay_out(sizes, arrows)
    assert not overlaps(layout, names, sizes)
    for a, b in arrows:
        path = [layout.centres[a], *layout.bends[a, b], layout.centres[b]]
        assert [y for _, y in path] == sorted({y for _, y in path})
    for n, (x, y) in layout.centres.items():
        assert x - sizes[n][0] / 2 >= -1e-6 and x + sizes[n][0] / 2 <= layout.width + 1e-6
        assert 0 <= y <= layout.height
