"""Which tests run: slices of the sweep, and what was measured as slow.

In: texts as TURBOTX_SWEEP and durations.txt hold them. Out: which case is in which slice::

    TURBOTX_SWEEP=2/3  ->  every case is in exactly one of 1/3, 2/3 and 3/3
"""

from __future__ import annotations

import pytest

from tests.selection import in_slice, parse_slice, read_durations

pytest_plugins = ["pytester"]
SUITE = """
import pytest

@pytest.mark.sweep
@pytest.mark.parametrize("n", range(40))
def test_swept(n):
    pass

def test_ordinary():
    pass
"""
CONFTEST = """
from tests.selection import leave_out_sweep

def pytest_collection_modifyitems(config, items):
    leave_out_sweep(config, items)
"""


@pytest.mark.parametrize(
    ("text", "chosen"), [("1", (1, 1)), ("1/1", (1, 1)), ("3/24", (3, 24)), ("24/24", (24, 24))]
)
def test_a_slice_is_read(text: str, chosen: tuple[int, int]) -> None:
    assert parse_slice(text) == chosen


@pytest.mark.parametrize("text", ["", "0/3", "4/3", "3", "a/b", "1/2/3", "-1/3"])
def test_no_slice_is_named(text: str) -> None:
    with pytest.raises(pytest.UsageError, match=r"1 or k/n"):
        parse_slice(text)


def test_every_case_is_in_one_slice() -> None:
    names = [f"test_swept[{k}]" for k in range(200)]
    found = [[k for k in range(1, 8) if in_slice(name, (k, 7))] for name in names]
    assert {len(slices) for slices in found} == {1}
    assert {k for (k,) in found} == set(range(1, 8))


def test_the_sweep_runs_where_it_is_asked_for(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    sweep: x\n")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SUITE)

    def count(asked: str | None) -> int:
        if asked is None:
            monkeypatch.delenv("TURBOTX_SWEEP", raising=False)
        else:
            monkeypatch.setenv("TURBOTX_SWEEP", asked)
        return pytester.inline_run("-p", "no:cacheprovider").countoutcomes()[0]

    assert (count(None), count("1")) == (1, 41)
    assert sum(count(f"{k}/3") for k in (1, 2, 3)) == 40 + 3


def test_durations_are_seconds_and_names() -> None:
    assert read_durations("# a comment\n\n1.5 tests/a.py::test_b\n") == {"tests/a.py::test_b": 1.5}
