"""Random programs run inside an arena, clean and poisoned, read the bytes that they wrote."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbotx.memory.liveness import LaunchUse, analyze
from turbotx.memory.planner import check_plan, make_planner
from turbotx.memory.pool import ChunkPool, poison

WIDTHS = (1, 3, 8)  # size classes, in units of the shape


@st.composite
def programs(draw):
    """Launches that each mix earlier buffers into a new one; some may write over an input.

    Returns launches, the size class of every buffer, views of buffers, and the outputs.
    """
    launches, widths, views, workspaces = [], {}, {}, {}
    for index in range(draw(st.integers(1, 14))):
        known = ["input", *widths, *views]
        reads = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        width = draw(st.sampled_from(range(len(WIDTHS))))
        name = f"t{index}"
        inplace = [(name, r) for r in dict.fromkeys(reads) if widths.get(r) == width]
        scratch = (f"w{index}",) if draw(st.booleans()) else ()
        launches.append(LaunchUse(f"mix_{index}", tuple(reads), (name,), scratch, tuple(inplace)))
        widths[name] = width
        workspaces.update(dict.fromkeys(scratch, 0))
        if draw(st.booleans()):
            views[f"v{index}"] = name
    outputs = draw(st.sets(st.sampled_from(sorted(widths)), min_size=1, max_size=2))
    return launches, widths | workspaces, views, sorted(outputs)


def mix(inputs, count):
    """What a launch computes: elementwise, so that writing over an input is safe."""
    total = np.full(count, 0.5, dtype=np.float32)
    for array in inputs:
        total = total * 0.75 + np.resize(array, count)
    return total


def run_apart(launches, widths, aliases, outputs, unit):
    """Every buffer in memory of its own: what the program means."""
    values = {"input": np.arange(unit, dtype=np.float32)}
    for use in launches:
        inputs = [values[aliases.get(name, name)] for name in use.reads]
        values[use.writes[0]] = mix(inputs, unit * WIDTHS[widths[use.writes[0]]])
    return [values[name] for name in outputs]


def run_in_arena(launches, widths, aliases, outputs, unit, kind, pool, poisoned):
    """The same through liveness, planner and pool; dying bytes are poisoned if asked for."""
    live = analyze(launches, outside=["input", *outputs], aliases=aliases, size_of=widths)
    size_class = [widths[name] for name in live.names]
    planner = make_planner(kind, live.lifetimes, size_class, live.names, [512, 1536, 4096])
    class_nbytes = [4 * unit * width for width in WIDTHS]
    plan = planner.plan(class_nbytes)
    check_plan(plan)
    place = {p.buffer.name: (p.offset, p.end) for p in plan.placements}
    apart = {"input": np.arange(unit, dtype=np.float32)}
    for name in outputs:
        apart[name] = np.empty(unit * WIDTHS[widths[name]], dtype=np.float32)

    with pool.lease(plan.peak_nbytes) as arena:
        if poisoned:
            poison(arena.tensor)
        memory = arena.tensor.numpy()

        def bytes_of(name):
            root = live.root_of.get(name)
            if root is None:
                return apart[aliases.get(name, name)]
            low, high = place[root]
            return memory[low:high].view(np.float32)

        for index, use in enumerate(launches):
            for name in use.workspaces:
                bytes_of(name)[:] = -1.0
            target = bytes_of(use.writes[0])
            target[:] = mix([bytes_of(name) for name in use.reads], len(target))
            for name in live.dying_after(index) if poisoned else ():
                low, high = place[name]
                poison(arena.tensor[low:high])
    return [apart[name] for name in outputs]


@pytest.mark.parametrize("kind", ["symbolic", "chunked", "greedy"])
@settings(max_examples=40, deadline=None)
@given(program=programs(), units=st.lists(st.integers(1, 700), min_size=1, max_size=3))
def test_poisoned_runs_are_bitwise_equal_to_clean_ones(kind, program, units):
    pool = ChunkPool(torch.device("cpu"))
    for unit in units:
        expected = run_apart(*program, unit)
        for poisoned in (False, True):
            found = run_in_arena(*program, unit, kind, pool, poisoned)
            for a, b in zip(expected, found, strict=True):
                assert a.tobytes() == b.tobytes()
