"""An independent check of a memory plan, deliberately simple and quadratic.

In: a Plan. Out: nothing, or PlanError naming the buffers and the rule. It shares no code with any
planner, so that it does not share a planner's mistakes::

    PlanError: layer0.qkv [0, 768) and layer0.ctx [512, 1024) share bytes in launch 4 ...
"""

from __future__ import annotations

from turbotx.memory.planner.plan import ALIGNMENT, Placement, Plan, PlanError


def check_plan(plan: Plan) -> None:
    """Raise PlanError if the plan is unsafe or misstates its quality.

    Rules: sizes are not negative; offsets are aligned and not negative; two buffers alive in the
    same launch share no byte; every buffer lies inside the chunks; chunks do not overlap; the peak
    covers every buffer and every chunk below it; the lower bound is exact.
    """
    for placement in plan.placements:
        _check_one(placement, plan.peak_nbytes)
    for i, first in enumerate(plan.placements):
        for second in plan.placements[i + 1 :]:
            _check_pair(first, second)
    _check_chunks(plan)
    _check_bound(plan)


def _check_one(placement: Placement, peak_nbytes: int) -> None:
    name, nbytes = placement.buffer.name, placement.buffer.nbytes
    if nbytes < 0:
        raise PlanError(f"{name} has a negative size, {nbytes} bytes")
    if placement.offset < 0:
        raise PlanError(f"{name} lies before the arena, at offset {placement.offset}")
    if placement.offset % ALIGNMENT:
        raise PlanError(f"{name} is misaligned: {placement.offset} is no multiple of {ALIGNMENT}")
    if placement.offset + nbytes > peak_nbytes:
        raise PlanError(
            f"{name} ends at byte {placement.offset + nbytes}, past the peak of {peak_nbytes}"
        )


def _check_pair(first: Placement, second: Placement) -> None:
    a, b = first.buffer, second.buffer
    if not a.nbytes or not b.nbytes:
        return
    from_launch = max(a.lifetime.begin, b.lifetime.begin)
    to_launch = min(a.lifetime.end, b.lifetime.end)
    from_byte = max(first.offset, second.offset)
    to_byte = min(first.offset + a.nbytes, second.offset + b.nbytes)
    if from_launch < to_launch and from_byte < to_byte:
        raise PlanError(
            f"{a.name} [{first.offset}, {first.offset + a.nbytes}) and "
            f"{b.name} [{second.offset}, {second.offset + b.nbytes}) share bytes "
            f"[{from_byte}, {to_byte}) in launches [{from_launch}, {to_launch})"
        )


def _check_chunks(plan: Plan) -> None:
    spans: list[tuple[int, int]] = []
    for chunk in sorted(plan.chunks, key=lambda c: c.offset):
        if chunk.nbytes <= 0 or chunk.offset < 0:
            raise PlanError(f"chunk at {chunk.offset} of {chunk.nbytes} bytes is no memory")
        if spans and chunk.offset < spans[-1][1]:
            raise PlanError(f"chunk at {chunk.offset} overlaps one that ends at {spans[-1][1]}")
        if spans and chunk.offset == spans[-1][1]:
            spans[-1] = (spans[-1][0], chunk.offset + chunk.nbytes)
        else:
            spans.append((chunk.offset, chunk.offset + chunk.nbytes))
    for placement in plan.placements:
        begin, end = placement.offset, placement.offset + placement.buffer.nbytes
        if begin < end and not any(low <= begin and end <= high for low, high in spans):
            raise PlanError(f"{placement.buffer.name} [{begin}, {end}) lies outside the chunks")


def _check_bound(plan: Plan) -> None:
    bound = 0
    for moment in {p.buffer.lifetime.begin for p in plan.placements}:
        live = 0
        for placement in plan.placements:
            lifetime = placement.buffer.lifetime
            if lifetime.begin <= moment < lifetime.end:
                live += -(-placement.buffer.nbytes // ALIGNMENT) * ALIGNMENT
        bound = max(bound, live)
    if bound != plan.lower_bound_nbytes:
        raise PlanError(
            f"the plan states a lower bound of {plan.lower_bound_nbytes} bytes, but {bound} "
            f"bytes are alive in its busiest launch"
        )
