"""The checker rejects a plan for each rule that it breaks, and names the buffers."""

from dataclasses import replace

import pytest

from turbotx.memory.planner import Buffer, Chunk, Lifetime, Placement, Plan, PlanError, check_plan

A = Placement(Buffer("a", 100, Lifetime(0, 2)), 0)
B = Placement(Buffer("b", 64, Lifetime(1, 3)), 128)
C = Placement(Buffer("c", 128, Lifetime(2, 3)), 0)
GOOD = Plan((Chunk(0, 256),), (A, B, C), 192, 192)


def test_a_sound_plan_passes():
    check_plan(GOOD)


@pytest.mark.parametrize(
    ("placements", "chunks", "message"),
    [
        ((A, replace(B, offset=64), C), (), r"a \[0, 100\) and b \[64, 128\) .* launches \[1, 2\)"),
        ((A, B, replace(C, offset=64)), (), "b .* and c .* share bytes"),
        ((A, replace(B, offset=120), C), (), "b is misaligned"),
        ((A, replace(B, offset=-64), C), (), "b lies before the arena"),
        ((A, replace(B, offset=192), C), (), "b ends at byte 256, past the peak of 192"),
        ((A, B, replace(C, buffer=replace(C.buffer, nbytes=-1))), (), "c has a negative size"),
        ((A, B, C), (Chunk(0, 128),), r"b \[128, 192\) lies outside the chunks"),
        ((A, B, C), (Chunk(0, 160), Chunk(192, 64)), r"b \[128, 192\) lies outside"),
        ((A, B, C), (Chunk(0, 128), Chunk(64, 192)), "chunk at 64 overlaps"),
        ((A, B, C), (Chunk(0, 256), Chunk(256, 0)), "is no memory"),
    ],
)
def test_each_rule_rejects(placements, chunks, message):
    with pytest.raises(PlanError, match=message):
        check_plan(replace(GOOD, placements=placements, chunks=chunks or GOOD.chunks))


def test_a_wrong_lower_bound_is_found():
    with pytest.raises(PlanError, match="lower bound of 128 bytes, but 192"):
        check_plan(replace(GOOD, lower_bound_nbytes=128))


def test_buffers_of_no_bytes_and_buffers_apart_in_time_may_share_an_offset():
    empty = Placement(Buffer("empty", 0, Lifetime(0, 3)), 0)
    check_plan(replace(GOOD, placements=(A, B, C, empty)))
