"""Conditions: an operand that another one makes idle, and everything that is not understood."""

from __future__ import annotations

import sys

import pytest
import torch

from turbotx.capture.conditions import decides_nothing

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="columns of code are 3.11's")


class Asked:
    """A true value that notes whether the place that asks for it can do without."""

    def __init__(self) -> None:
        self.idle: bool | None = None

    def __bool__(self) -> bool:
        self.idle = decides_nothing(sys._getframe(1))
        return True

    def __gt__(self, other: int) -> Asked:
        return self


def is_there(x: object) -> bool:
    return x is not None


def test_operands_that_another_one_settles() -> None:
    a, mask, flag, off = Asked(), object(), True, False
    answers = []
    _ = a > 1 and mask is None and flag
    answers.append(a.idle)
    _ = a > 1 and flag and off
    answers.append(a.idle)
    if a > 1 and not flag:
        raise AssertionError
    answers.append(a.idle)
    _ = (a > 1 or mask is not None) and flag
    answers.append(a.idle)
    _ = a > 1 and not torch.compiler.is_compiling() and off
    answers.append(a.idle)
    _ = (mask is None or a > 1) and off
    answers.append(a.idle)
    assert answers == [True] * 6


def test_operands_that_decide() -> None:
    a, mask, flag, off = Asked(), None, True, False
    answers = []
    _ = a > 1 and mask is None and flag
    answers.append(a.idle)
    _ = a > 1 and is_there(mask)  # who knows what else it does
    answers.append(a.idle)
    _ = a > 1 and is_there(mask) and off
    answers.append(a.idle)
    _ = a > 1 and [flag, off][1]
    answers.append(a.idle)
    _ = off or a > 1
    answers.append(a.idle)
    if a > 1:
        answers.append(a.idle)
    _ = 3 if a > 1 else 4
    answers.append(a.idle)
    _ = eval("a and off")
    answers.append(a.idle)
    assert answers == [False] * 8
