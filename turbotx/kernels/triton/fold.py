"""Fold constants in a template's statements: flags, and the branches and masks they decide.

In: statements, and the values of some names. Out: fewer, equivalent statements::

    fold(parse("if GATED: x = a if N > 8 else b"), {"GATED": True, "N": 4})  ->  x = b

It folds what Triton evaluates at compile time (constants, `if`, conditional expressions,
comparisons), and masks that are True, keywords that are None, `x + 0`, `x * 1`.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
# Applied to positions, sizes and masks, never to floats.
NEUTRAL: dict[type, Any] = {ast.Add: 0, ast.Mult: 1, ast.BitAnd: True}


def fold(body: Iterable[ast.stmt], values: Mapping[str, ast.expr]) -> list[ast.stmt]:
    """Return the statements with names replaced by values, without the assignments of those
    names."""
    return _Fold(values).statements(body)


def settle(body: list[ast.stmt], parameters: Iterable[str]) -> list[ast.stmt]:
    """Return the statements without names that are constants, or aliases of another name."""
    values: dict[str, ast.expr] = {}
    while True:
        body = fold(body, values)
        count = Counter([*parameters, *assigned_names(body)])
        given: dict[str, list[ast.expr]] = {}
        for s in all_statements(body):
            if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name):
                given.setdefault(s.targets[0].id, []).append(s.value)
        values = {}
        for name, (first, *more) in given.items():
            same = isinstance(first, ast.Constant) and all(_is(v, first.value) for v in more)
            other = isinstance(first, ast.Name) and count[first.id] <= 1 and first.id not in values
            if count[name] == 1 + len(more) and (same or (other and not more)):
                values[name] = first
        if not values:
            return body


def all_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements and their nested statements."""
    for s in body:
        yield s
        if isinstance(s, (ast.For, ast.If, ast.FunctionDef)):
            yield from all_statements(s.body)
        if isinstance(s, ast.If):
            yield from all_statements(s.orelse)


def assigned_names(body: Iterable[ast.stmt]) -> list[str]:
    """Return the assigned names, one per assignment."""
    found: list[str] = []
    for s in all_statements(body):
        targets = s.targets if isinstance(s, ast.Assign) else [getattr(s, "target", None)]
        names = (getattr(t, "elts", [t]) for t in targets)
        found += [n.id for group in names for n in group if isinstance(n, ast.Name)]
    return found


def _is(node: ast.AST | None, value: Any) -> bool:
    """Return whether a node is this constant, of the same type: 1 is neither 1.0 nor True."""
    return (
        isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value
    )


class _Fold(ast.NodeTransformer):
    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self.values = values

    def statements(self, body: Iterable[ast.stmt]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        for s in body:
            folded = self.visit(s)
            made += folded if isinstance(folded, list) else [folded]
        return made

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node) if isinstance(node.ctx, ast.Load) else node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        target = getattr(node.targets[0], "id", None)
        if target in self.values:
            return []
        node.value = self.visit(node.value)
        return [] if target and target == getattr(node.value, "id", None) else node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        node.test = self.visit(node.test)
        if isinstance(node.test, ast.Constant):
            return self.statements(node.body if node.test.value else node.orelse)
        node.body, node.orelse = self.statements(node.body), self.statements(node.orelse)
        return node if node.body else []

    def visit_For(self, node: ast.For) -> ast.stmt:
        node.iter, node.body = self.visit(node.iter), self.statements(node.body)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        test = self.visit(node.test)
        if isinstance(test, ast.Constant):
            chosen: ast.expr = self.visit(node.body if test.value else node.orelse)
            return chosen
        return ast.IfExp(test, self.visit(node.body), self.visit(node.orelse))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        decides = isinstance(node.op, ast.Or)
        values = [self.visit(v) for v in node.values]
        open_ = [v for v in values if not isinstance(v, ast.Constant)]
        if any(bool(v.value) is decides for v in values if isinstance(v, ast.Constant)):
            return ast.Constant(decides)
        if not open_:
            return ast.Constant(not decides)
        return open_[0] if len(open_) == 1 else ast.BoolOp(node.op, open_)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant):
            return ast.Constant(not node.operand.value)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        left, (right, *more) = node.left, node.comparators
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant) and not more:
            return ast.Constant(OPERATORS[type(node.ops[0])](left.value, right.value))
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        left, right, kind = node.left, node.right, type(node.op)
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant):
            return ast.Constant(OPERATORS[kind](left.value, right.value))
        if kind in NEUTRAL and _is(right, NEUTRAL[kind]):
            return left
        if kind in NEUTRAL and _is(left, NEUTRAL[kind]):
            return right
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Drop keywords with default values, and masks that are True."""
        self.generic_visit(node)
        whole = any(k.arg == "mask" and _is(k.value, True) for k in node.keywords)
        node.keywords = [
            k
            for k in node.keywords
            if not _is(k.value, None) and not (whole and k.arg in ("mask", "other"))
        ]
        return node
