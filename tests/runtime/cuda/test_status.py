"""Status words: each report is raised once, whoever reads and whatever comes meanwhile."""

from __future__ import annotations

import threading

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

from tests.runtime.cuda.stand_in_device import RecordingDevice, memory_at
from turbotx.runtime.cuda.status import Status


def report(status: Status, launch: int, check: int) -> None:
    """Write what a kernel would."""
    word = np.frombuffer(status.words.numpy(), dtype=np.int32)
    place = (status.address(launch) - status.words.data_ptr()) // 4 + check - 1
    word[place] = check


def test_each_check_of_each_launch_has_a_word() -> None:
    status = Status(RecordingDevice(), [0, 2, 0, 1])
    assert status.take() == 0
    reports = [(1, 1), (1, 2), (3, 1)]
    for launch, check in reports:
        report(status, launch, check)
    assert [status.take() for _ in range(4)] == [(i + 1) << 32 | k for i, k in reports] + [0]


def test_a_report_of_another_check_is_not_cleared_with_the_one_that_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = Status(RecordingDevice(), [2])
    report(status, 0, 1)
    look = np.flatnonzero

    def look_slowly(words: np.ndarray) -> np.ndarray:
        found = look(words)
        report(status, 0, 2)  # the device, before the host has cleared what it read
        return found

    monkeypatch.setattr(np, "flatnonzero", look_slowly)
    assert status.take() == 1 << 32 | 1
    monkeypatch.undo()
    assert status.take() == 1 << 32 | 2


def test_a_report_is_raised_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    status, taken = Status(RecordingDevice(), [1]), []
    together = threading.Barrier(2)

    class Seen:
        """The words, seen by both threads before either clears one."""

        def any(self) -> bool:
            together.wait(10)
            return True

        def __getattr__(self, name: str) -> object:
            return getattr(words, name)

        def __array__(self, *args: object, **options: object) -> np.ndarray:
            return words

        def __setitem__(self, place: int, value: int) -> None:
            words[place] = value

    words = status.seen
    monkeypatch.setattr(status, "seen", Seen())
    report(status, 0, 1)
    threads = [threading.Thread(target=lambda: taken.append(status.take())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [0, 1 << 32 | 1]


def test_without_checks_there_is_nothing_to_read() -> None:
    status = Status(RecordingDevice(), [])
    assert status.take() == 0
    assert memory_at(status.words.data_ptr(), status.words.dtype) == 0
