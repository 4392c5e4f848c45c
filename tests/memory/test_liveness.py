"""Lifetimes from launches: spans, roots of views, workspaces, and in-place reuse or its refusal."""

import pytest

from turbotx.memory.liveness import LaunchUse, analyze
from turbotx.memory.planner import PlanError

GEMM = LaunchUse("gemm", ("x",), ("a",))
GELU = LaunchUse("gelu", ("a",), ("b",), inplace=(("b", "a"),))
OUT = LaunchUse("out", ("b",), ("y",))
SIZES = {"a": "4*n", "b": "4*n"}


def spans(live):
    return {
        name: (life.begin, life.end) for name, life in zip(live.names, live.lifetimes, strict=True)
    }


def test_a_buffer_lives_from_its_first_write_through_its_last_read():
    live = analyze([GEMM, GELU, OUT], outside=["x", "y"])
    assert spans(live) == {"a": (0, 2), "b": (1, 3)}
    assert live.dying_after(1) == ("a",)
    assert live.dying_after(0) == ()


def test_what_nobody_reads_lives_in_its_launch_and_so_does_a_workspace():
    launches = [LaunchUse("split", ("x",), ("a", "unused"), workspaces=("sums",)), GELU, OUT]
    live = analyze(launches, outside=["x", "y"])
    assert spans(live) == {"a": (0, 2), "sums": (0, 1), "unused": (0, 1), "b": (1, 3)}


def test_views_of_views_are_their_root():
    launches = [GEMM, LaunchUse("late", ("head",), ("y",)), LaunchUse("last", ("rows",), ("z",))]
    live = analyze(launches, outside=["x", "y", "z"], aliases={"head": "rows", "rows": "a"})
    assert spans(live) == {"a": (0, 3)}
    assert live.root_of == {"a": "a", "head": "a", "rows": "a"}


def test_an_output_that_views_an_intermediate_takes_it_outside():
    live = analyze([GEMM, GELU, OUT], outside=["x", "y", "shown"], aliases={"shown": "b"})
    assert spans(live) == {"a": (0, 2)}


def test_an_elementwise_kernel_writes_over_what_dies_in_it():
    live = analyze([GEMM, GELU, OUT], outside=["x", "y"], size_of=SIZES)
    assert spans(live) == {"a": (0, 3)}
    assert live.root_of["b"] == "a"
    assert live.reused == (("b", "a"),)


def test_reuse_runs_through_a_chain():
    again = LaunchUse("tanh", ("b",), ("c",), inplace=(("c", "b"),))
    last = LaunchUse("out", ("c",), ("y",))
    sizes = {**SIZES, "c": "4*n"}
    live = analyze([GEMM, GELU, again, last], outside=["x", "y"], size_of=sizes)
    assert spans(live) == {"a": (0, 4)}
    assert live.root_of == {"a": "a", "b": "a", "c": "a"}


@pytest.mark.parametrize(
    ("launches", "aliases", "sizes", "outside"),
    [
        pytest.param([GEMM, GELU, OUT], {}, {}, "xy", id="sizes unknown"),
        pytest.param([GEMM, GELU, OUT], {}, {"a": "4*n", "b": "2*n"}, "xy", id="sizes differ"),
        pytest.param([GEMM, GELU, OUT], {}, SIZES, "xya", id="input is not the program's"),
        pytest.param([GEMM, GELU, OUT], {}, SIZES, "xyb", id="output is the caller's"),
        pytest.param(
            [GEMM, GELU, OUT, LaunchUse("add", ("a",), ("y",))], {}, SIZES, "xy", id="read later"
        ),
        pytest.param(
            [GEMM, GELU, OUT, LaunchUse("add", ("v",), ("y",))],
            {"v": "a"}, SIZES, "xy", id="a view is read later",
        ),
        pytest.param(
            [GEMM, LaunchUse("mix", ("a", "t"), ("b",), inplace=(("b", "a"),)), OUT],
            {"t": "a"}, SIZES, "xy", id="a view is read in the same launch",
        ),
        pytest.param(
            [GEMM, LaunchUse("acc", ("x",), ("b",)), GELU, OUT],
            {}, SIZES, "xy", id="written before",
        ),
    ],
)  # fmt: skip
def test_reuse_is_refused(launches, aliases, sizes, outside):
    live = analyze(launches, outside=list(outside), aliases=aliases, size_of=sizes)
    assert live.reused == ()


def test_one_dying_input_serves_one_output():
    both = LaunchUse("split", ("a",), ("b", "c"), inplace=(("b", "a"), ("c", "a")))
    sink = LaunchUse("sink", ("b", "c"), ("y",))
    sizes = {**SIZES, "c": "4*n"}
    live = analyze([GEMM, both, sink], outside=["x", "y"], size_of=sizes)
    assert live.reused == (("b", "a"),)
    assert spans(live) == {"a": (0, 3), "c": (1, 3)}
    live = analyze([GEMM, both], outside=["x", "y"], size_of=sizes)  # even if nobody reads them
    assert live.reused == (("b", "a"),)
    assert spans(live) == {"a": (0, 2), "c": (1, 2)}


def test_mistakes_name_the_launch_and_the_buffer():
    with pytest.raises(PlanError, match="launch gemm reads x, which no earlier launch wrote"):
        analyze([GEMM])
    with pytest.raises(PlanError, match=r"aliases go in a circle: p -> q -> p|q -> p -> q"):
        analyze([GEMM], outside=["x"], aliases={"p": "q", "q": "p"})
    shared = [LaunchUse("one", (), ("a",), workspaces=("w",)), LaunchUse("two", ("w",), ("b",))]
    with pytest.raises(PlanError, match="w is a workspace of one"):
        analyze(shared)
