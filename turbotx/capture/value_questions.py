"""Value questions: the user code's branches on tensor values, answered while tracing.

In: `if`, `assert` and the like on `bool(tensor)`, or on a comparison with its `.item()`. Out: an
assumed outcome, and the values that it depends on, which become results of the program so that
every call is checked (`decisions.py`)::

    assert lengths.max().item() <= seq    ->  True, the value lengths.max()
    if torch.isfinite(x).all():           ->  True, the value isfinite(x).all()

A value that is used in any other way, above all as a size, is unknown, and refused later.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import sym_node, symbolic_shapes
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from turbotx.capture.decisions import AssumedCondition, Decisions, Outcomes
from turbotx.capture.module_state.values import is_library
from turbotx.capture.patched_functions import unpatched
from turbotx.errors import CaptureError
from turbotx.ir.expr import sizes_of
from turbotx.ir.sizes import Sizes

Tensor: Any = torch.Tensor

MOST_DECISIONS = 128
"""The most conditions of one capture: a loop that ends by a value would be unrolled without end."""
MOST_ATTEMPTS = 6
"""The most traces of one capture, if the branch taken cannot be traced and another one might be."""

_PASS_ON = {
    __name__, sym_node.__name__, symbolic_shapes.__name__, "torch._tensor", "torch.overrides",
    "turbotx.capture.size_questions", "turbotx.capture.size_operators",
}  # fmt: skip
_FINITE = "finite"


def _contains(tensor: Any, element: Any) -> Any:
    return (tensor == element).any()


def _equal(one: Any, other: Any) -> Any:
    return one.eq(other).all() if one.shape == other.shape else False


def _allclose(*args: Any, **kwargs: Any) -> Any:
    return torch.isclose(*args, **kwargs).all()


def _itself(tensor: Any, message: Any = "") -> Any:
    return tensor


_QUESTIONS: dict[Any, Callable[..., Any]] = {
    Tensor.__bool__: _itself, Tensor.is_nonzero: _itself, torch.is_nonzero: _itself,
    Tensor.__contains__: _contains, Tensor.equal: _equal, torch.equal: _equal,
    Tensor.allclose: _allclose, torch.allclose: _allclose,
    torch._assert: _itself, torch._assert_async: _itself,
}  # fmt: skip
"""Functions by which Python code gets a bool, with the tensor that holds the answer."""
_ASSERTIONS = (torch._assert, torch._assert_async)


class ValueQuestions(TorchFunctionMode):
    """Function mode around the model's forward: records which tensor values the user's code tests.

    outcomes: those of the first conditions. After them, a line has the same outcome as before, or
    else its condition is assumed true, as for most asserts and checks for NaN.
    """

    def __init__(self, outcomes: Outcomes = ()) -> None:
        super().__init__()
        self._given = outcomes
        self._guesses: dict[str, bool] = dict(outcomes)
        self._flipped: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """Start a run of the code; a trace may run it more than once."""
        self._running, self._values = True, list[torch.Tensor]()
        self._known: dict[sympy.Symbol, sympy.Symbol] = {}
        self._decided: dict[sympy.Basic, tuple[bool, str]] = {}

    @property
    def has_decided(self) -> bool:
        """Whether the last run of the code branched on values."""
        return bool(self._decided)

    @property
    def count(self) -> tuple[int, int]:
        """How many values the code has asked for so far, and how often it has decided."""
        return len(self._values), len(self._decided)

    def finish(self) -> list[torch.Tensor]:
        """End the run; return the 0-d tensors whose values were tested."""
        self._running = False
        return self._values

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, func = kwargs or {}, unpatched(func)
        if func is Tensor.item and _is_unknown(args[0]):
            return self._ask(args[0], sys._getframe(1))
        if func in _QUESTIONS and isinstance(args[0], FakeTensor):
            flag = _QUESTIONS[func](*args, **kwargs)
            outcome = self._ask_bool(flag, sys._getframe(1)) if _is_unknown(flag) else bool(flag)
            return torch._assert(outcome, "".join(args[1:])) if func in _ASSERTIONS else outcome
        return func(*args, **kwargs)

    def _ask_bool(self, flag: Any, asker: FrameType) -> bool:
        number = self._ask(flag if flag.dtype is torch.bool else flag.ne(0), asker)
        known = not isinstance(number, torch.SymBool) or not free_unbacked_symbols(number)
        return bool(number) if known else self._decide(number.node.expr, _find_user(asker) or asker)

    def _ask(self, tensor: Any, asker: FrameType) -> Any:
        """Return a tensor's value as a symbol, and make the tensor a result of the program."""
        number = tensor.item()
        symbols = free_unbacked_symbols(number) if isinstance(number, _SYMBOLIC) else ()
        for symbol in set(symbols) - self._known.keys():
            self._known[symbol] = sympy.Symbol(f"value_{len(self._values)}", real=True)
            self._values.append(tensor.detach().reshape(()).clone())
            # A symbol is a real number: its difference with itself is 0.
            finite = not tensor.dtype.is_floating_point or self._decide(
                (_FINITE, symbol), _find_user(asker) or asker
            )
            if not finite:
                raise CaptureError("the number that it takes from a tensor is infinite or NaN")
        return number

    def answer(self, question: Any, is_check: bool = False) -> bool | None:
        """Return the assumed outcome of a condition tested by the user's code; None if it depends
        on other unknowns, or if PyTorch itself tests it and has an alternative.

        is_check: it has no alternative, as in `torch._check`.
        """
        unknown = set(free_unbacked_symbols(question)) if question.free_symbols else set()
        if not self._running or not unknown or not unknown <= self._known.keys():
            return None
        asker = sys._getframe(1)
        user = _find_user(asker) or (asker if is_check else None)
        return None if user is None else self._decide(question, user)

    def _decide(self, question: Any, user: FrameType) -> bool:
        """Return the outcome of a condition, or of (_FINITE, symbol): whether the symbol is
        finite."""
        if question not in self._decided:
            number, where = len(self._decided), _describe(user)
            if number >= MOST_DECISIONS:
                raise CaptureError(
                    f"it branches on values of tensors more than {MOST_DECISIONS} times: does the "
                    "end of a loop depend on one?"
                )
            given = number < len(self._given)
            outcome = self._given[number][1] if given else self._guesses.get(where, True)
            self._decided[question] = outcome, where
        return self._decided[question][0]

    def flip_last(self) -> bool:
        """After a failed trace, flip the outcome of the latest condition's line. Returns False if
        both were tried or no condition is free; assertions are never flipped."""
        made = list(self._decided.values())[len(self._given) :]
        free = [(outcome, where) for outcome, where in made if ": assert " not in where]
        if not free or free[-1][1] in self._flipped or len(self._flipped) >= MOST_ATTEMPTS - 1:
            return False
        outcome, where = free[-1]
        self._flipped.add(where)
        self._guesses[where] = not outcome
        return True

    def describe(self, symbols: Mapping[Any, Any], dims: tuple[str, ...]) -> Decisions | None:
        """Return what was assumed, over the dims; None if nothing was. symbols: the dims' symbols.

        Raises CaptureError for a condition over something else.
        """
        if not self._decided:
            return None
        names = (*dims, *(value.name for value in self._known.values()))
        made = []
        for question, (outcome, where) in self._decided.items():
            if isinstance(question, tuple):
                name = self._known[question[1]].name
                made.append(AssumedCondition(Sizes((f"{name} - {name} == 0.0",)), outcome, where))
                continue
            condition = question.xreplace({**symbols, **self._known})
            if not {s.name for s in condition.free_symbols} <= set(names):
                raise CaptureError(f"it branches on {condition}, which is not a value, at {where}")
            made.append(AssumedCondition(sizes_of([condition]), outcome, where))
        return Decisions(names, len(self._values), tuple(made))


_RANGES = (
    torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)  # fmt: skip
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _is_unknown(tensor: Any) -> bool:
    """Return whether a tensor holds one number that is known only at run time."""
    return (
        isinstance(tensor, FakeTensor)
        and tensor.constant is None
        and not tensor.dtype.is_complex
        and all(type(n) is int and n == 1 for n in tensor.shape)
    )


def _find_user(frame: FrameType | None) -> FrameType | None:
    """Return the frame of user code that tests a value, skipping PyTorch's symbolic numbers and
    checks; None if PyTorch itself tests it."""
    while frame is not None:
        name, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        checks = name == "torch" and function.startswith(("_check", "_assert", "__bool__"))
        if function == "__torch_function__" or not (name in _PASS_ON or checks):
            return None if is_library(name) else frame
        frame = frame.f_back
    return None


def _describe(frame: FrameType) -> str:
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(file, line, frame.f_globals).strip()
    return f"{file}:{line}: {text}" if text else f"{file}:{line}"


def erase_numbers(graph: fx.Graph) -> None:
    """Erase nodes that read numbers only for conditions, which are checked elsewhere, and PyTorch's
    range assertions."""
    for node in reversed(graph.nodes):
        number = isinstance(node.meta.get("val"), (*_SYMBOLIC, bool, int, float))
        if (number and not node.users and node.op == "call_function") or node.target in _RANGES:
            graph.erase_node(node)
