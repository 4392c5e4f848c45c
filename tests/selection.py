"""Which tests run: the slow ones by the time that they were measured at, the sweep by slices.

In: `tests/durations.txt`, a line a test with the CPU seconds of all its cases, and TURBOTX_SWEEP:
unset, `1` for the whole sweep or `k/n` for the k-th of n slices. Out: marks, and who is left out::

    in_slice("tests/ops/test_operator_samples.py::test_compiled_samples[add]", (3, 24))  ->  False
"""

from __future__ import annotations

import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).parents[1]
DURATIONS = ROOT / "tests" / "durations.txt"
SLOW_S = 0.5
"""A test whose cases take as many CPU seconds together is `slow`: left out by `make test-fast`."""


def parse_slice(text: str) -> tuple[int, int]:
    """Return (k, n) of `k/n`; `1` is the whole sweep. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+)(?:/(\d+))?", text)
    k, n = (int(part or 1) for part in match.groups()) if match else (0, 0)
    if not 1 <= k <= n:
        raise pytest.UsageError(f"TURBOTX_SWEEP is 1 or k/n with 1 <= k <= n, not {text!r}")
    return k, n


def in_slice(nodeid: str, chosen: tuple[int, int]) -> bool:
    """Tell whether a case belongs to a slice: by a hash of its name, so that a case that is added
    moves no other."""
    k, n = chosen
    return zlib.crc32(nodeid.encode()) % n == k - 1


def leave_out_sweep(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases marked `sweep` that TURBOTX_SWEEP does not ask for."""
    asked = os.environ.get("TURBOTX_SWEEP")
    chosen = parse_slice(asked) if asked is not None else None

    def is_left_out(item: pytest.Item) -> bool:
        if item.get_closest_marker("sweep") is None:
            return False
        return chosen is None or not in_slice(item.nodeid, chosen)

    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item)]


def read_durations(text: str) -> dict[str, float]:
    """Return CPU seconds by the test's name, `file::function`, from lines `seconds name`."""
    lines = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(seconds) for seconds, name in lines}


def mark_slow(items: list[pytest.Item]) -> None:
    measured = read_durations(DURATIONS.read_text())
    for item in items:
        if measured.get(item.nodeid.partition("[")[0], 0) >= SLOW_S:
            item.add_marker(pytest.mark.slow)


def cpu_seconds() -> float:
    """Return what this process and all that it has waited for have taken."""
    return sum(os.times()[:4]) + sum(forks.cpu_seconds)


class Measuring:
    """A pytest plugin that measures CPU seconds, children's included: those of a test do not
    depend on what else a machine does. Under xdist the workers measure and the controller writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.start = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Iterator[None]:
        if call.when == "call":
            item.user_properties.append(("cpu_s", cpu_seconds() - self.start))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.seconds[report.nodeid.partition("[")[0]] += dict(report.user_properties)["cpu_s"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        merged = read_durations(self.path.read_text()) | self.seconds  # tests that did not run stay
        lines = [f"{s:.1f} {name}" for name, s in sorted(merged.items()) if s >= SLOW_S]
        self.path.write_text("\n".join([HEADER, *lines, ""]))


HEADER = """\
# CPU seconds of the tests that take 0.5 or more, all cases together; written by `make durations`.
# 0.5 alone: at least that, from before the times were kept."""
