"""What counts as only writing to a container, and what as reading it."""

from __future__ import annotations

from typing import Any

import pytest

from turbotx.capture.module_state.uses import is_only_written


class Own:
    seen: Any = None
    n = 0

    def appends(self, x):
        self.seen.append((x, x + 1))

    def appends_deep(self, x):
        self.seen["a"][self.n].append(x if x else 2)

    def puts(self, x):
        self.seen[f"at {self.n}"] = x * 2
        self.seen["tree"] = {"a": [x]}

    def replaces(self, x):
        self.seen = [x]

    def replaces_what_is_there(self, x):
        self.seen[:] = [x]

    def counts(self, x):
        if len(self.seen) < 3:
            self.seen.append(x)

    def adds_up(self, x):
        self.seen["n"] += x

    def hands_on(self, x):
        list.append(self.seen, x)

    def aliases(self, x):
        seen = self.seen
        seen.append(x)

    def takes(self, x):
        return self.seen[0] + x

    def iterates(self, x):
        return sum(self.seen, x)

    def asks_by_name(self, x):
        return getattr(self, "seen")  # noqa: B009

    def inside(self, x):
        return [y + len(self.seen) for y in x]


@pytest.mark.parametrize("name", ["appends", "appends_deep", "puts", "replaces"])
def test_writes(name: str) -> None:
    assert is_only_written("seen", [getattr(Own, name).__code__])


@pytest.mark.parametrize(
    "name",
    [
        "counts",
        "adds_up",
        "hands_on",
        "aliases",
        "takes",
        "iterates",
        "asks_by_name",
        "replaces_what_is_there",
    ],
)
def test_reads(name: str) -> None:
    assert not is_only_written("seen", [getattr(Own, name).__code__])


def test_defaults() -> None:
    def writes(x, known=[]):  # noqa: B006
        known.append(x)

    def reads(x, known=[]):  # noqa: B006
        known.append(x)
        return known

    assert is_only_written("known", [writes.__code__], local=True)
    assert not is_only_written("known", [reads.__code__], local=True)
