"""What `gpu.py` runs: plans, each a list of groups of stages.

The stages of a group run at the same time, so only what is not timed shares one. A plan's first
groups tell whether anything is right, and what a later one needs is warm by then::

    PLANS["first"]()  ->  [[smoke, right/bert-base, ...], [latency/...], [sweep/...]]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, int]
HEAD: Shape = (1, 40)
MANY: Shape = (32, 128)
COMPILED = ("compile", "compile-reduce-overhead")


@dataclass(frozen=True)
class Stage:
    """A function of `gpu_stages` or `gpu_kernels` and its arguments, run as a process of its own.

    name: of the stage and of its log. limit_s: seconds after which the process is ended.
    environment: variables that it gets. wrapper: a command in front of it.
    """

    name: str
    limit_s: float
    function: str
    arguments: tuple[Any, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()

    def run(self, emit: Callable[[str, dict[str, Any]], None]) -> None:
        import gpu_kernels
        import gpu_stages

        found = getattr(gpu_stages, self.function, None) or getattr(gpu_kernels, self.function)
        found(emit, *self.arguments)


def stage(name: str, limit_s: float, function: str, *arguments: Any) -> Stage:
    return Stage(name, limit_s, function, arguments)


def first() -> list[list[Stage]]:
    """Does it run, is it right, where does the time go: about three minutes."""
    return [
        [
            stage("smoke", 60, "smoke"),
            stage("right/bert-base/fp16", 60, "right", "bert-base", "fp16"),
            stage("right/gpt2/fp16", 60, "right", "gpt2", "fp16", 3),
            stage("right/llama/fp16", 60, "right", "llama", "fp16", 2),
            stage("right/minilm/bf16", 60, "right", "minilm", "bf16"),
            stage("right/bert-base/fp16/pdl", 60, "right", "bert-base", "fp16", 3, "pdl"),
            *(
                stage(f"warm/1x40/{e}", 75, "baseline", "bert-base", "fp16", HEAD, e, False)
                for e in COMPILED
            ),
        ],
        [stage("latency/1x40", 45, "latency", "bert-base", "fp16", HEAD)],
        [stage("sweep/few", 45, "sweep_few")],
        *[
            [stage(f"latency/1x40/{e}", 40, "baseline", "bert-base", "fp16", HEAD, e, True)]
            for e in COMPILED
        ],
        [stage("latency/32x128", 40, "latency", "bert-base", "fp16", MANY)],
        [stage("sweep/many", 40, "sweep_many")],
    ]


PLANS: dict[str, Callable[[], list[list[Stage]]]] = {"first": first}
