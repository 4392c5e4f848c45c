"""Size questions: records the decisions about sizes that a trace's results depend on.

In: a trace by torch.export. Out: the same trace over sizes that may be 1, whose shape environment
has a guard for each decision that affects a result, and none for the others::

    with sizes_from_one(answer):  export(lambda x: x[:, :2] if x.shape[1] != 7 else x)
    ->  guards  seq >= 2, seq != 7          # and not seq != 1, of whether x is contiguous
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch._export import non_strict_utils
from torch.fx.experimental import sym_node, symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from turbotx.capture import size_operators
from turbotx.capture.conditions import decides_nothing
from turbotx.capture.module_state.values import caller_outside, is_users
from turbotx.capture.sandbox.effects import SizesNeeded
from turbotx.capture.tracing import replaced_in_thread
from turbotx.errors import note_error

# PyTorch functions that query a tensor's memory layout: no size and no element of a result
# depends on it.
_LAYOUT = ("contiguous", "non_overlapping", "channels_last", "logical_to_physical", "strides")
# Functions that search for views between two shapes: the result has the requested shape either
# way.
_VIEWS = ("_reshape_view_helper", "_collapse_view_helper")
# A function that searches for such views through C++, and queries nothing itself.
_FOLDS = ("torch._decomp.decompositions", "matmul")
# A query from C++ about which library computes a convolution, and thereby the result's layout.
_CHOOSES = ("torch._subclasses.fake_impls", "conv")
# A query from C++ about whether the destination overlaps itself, which a size of 1 cannot cause.
_WRITES = ("torch._meta_registrations", "meta_copy_")
Answer: TypeAlias = Callable[..., bool | None]
_NUMBERS = ("torch", size_operators.__name__)
"""The modules of `int(number)`, `f"{number}"` and the like."""
_PASS_ON = {__name__, sym_node.__name__, symbolic_shapes.__name__}


class SizesFromOne(ShapeEnv):
    """A shape environment in which a size may be 1; PyTorch's own assumes 2 or more.

    There, `seq >= 2` holds without a guard, and `seq == 1` is false. Here both become guards if the
    model tests them. PyTorch makes such tests for every size, for broadcasting and memory layouts;
    where either outcome gives the same result, no guard is recorded.
    """

    def __init__(self, answer: Answer, *args: Any, **kwargs: Any) -> None:
        """Create the environment. answer: returns the assumed outcome of a condition on values."""
        super().__init__(*args, **kwargs)
        self.answer = answer
        self._settled: dict[sympy.Basic, sympy.Basic] = {}

    def _default_value_range(self, do_not_specialize_zero_one: bool = False) -> ValueRanges[Any]:
        return ValueRanges(sympy.S.One, int_oo)

    def evaluate_sym_node(
        self, sym_node: Any, size_oblivious: bool = False, fallback_value: bool | None = None
    ) -> Any:
        """Return the outcome of a condition; a guard is recorded if a result depends on it.

        Conditions settled by ranges and guards are cached: PyTorch drops them with every new guard,
        and deriving one takes sympy a millisecond, for each of 10,000 conditions of a few views.
        """
        answer, question = sym_node.hint, sym_node.expr
        if not isinstance(answer, bool):
            assumed = self.answer(question) if fallback_value is None else None
            if assumed is not None:
                return sympy.true if assumed else sympy.false
            try:
                return super().evaluate_sym_node(sym_node, size_oblivious, fallback_value)
            except Exception as error:
                _note_users(error)
                raise
        said = sympy.true if answer else sympy.false
        if answer == fallback_value:  # guard_or_true and the like accept either
            return said
        if question not in self._settled:
            settled = self._maybe_evaluate_static(question)
            if settled is None:
                if _is_idle(question, answer, fallback_value is not None):
                    return said
                found = super().evaluate_sym_node(sym_node, size_oblivious, fallback_value)
                self._require_bound(question, answer)
                return found
            self._settled[question] = settled
        return self._settled[question]

    def guard_or_defer_runtime_assert(  # type: ignore[override]
        self, orig_expr: Any, msg: str, fx_node: fx.Node | None = None
    ) -> bool:
        """Return whether a condition of `torch._check` holds, or record that it must."""
        assumed = self.answer(orig_expr, True)
        if assumed is not None:
            return assumed
        return super().guard_or_defer_runtime_assert(orig_expr, msg, fx_node)

    def _require_bound(self, question: sympy.Basic, answer: bool) -> None:
        """Raise SizesNeeded if several rounded sizes were found to be equal to a number together.

        For an image of (height // 4) * (width // 4) patches, as many as there are positions, no
        side is free by itself, and views of its windows would have unbounded expressions.
        """
        if not isinstance(question, sympy.Eq if answer else sympy.Ne):
            return
        whole = self.replace(question)
        # Not the quotient of two sizes, as in (4 * batch) // other, which says that they are
        # equal.
        rounded = [x for x in whole.atoms(FloorDiv) if x.args[1].is_Integer]
        sizes = set[sympy.Basic]().union(*(x.free_symbols for x in rounded))
        if len(sizes) > 1 and any(a.is_Integer for a in whole.args):
            raise SizesNeeded(frozenset(map(str, whole.free_symbols)))


def _note_users(error: Exception) -> None:
    """Record an error of a condition that the user's code tests, since that code may catch it."""
    if is_users(caller_outside(_find_asker(), _NUMBERS)):
        note_error(error)


def _is_idle(question: sympy.Basic, answer: bool, has_fallback: bool) -> bool:
    """Return whether no result depends on a condition's outcome.

    has_fallback: whether it was asked by `guard_or_true` or the like, which need no answer.
    """
    frame = _find_asker()
    module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    native = module == "torch._ops" or name == "__torch_function__"
    differ = isinstance(question, sympy.Ne if answer else sympy.Eq)
    if differ and (native or has_fallback) and _is_for_one(question):
        return True  # broadcasting: if this size is 1, so is the other
    if not native and not module.startswith("torch."):
        return decides_nothing(frame)
    if _asks_to_write(frame) or (has_fallback and (module, name) == _CHOOSES):
        return True
    if differ and (any(part in name for part in _VIEWS) or _asks_to_fold(frame)):
        return True
    asker: FrameType | None = frame
    while asker is not None and asker.f_globals.get("__name__") == module:
        if any(part in asker.f_code.co_name for part in _LAYOUT):
            return True
        asker = asker.f_back
    return False


def _asks_to_write(frame: FrameType | None) -> bool:
    """Return whether `_WRITES` asks, possibly through export's wrapper of it, or through the copy
    that a write becomes."""
    while frame is not None:
        place = frame.f_globals.get("__name__"), frame.f_code.co_name
        if place == _WRITES or (
            place[0] == "torch._ops" and frame.f_locals.get("self") is torch.ops.aten.copy.default
        ):
            return True
        if place[0] not in ("torch._export.utils", "torch._ops"):
            return False
        frame = frame.f_back
    return False


def _asks_to_fold(frame: FrameType | None) -> bool:
    """Return whether `_FOLDS` asks, or a reshape that it calls: from C++, whether it has to copy,
    which changes no value: the last 4 rows of each sequence need no copy where there are 4."""
    assert frame is not None
    reshapes = frame.f_locals.get("self") is torch.ops.aten.reshape.default
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == _FOLDS:
            return True
        frame = frame.f_back if reshapes else None
    return False


def _is_for_one(question: sympy.Basic) -> bool:
    """Return whether two numbers are equal if a size is 1, such as 8 * seq and 8, the strides of a
    row."""
    left, right = question.args
    whole, symbols = sympy.sympify(left - right), question.free_symbols
    return sympy.S.One in question.args or any(_is_zero_for_one(whole, s) for s in symbols)


def _is_zero_for_one(whole: sympy.Expr, symbol: sympy.Symbol) -> bool:
    try:
        return bool(sympy.expand(whole.xreplace({symbol: sympy.S.One})) == 0)
    except ZeroDivisionError:  # a size that the model does not accept: seq // (seq // 8)
        return False


def _find_asker() -> FrameType:
    """Return the calling frame outside PyTorch's symbolic numbers."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__")
        if name not in _PASS_ON and not (name == "torch" and frame.f_code.co_name == "__bool__"):
            break
        frame = frame.f_back
    return frame


def _answer_nothing(*question: Any) -> None:
    """Answer no question: stands for `ValueQuestions.answer` after the model's code has run."""


@contextmanager
def sizes_from_one(answer: Answer) -> Iterator[None]:
    """Context manager: keep sizes of 1 symbolic in this thread's exports.

    answer: see `ValueQuestions.answer`.
    """
    made: list[SizesFromOne] = []

    def make(*args: Any, **kwargs: Any) -> SizesFromOne:
        made.append(SizesFromOne(answer, *args, **kwargs))
        return made[-1]

    try:
        with replaced_in_thread(non_strict_utils, "ShapeEnv", make):
            yield
    finally:
        for shape_env in made:
            # A fake tensor refers to the environment from C++, by its sizes: together they would be
            # a cycle that Python's collector does not see.
            shape_env.tracked_fakes = None
            # What answers holds the values that were asked for, fake tensors too.
            shape_env.answer = _answer_nothing
