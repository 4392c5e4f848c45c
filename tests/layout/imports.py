"""Imports: which module of the package needs which, whatever way it says so.

In: the package's folder. Out: an edge an import, also those inside functions, those that only type
checkers see, and those by a string::

    find_edges(Path("turbotx"))  ->  [Edge("turbotx.kernels.fusion.fuse", "turbotx.ir.views", 24)]
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BY_STRING = ("import_module", "__import__", "find_spec")


@dataclass(frozen=True)
class Edge:
    """`module` imports `needs` in this line of its file."""

    module: str
    needs: str
    line: int


def module_names(package: Path) -> dict[str, Path]:
    """Return every module's dotted name and file; a folder is called like its `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(tree: ast.AST, holder: str) -> Iterator[tuple[int, str]]:
    """Give the line and the absolute dotted name of each import in `tree`.

    holder: the package that the file lies in; relative imports start there. `from a import b`
    gives `a.b`, since b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = holder.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def names_by_string(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Give the line and the dotted name of each import whose module is a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in BY_STRING:
                yield node.lineno, str(node.args[0].value)


def edges_of(
    source: str, module: str, names: Mapping[str, object], is_package: bool = False
) -> list[Edge]:
    """Return the edges of one module's text to others of `names`.

    A name that is no module is its package's: `turbotx.errors.InputError` needs `turbotx.errors`.
    The version, which the package itself holds, is no edge.
    """
    holder = module if is_package else module.rpartition(".")[0]
    found = []
    tree = ast.parse(source)
    for line, name in (*imported_names(tree, holder), *names_by_string(tree)):
        if name == "turbotx.__version__":
            continue
        while name and name not in names:
            name = name.rpartition(".")[0]
        if name and name != module:
            found.append(Edge(module, name, line))
    return found


def find_edges(package: Path) -> list[Edge]:
    """Return every edge between modules of a package."""
    names = module_names(package)
    return [
        edge
        for module, path in names.items()
        for edge in edges_of(path.read_text(), module, names, path.name == "__init__.py")
    ]


def find_circles(edges: list[Edge]) -> list[list[str]]:
    """Return the sets of modules that import each other, in whatever number of steps.

    Tarjan's strongly connected components (SIAM J. Comput. 1, 1972), without recursion.
    """
    needs: dict[str, list[str]] = {}
    for edge in edges:
        needs.setdefault(edge.module, []).append(edge.needs)
        needs.setdefault(edge.needs, [])
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles = []
    for root in needs:
        path = [(root, iter(needs[root]))] if root not in index else []
        while path:
            module, rest = path[-1]
            if module not in index:
                index[module] = low[module] = len(index)
                stack.append(module)
            following = next(rest, None)
            if following is None:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[module])
                if low[module] == index[module]:
                    members = stack[stack.index(module) :]
                    del stack[stack.index(module) :]
                    if len(members) > 1:
                        circles.append(sorted(members))
            elif following not in index:
                path.append((following, iter(needs[following])))
            elif following in stack:
                low[module] = min(low[module], index[following])
    return circles
