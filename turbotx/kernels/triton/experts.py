"""Print the launch that sorts rows by expert as Triton: a stable counting sort.

In: a target. Out: stand-alone source of one function, the `route` of templates/experts.py, and its
job; one program per expert reads every row's choice twice::

    args: chosen_ptr, order_ptr, place_ptr, ends_ptr, rows, experts
"""

from __future__ import annotations

from dataclasses import dataclass

from turbotx.kernels.job import Job
from turbotx.kernels.triton.functions import stand_alone
from turbotx.kernels.triton.specialize import specialize

ARGUMENTS = ("chosen_ptr", "order_ptr", "place_ptr", "ends_ptr", "rows", "experts")


@dataclass(frozen=True)
class RouteSchedule:
    """Rows per step and warps of a program."""

    tile: int = 1024
    num_warps: int = 4


def print_triton_route(schedule: RouteSchedule) -> str:
    """Return the Triton source of a route launch."""
    header = [f"route: rows in the order of their experts, {schedule.tile} choices at a time"]
    return stand_alone(header, specialize("experts", "route", "route", [*ARGUMENTS, "TILE"], {}))


def route_job(target: str) -> Job:
    """Return the job for a route launch."""
    schedule = RouteSchedule()
    kinds = ("*i64", "*i64", "*i64", "*i32", "i32", "i32")
    return Job(
        name="route",
        source=print_triton_route(schedule),
        target=target,
        signature=(*zip(ARGUMENTS, kinds, strict=True), ("TILE", "constexpr")),
        constexprs=(("TILE", schedule.tile),),
        divisible=ARGUMENTS[1:4],
        num_warps=schedule.num_warps,
    )
