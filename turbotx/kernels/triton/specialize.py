"""Specialize a Triton template: real @triton.jit functions in, the source of one kernel out.

In: a file of `templates/`, one of its functions, and a value for each of the file's flags, which
are its module-level `NAME = tl.constexpr(None)`. Out: source in which flags are values, branches
are decided, and the file's other functions are written out where they are called::

    if HAS_BIAS:
        bias = load_column(bias_ptr, n)   ->   bias = tl.load(bias_ptr + n).to(tl.float32)

It says what Triton itself makes of the template with these flags: a test compiles both. Comments
stay where they are; the docstring of a function that is written out is a comment too.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from turbotx.kernels.triton.fold import assigned_names, fold, settle
from turbotx.kernels.triton.statements import (
    comment,
    comment_of,
    parse_with_comments,
    print_statements,
)

TEMPLATES = Path(__file__).with_name("templates")
# A flag's value. Text that begins with "tl." is a name of Triton's.
Flag = bool | int | float | str | None


def specialize(
    file: str, function: str, name: str, arguments: Sequence[str], flags: Mapping[str, Flag]
) -> str:
    """Return a template's function as `name`, with these of its parameters, constexpr in capitals.

    Raises AssertionError where the flags are not the file's, or a parameter that is missing is
    needed.
    """
    parameters, lines = _specialize(file, function, tuple(sorted(flags.items())))
    assert [p for p in parameters if p in arguments] == list(arguments), (parameters, arguments)
    read = {n.id for n in ast.walk(ast.parse("\n".join(("if 1:", *lines))))
            if isinstance(n, ast.Name)}  # fmt: skip
    missing = read & set(parameters) - set(arguments)
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
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of a function's parameters, and its lines."""
    template = _Template((TEMPLATES / f"{file}.py").read_text(), dict(flags))
    made = template.written_out(function)
    parameters = tuple(a.arg for a in made.args.args)
    return parameters, tuple(print_statements(settle(made.body, parameters), 1))


class _Template:
    def __init__(self, text: str, flags: Mapping[str, Flag]) -> None:
        tree = parse_with_comments(text)
        self.functions = {s.name: s for s in tree.body if isinstance(s, ast.FunctionDef)}
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
        """Return a function for the flags, with those that it calls written out."""
        made = copy.deepcopy(self.functions[name])
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
            call = s.value if isinstance(s, (ast.Assign, ast.Expr)) else None
            if isinstance(call, ast.Call) and ast.unparse(call.func) in self.functions:
                made += self._expand(s, call, taken)
            else:
                made.append(s)
        return made

    def _expand(self, s: ast.stmt, call: ast.Call, taken: set[str]) -> list[ast.stmt]:
        """Return what a call does; `taken` are the caller's names, and grow by new ones.

        The caller's targets are the function's own names of its results. Another local name that
        the caller has as well gets the first word of the first target in front.
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
        own = list(dict.fromkeys(assigned_names(body)))
        renames: dict[str, str] = {}
        for t, r in zip(targets, results, strict=True):
            assert isinstance(t, ast.Name)
            if isinstance(r, ast.Name) and r.id in own:
                renames[r.id] = t.id
        stem = ast.unparse(targets[0]).partition("_")[0] + "_" if targets else ""
        for name in set(own) - set(renames):
            renames[name] = stem + name if name in taken else name
            assert renames[name] not in taken, f"{renames[name]} is taken: {ast.unparse(s)}"
        taken |= set(renames.values())
        for n in (n for x in (*body, *results) for n in ast.walk(x)):
            if isinstance(n, ast.Name) and n.id in renames:
                n.id = renames[n.id]
        begin = [(ast.Name(renames[p], ast.Store()), a) for p, a in given.items() if p in own]
        if comment_of(body[0]) is not None:
            body.insert(0, comment("", s))
        body += _assign(zip(targets, results, strict=True), s)
        body = fold(body, {p: a for p, a in given.items() if p not in own})
        return [*_assign(begin, s), *body]


def _assign(pairs: Iterable[tuple[ast.expr, ast.expr]], where: ast.stmt) -> list[ast.stmt]:
    """Return assignments, less those of a name to itself."""
    return [
        ast.copy_location(ast.Assign([target], value), where)
        for target, value in pairs
        if ast.unparse(target) != ast.unparse(value)
    ]


def _expression(value: Flag) -> ast.expr:
    if isinstance(value, str) and value.startswith("tl."):
        return ast.parse(value, mode="eval").body
    return ast.Constant(value)
