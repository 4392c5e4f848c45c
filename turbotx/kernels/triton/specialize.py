"""Specialize a Triton template: @triton.jit functions in, the source of one kernel out.

In: a file of `templates/`, one of its functions, and a value for each of the file's flags, the
module-level `NAME = tl.constexpr(None)`. Out: source in which flags are replaced by values,
branches are decided, and template functions are inlined, except those of functions.py::

    if HAS_BIAS:
        bias = load_column(bias_ptr, n)   ->   bias = tl.load(bias_ptr + n).to(tl.float32)

It is equivalent to Triton's own compilation of the template with these flags: a test compiles both.
Comments are kept; docstrings of inlined functions become comments.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from turbotx.kernels.triton.fold import assigned_names, fold, settle
from turbotx.kernels.triton.statements import (
    comment,
    comment_of,
    parse_with_comments,
    print_statements,
)

TEMPLATES = Path(__file__).with_name("templates")
# A flag's value. Text that starts with "tl." is a Triton name.
Flag = bool | int | float | str | None


def specialize(
    file: str, function: str, name: str, arguments: Sequence[str], flags: Mapping[str, Flag]
) -> str:
    """Return a template's function as `name` with these parameters; capitals are constexpr.

    Raises AssertionError if the flags are not the file's or a needed parameter is missing.
    """
    parameters, lines, names = _specialize(file, function, tuple(sorted(flags.items())))
    assert [p for p in parameters if p in arguments] == list(arguments), (parameters, arguments)
    missing = names & set(parameters) - set(arguments)
    assert not missing, f"{name} needs {missing}"
    given = [f"{a}: tl.constexpr" if a.isupper() else a for a in arguments]
    head = ["@triton.jit", f"def {name}(", *(f"    {a}," for a in given), "):"]
    return "\n".join([*head, *lines]) + "\n"


def specialize_body(file: str, function: str, flags: Mapping[str, Flag]) -> list[str]:
    """Return the indented lines of a template's function."""
    return list(_specialize(file, function, tuple(sorted(flags.items())))[1])


@functools.lru_cache(maxsize=1024)
def _specialize(
    file: str, function: str, flags: tuple[tuple[str, Flag], ...]
) -> tuple[tuple[str, ...], tuple[str, ...], frozenset[str]]:
    """Return a function's parameter names, lines, and the names used in them."""
    made = _Template(file, dict(flags)).written_out(function)
    parameters = tuple(a.arg for a in made.args.args)
    body = settle(made.body, parameters)
    names = {n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name)}
    return parameters, tuple(print_statements(body, 1)), frozenset(names)


class _Template:
    def __init__(self, file: str, flags: Mapping[str, Flag]) -> None:
        tree = _parse(file)
        self.functions = {
            s.name: s for t in _with_imports(tree) for s in t.body if isinstance(s, ast.FunctionDef)
        }
        self.done: set[str] = set()
        constants = {
            s.targets[0].id: ast.literal_eval(s.value.args[0])
            for s in tree.body
            if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)
            and isinstance(s.value, ast.Call)
        }  # fmt: skip
        wanted = {name for name, value in constants.items() if value is None}
        assert wanted == set(flags), f"flags: {wanted ^ set(flags)}"
        self.values = {name: _expression(v) for name, v in (constants | dict(flags)).items()}

    def written_out(self, name: str) -> ast.FunctionDef:
        """Return a function specialized for the flags, with its calls inlined."""
        made = self.functions[name]
        if name not in self.done:
            self.done.add(name)
            made.body = fold(made.body, self.values)
            taken = {a.arg for a in made.args.args} | set(assigned_names(made.body))
            made.body = self._write_out(made.body, taken)
        return made

    def _write_out(self, body: list[ast.stmt], taken: set[str]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        for s in body:
            if isinstance(s, (ast.For, ast.If)):
                s.body = self._write_out(s.body, taken)
            if isinstance(s, ast.If):
                s.orelse = self._write_out(s.orelse, taken)
            called = s.value if isinstance(s, (ast.Assign, ast.Expr)) else None
            function = called.func if isinstance(called, ast.Call) else None
            if isinstance(function, ast.Name) and function.id in self.functions:
                assert isinstance(called, ast.Call)
                made += self._expand(s, called, taken)
            else:
                made.append(s)
        return made

    def _expand(self, s: ast.stmt, call: ast.Call, taken: set[str]) -> list[ast.stmt]:
        """Return the inlined statements of a call; `taken`: the caller's names, extended by new
        ones.

        Results are named as the caller's targets. Local names that the caller also has are prefixed
        with the first word of the first target.
        """
        assert isinstance(call.func, ast.Name) and not call.keywords
        called = self.written_out(call.func.id)
        given = dict(zip((a.arg for a in called.args.args), call.args, strict=True))
        *body, last = called.body
        results: list[ast.expr] = []
        if isinstance(last, ast.Return) and last.value is not None:
            results = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        else:
            body.append(last)
        target = s.targets[0] if isinstance(s, ast.Assign) else ast.Tuple([])
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        pairs = list(zip(map(ast.unparse, targets), results, strict=True))
        own = set(assigned_names(body))
        constants = {p: a for p, a in given.items() if isinstance(a, ast.Constant) and p not in own}
        if constants:  # branches not taken define no names
            body = fold([_copy(x, {}, {}) for x in body], constants)
            own = set(assigned_names(body))
        values = {p: a for p, a in given.items() if p not in own}
        # Targets that arguments read are assigned last.
        read = {n.id for a in values.values() for n in ast.walk(a) if isinstance(n, ast.Name)}
        names = {r.id: t for t, r in pairs
                 if isinstance(r, ast.Name) and r.id in own and t not in read}  # fmt: skip
        stem = pairs[0][0].partition("_")[0] + "_" if pairs else ""
        for name in sorted(own - set(names)):
            names[name] = stem + name if name in taken else name
            assert names[name] not in taken, f"{names[name]} is taken: {ast.unparse(s)}"
            taken.add(names[name])
        made = [_assign(names[p], a, s) for p, a in given.items() if p in own]
        if body and comment_of(body[0]) is not None:
            made.append(comment("", s))
        made += [_copy(x, names, values) for x in body]
        ends = [(t, _copy(r, names, values)) for t, r in pairs]
        return made + [_assign(t, r, s) for t, r in ends if ast.unparse(r) != t]


def _with_imports(tree: ast.Module) -> Iterator[ast.Module]:
    """Yield a template and the templates whose functions it inlines."""
    yield tree
    for s in tree.body:
        file = s.module.rpartition(".")[2] if isinstance(s, ast.ImportFrom) and s.module else ""
        if file not in ("", "functions"):
            yield from _with_imports(_parse(file))


def _parse(file: str) -> ast.Module:
    return parse_with_comments((TEMPLATES / f"{file}.py").read_text())


def _copy(node: Any, names: Mapping[str, str], values: Mapping[str, ast.expr]) -> Any:
    """Return a copy with names replaced by other names or by expressions."""
    if isinstance(node, ast.Name):
        if node.id in names:
            return ast.Name(names[node.id], node.ctx)
        return values.get(node.id, node)
    if isinstance(node, ast.Constant) or not node._fields:
        return node
    fields = {}
    for field in node._fields:
        value = getattr(node, field, None)
        if isinstance(value, list):
            value = [_copy(x, names, values) for x in value]
        fields[field] = _copy(value, names, values) if isinstance(value, ast.AST) else value
    made = type(node)(**fields)
    vars(made).update(vars(node) | fields)  # keeps position and trailing comment
    return made


def _assign(target: str, value: ast.expr, where: ast.stmt) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(target, ast.Store())], value), where)


def _expression(value: Flag) -> ast.expr:
    if isinstance(value, str) and value.startswith("tl."):
        return ast.parse(value, mode="eval").body
    return ast.Constant(value)
