"""What forward sets, or moves on, where no program can follow: refused, and left as it was."""

from __future__ import annotations

import contextvars
import itertools
import threading
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import CaptureError

X = torch.ones(2, 3)
COUNT = 0
LOOKED_UP: Any = None
HERE = threading.local()
VARIABLE = contextvars.ContextVar("VARIABLE", default=0)


def counts(x):
    global COUNT
    COUNT += 1
    return x * COUNT


def make_nonlocal():
    calls = 0

    def model(x):
        nonlocal calls
        calls += 1
        return x * calls

    return model


class OfClass(nn.Module):
    seen: ClassVar[Any] = 0

    def forward(self, x):
        type(self).seen = x.shape[1]
        return x * 2


def of_thread(x):
    HERE.seen = x.shape[1]
    return x * 2


def of_context(x):
    VARIABLE.set(x.shape[1])
    return x * 2


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (counts, r"sets 'COUNT' \(0\) to 1"),
        (make_nonlocal(), r"sets 'calls' \(0\) to 1"),
        (OfClass().eval(), r"sets 'OfClass.seen' \(0\)"),
        (of_thread, r"sets 'seen' \(not there\)"),
        (of_context, "sets 'VARIABLE'"),
    ],
)
def test_what_cannot_be_set_by_a_program_is_refused_and_put_back(model: Any, what: str) -> None:
    for _ in range(2):
        with pytest.raises(CaptureError, match=what):
            turbotx.optimize(model)(X)
    assert COUNT == 0 and OfClass.seen == 0 and VARIABLE.get() == 0
    assert not hasattr(HERE, "seen")


@pytest.mark.parametrize("held", [iter([1, 2]), (k for k in (1, 2)), itertools.count(1)])
def test_what_every_call_would_move_on_is_refused(held: Any) -> None:
    with pytest.raises(CaptureError, match="which every call would advance"):
        turbotx.optimize(lambda x: x * next(held))(X)


def test_a_function_that_is_looked_up_once_is_no_state() -> None:
    def looks_up(x):
        global LOOKED_UP
        if LOOKED_UP is None:
            LOOKED_UP = torch.relu
        return LOOKED_UP(x)

    torch.testing.assert_close(turbotx.optimize(looks_up)(-X), looks_up(-X))
