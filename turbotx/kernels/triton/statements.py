"""Parse Triton source with its comments, and print statements in a uniform format.

In: the text of a template. Out: its syntax tree, in which comments and blank lines between
statements are statements (bare strings); and such statements as lines::

    print_statements(parse_with_comments(text).body, 0)  ->  ["# Row of x.", "row = ...", ...]
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from turbotx.kernels.triton.fold import all_statements
from turbotx.kernels.triton.text import WIDTH, wrap

_OWN_LINE = re.compile(r"\s*(?:# ?(?P<text>.*))?")
_TRAILING = re.compile(r"  # (?!fmt:|noqa)(?P<text>.+)")


def parse_with_comments(text: str) -> ast.Module:
    """Parse source; a trailing comment of a statement's first line is its `trailing` attribute."""
    tree, lines = ast.parse(text), text.splitlines()
    for s in list(all_statements(tree.body)):
        for field in ("body", "orelse"):
            if inside := getattr(s, field, None):
                setattr(s, field, [x for inner in inside for x in (*_above(inner, lines), inner)])
        if found := _TRAILING.search(lines[s.lineno - 1]):
            s.__dict__["trailing"] = found["text"]
    return tree


def _above(s: ast.stmt, lines: list[str]) -> list[ast.stmt]:
    """Return the comments and blank lines directly above a statement."""
    found: list[ast.stmt] = []
    for line in reversed(lines[: s.lineno - 1]):
        match = _OWN_LINE.fullmatch(line)
        if match is None:
            break
        found.insert(0, comment(match["text"] or "", s))
    return found


def comment(text: str, beside: ast.stmt) -> ast.stmt:
    """Return a comment as a statement; without text, a blank line."""
    return ast.copy_location(ast.Expr(ast.Constant(text)), beside)


def comment_of(s: ast.stmt) -> str | None:
    """Return the text of a comment or docstring statement, None for others."""
    said = s.value.value if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) else None
    return said if isinstance(said, str) else None


def print_statements(body: Iterable[ast.stmt], depth: int) -> list[str]:
    """Return the lines of statements, indented by `depth`, without consecutive blank lines."""
    lines: list[str] = []
    indent = "    " * depth
    for s in body:
        said = comment_of(s)
        if said is not None:
            if said or (lines and lines[-1]):
                lines.append(f"{indent}# {said}" if said else "")
            continue
        head, *rest = wrap(indent + _head(s))
        trailing = getattr(s, "trailing", None)
        if trailing and not rest and len(head) + len(trailing) + 4 <= WIDTH:
            head += f"  # {trailing}"
        elif trailing:
            lines.append(f"{indent}# {trailing}")
        lines += [head, *rest]
        if isinstance(s, (ast.For, ast.If)):
            lines += print_statements(s.body, depth + 1)
        if isinstance(s, ast.If) and s.orelse:
            lines += [f"{indent}else:", *print_statements(s.orelse, depth + 1)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _head(s: ast.stmt) -> str:
    """Return a statement as one line; of a loop or branch only its header."""
    if isinstance(s, ast.For):
        return f"for {_text(s.target)} in {_text(s.iter)}:"
    if isinstance(s, ast.If):
        return f"if {_text(s.test)}:"
    if isinstance(s, ast.Assign):
        return f"{_text(s.targets[0])} = {_text(s.value)}"
    return _text(s)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Tuple):
        return ", ".join(map(_text, node.elts))
    # Strings in templates contain no quotes.
    return re.sub(r"'([^']*)'", r'"\1"', ast.unparse(node))
