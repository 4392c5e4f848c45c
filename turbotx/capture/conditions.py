"""Conditions: whether one operand of a condition in Python code can change its outcome.

In: a frame that is about to branch on one operand of `a and b and c`. Out: whether another operand
settles the condition, whatever this one is, for example while `q.shape[2] > 1` is evaluated::

    is_causal = q.shape[2] > 1 and attention_mask is None        # with a mask: False anyway
"""

from __future__ import annotations

import ast
import functools
import linecache
from types import CodeType, FrameType
from typing import Any

import torch

_UNKNOWN = object()
_ABOUT_TRACING = {"is_compiling", "is_exporting", "is_dynamo_compiling", "is_torchdynamo_compiling"}
"""Functions of PyTorch and transformers that return whether a trace is active."""
_BEFORE = 4
"""The most instructions, with their caches, between the one that makes an operand and the
branch."""


def decides_nothing(frame: FrameType) -> bool:
    """Return whether the operand of `and` or `or` that the frame evaluates cannot change the
    outcome.

    Understands flags, comparisons of a size with itself, tests of a name against None, and queries
    for an active trace. Returns False for code without source, if an operand that it does not
    understand comes before the one that settles the condition, and always on Python 3.10, which
    keeps no columns.
    """
    settles, following, passed = _find_condition(frame.f_code, frame.f_lasti)
    if any(_value(x, frame) is settled for settled, inner in passed for x in inner):
        return True
    for operand in following:
        value = _value(operand, frame)
        if value is _UNKNOWN:
            return False
        if value is settles:
            return True
    return False


_Operands = tuple[bool, list[ast.expr]]


@functools.lru_cache(maxsize=256)
def _find_condition(code: CodeType, offset: int) -> tuple[bool, list[ast.expr], list[_Operands]]:
    """Find the condition around an instruction.

    Returns the value that settles it, the operands after the one being evaluated, and the same for
    each nested condition that this operand is the result of.
    """
    places, passed = getattr(code, "co_positions", None), list[_Operands]()
    if places is None:
        return False, [], passed
    # The branch has the position of the whole condition; just before it is the operand's.
    last = offset // 2
    near = set(list(places())[max(0, last - _BEFORE) : last + 1])
    conditions, place = _find_conditions(code.co_filename), None
    for node in conditions:  # inner ones come last
        for k, part in enumerate(node.values):
            if (part.lineno, part.end_lineno, part.col_offset, part.end_col_offset) in near:
                place = node, k
    while place is not None:
        node, k = place
        if following := node.values[k + 1 :]:
            return isinstance(node.op, ast.Or), following, passed
        # The last operand is the condition's result, which 3.12 tests once more by itself.
        passed.append((isinstance(node.op, ast.Or), node.values))
        outer = (o for o in conditions if node in o.values)
        place = next(((o, o.values.index(node)) for o in outer), None)
    return False, [], passed


@functools.lru_cache(maxsize=8)
def _find_conditions(filename: str) -> list[ast.BoolOp]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.BoolOp)]


def _value(operand: ast.expr, frame: FrameType) -> Any:
    """Return the bool that an operand evaluates to, without running the model's code; else
    _UNKNOWN."""
    if isinstance(operand, ast.Name):
        value = frame.f_locals.get(operand.id, _UNKNOWN)
        return value if isinstance(value, bool) else _UNKNOWN
    if isinstance(operand, ast.UnaryOp) and isinstance(operand.op, ast.Not):
        value = _value(operand.operand, frame)
        return _UNKNOWN if value is _UNKNOWN else not value
    if isinstance(operand, ast.Compare) and len(operand.ops) == 1:
        left, right = operand.left, operand.comparators[0]
        if isinstance(left, ast.Name) and isinstance(right, ast.Name):
            return _compare(operand.ops[0], *(frame.f_locals.get(n.id) for n in (left, right)))
        nothing = isinstance(right, ast.Constant) and right.value is None
        known = isinstance(left, ast.Name) and left.id in frame.f_locals
        if known and nothing and isinstance(operand.ops[0], (ast.Is, ast.IsNot)):
            return (frame.f_locals[ast.unparse(left)] is None) == isinstance(operand.ops[0], ast.Is)
    if isinstance(operand, ast.Call) and not operand.args and not operand.keywords:
        return _ask_about_tracing(operand.func, frame)
    return _UNKNOWN


_SAME = (ast.Eq, ast.LtE, ast.GtE)
_OTHER = (ast.NotEq, ast.Lt, ast.Gt)


def _compare(operator: ast.cmpop, left: Any, right: Any) -> Any:
    """Return the result of comparing a size with itself; _UNKNOWN for other operands."""
    sizes = isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt)
    if sizes and left.node.expr == right.node.expr and isinstance(operator, _SAME + _OTHER):
        return isinstance(operator, _SAME)
    return _UNKNOWN


def _ask_about_tracing(function: ast.expr, frame: FrameType) -> Any:
    first, *parts = ast.unparse(function).split(".")
    if (parts or [first])[-1] not in _ABOUT_TRACING:
        return _UNKNOWN
    found: Any = frame.f_globals.get(first, _UNKNOWN)
    for part in parts:
        found = getattr(found, part, _UNKNOWN)
    return bool(found()) if callable(found) else _UNKNOWN
