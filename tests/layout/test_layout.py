"""The shape of the tree: which module may import which, file sizes, names, what is tracked.

In: the source files and what git tracks. Out: one failure per file and line, for example::

    turbotx/ir/kernel.py:12 imports turbotx.kernels.schedule, which comes later in the flow
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.layout.imports import (
    Edge,
    edges_of,
    find_circles,
    find_edges,
    imported_names,
    module_names,
)
from tests.selection import DURATIONS, read_durations

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "turbotx"

# The flow, earliest first, the folders of the package but for the two files at its top: a module
# imports what stands before its own folder, or in it, and nothing that leads back to itself.
FLOW = (
    "errors",
    "options",
    "ir",
    "ops",
    "capture",
    "passes",
    "memory",
    "kernels",
    "program",
    "runtime",
    "engine",
    "report",
    "saved",
    "serving",
    "cli",
)
AT_THE_TOP = {"__init__.py", "__main__.py", "errors.py", "options.py", "py.typed"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}

NAMES = module_names(PACKAGE)


def sources(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "golden" not in path.parts
    )


def show(path: Path, line: int | None = None) -> str:
    place = path.relative_to(ROOT).as_posix()
    return place if line is None else f"{place}:{line}"


def room_of(module: str) -> str:
    """The first name below the package: `kernels` for turbotx.kernels.cpp.printer."""
    return (module.split(".") + [""])[1]


def forward(edges: Iterable[Edge]) -> list[str]:
    """The edges that point forward along the flow, or to the package as a whole."""
    found = []
    for edge in edges:
        own, other = room_of(edge.module), room_of(edge.needs)
        if own not in FLOW:  # the package itself and `python -m turbotx` reach everything
            continue
        where = f"{edge.module}:{edge.line} imports {edge.needs}"
        if other not in FLOW:
            found.append(f"{where}: import the module that defines it")
        elif FLOW.index(other) > FLOW.index(own):
            found.append(f"{where}, which comes later in the flow")
    return found


def test_nothing_else_lies_at_the_top() -> None:
    listed = {path.name for path in PACKAGE.iterdir() if path.is_file() or [*path.rglob("*.py")]}
    assert listed == AT_THE_TOP | {name for name in FLOW if (PACKAGE / name).is_dir()}
    assert len(listed) <= 18


def test_imports_point_backwards() -> None:
    assert forward(find_edges(PACKAGE)) == []


def test_nothing_imports_itself_by_others() -> None:
    edges = [e for e in find_edges(PACKAGE) if e.module != "turbotx"]
    assert find_circles(edges) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("turbotx.ir.kernel", "from turbotx.kernels.lowering.lower import lower"),
        ("turbotx.ir.kernel", "from turbotx import cli"),
        ("turbotx.passes.linear", "from ..engine.pipeline import compile"),
        ("turbotx.passes.linear", "def f():\n    import turbotx.kernels.schedule"),
        ("turbotx.engine.engine", "import_module('turbotx.report.debug').watch()"),
        ("turbotx.engine.engine", "if TYPE_CHECKING:\n    from turbotx.report import Report"),
        ("turbotx.serving.server", "from turbotx.cli import main"),
        ("turbotx.memory.pool", "from turbotx import optimize_everything"),
        ("turbotx.memory.pool", "import turbotx"),
    ],
)
def test_forward_import_is_found(module: str, line: str) -> None:
    assert len(forward(edges_of(line, module, NAMES))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("turbotx.kernels.schedule", "from turbotx.ir import Kernel"),
        ("turbotx.kernels.schedule", "from ..ir import Kernel"),
        ("turbotx.kernels.tuned", "from . import schedule"),
        ("turbotx.kernels.tuned", "from .schedule import Schedule\nimport torch.fx"),
        ("turbotx.serving.server", "from turbotx.engine.optimize import optimize"),
        ("turbotx.report.report", "from turbotx import __version__"),
        ("turbotx", "from turbotx.engine.optimize import optimize"),
    ],
)
def test_backward_import_is_accepted(module: str, line: str) -> None:
    assert forward(edges_of(line, module, NAMES)) == []


@pytest.mark.parametrize("length", [2, 3, 40])
def test_circle_is_found(length: int) -> None:
    ring = [Edge(f"m{k}", f"m{(k + 1) % length}", 1) for k in range(length)]
    beside = [Edge("before", "m0", 1), Edge("m1", "after", 1), Edge("before", "after", 1)]
    assert find_circles([*beside, *ring]) == [sorted(f"m{k}" for k in range(length))]
    assert find_circles([*beside, *ring[1:]]) == []
    assert find_circles([*beside, *ring[:-1]]) == []


def fx_uses(source: str) -> list[int]:
    """Lines that import torch.fx or reach it as an attribute."""
    tree = ast.parse(source)
    lines = [
        line
        for line, name in imported_names(tree, "turbotx.memory")
        if name == "torch.fx" or name.startswith("torch.fx.")
    ]
    lines += [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.fx"
    ]
    return lines


def test_memory_knows_no_fx() -> None:
    found = [
        show(path, line) for path in sources("turbotx/memory") for line in fx_uses(path.read_text())
    ]
    assert not found, f"memory/ plans lifetimes and byte counts, not graphs: {found}"


@pytest.mark.parametrize(
    "source",
    ["import torch.fx", "from torch import fx", "from torch.fx.node import Node", "torch.fx.Node"],
)
def test_fx_use_is_found(source: str) -> None:
    assert fx_uses(source) == [1]


def test_files_are_short() -> None:
    files = sources("turbotx", "tests", "examples", "benchmarks") + sorted(PACKAGE.rglob("*.h"))
    counts = {show(path): len(path.read_text().splitlines()) for path in files}
    long = {path: count for path, count in counts.items() if count > MAX_FILE_LINES}
    assert not long, f"more than {MAX_FILE_LINES} lines: {long}"


def test_functions_fit_a_screen() -> None:
    long = [
        f"{show(path, node.lineno)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in sources("turbotx", "tests", "examples", "benchmarks")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, long


def test_no_module_is_named_after_nothing() -> None:
    files = sources("turbotx", "tests", "examples", "benchmarks")
    vague = [
        show(path)
        for path in files
        if FORBIDDEN_STEMS & {part.lower() for part in path.relative_to(ROOT).with_suffix("").parts}
    ]
    assert not vague, f"say what is in them: {vague}"


def private_names(sources: Iterable[str]) -> set[str]:
    """Names with one underscore in front that sources define, or assign to an attribute."""
    found: set[str] = set()
    for node in (n for source in sources for n in ast.walk(ast.parse(source))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in found if re.fullmatch(r"_[^_]\w*(?<!_)", name)}


def private_reaches(source: str, private: set[str]) -> list[str]:
    """Private names that a source reads of other objects than `self`, or imports from turbotx."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in private:
            whose = ast.unparse(node.value)
            if whose not in ("self", "cls", "super()") and not whose.startswith("torch"):
                found.append(f"{whose}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("turbotx"):
            found += [f"{node.module}.{a.name}" for a in node.names if a.name.startswith("_")]
    return found


def test_tests_ask_what_is_public() -> None:
    private = private_names(path.read_text() for path in sources("turbotx"))
    found = {show(p): private_reaches(p.read_text(), private) for p in sources("tests")}
    assert {path: reaches for path, reaches in found.items() if reaches} == {}


def test_a_private_reach_is_found() -> None:
    private = private_names(["class A:\n  def _f(self): self._g = 1\n_h = 2"])
    assert private == {"_f", "_g", "_h"}
    found = private_reaches("a._f()\nself._g\nb.c._g\nd._other\ntorch._h", private)
    assert sorted(found) == ["a._f", "b.c._g"]
    assert private_reaches("from turbotx.a import b, _c", private) == ["turbotx.a._c"]


def classes_defined_twice(sources: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Places by the name of a class, of names that (place, source) pairs define more than once."""
    places: dict[str, list[str]] = {}
    for place, source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{place}:{node.lineno}")
    return {name: found for name, found in places.items() if len(found) > 1}


def test_a_class_name_means_one_thing() -> None:
    assert classes_defined_twice((show(p), p.read_text()) for p in sources("turbotx")) == {}


def test_a_class_defined_twice_is_found() -> None:
    sources = ("a.py", "class A: ..."), ("b.py", "class B:\n  class A: ...")
    assert classes_defined_twice(sources) == {"A": ["a.py:1", "b.py:2"]}


def declared_modules() -> set[str]:
    """Import names of the dependencies and extras that pyproject.toml declares."""
    text = (ROOT / "pyproject.toml").read_text()
    project = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    names = re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w+\])?\s*[>=<~]', project)
    model = (ROOT / "requirements-model.txt").read_text()
    names += re.findall(r"^([A-Za-z][\w-]*)==", model, re.MULTILINE)
    return {re.sub("^opentelemetry_.*", "opentelemetry", n.replace("-", "_")) for n in names}


def test_every_import_is_declared() -> None:
    allowed = declared_modules() | set(sys.stdlib_module_names) | {"turbotx"}
    undeclared = [
        f"{show(path, line)} imports {name}"
        for path in sources("turbotx")
        for line, name in imported_names(ast.parse(path.read_text()), "turbotx")
        if name.split(".")[0] not in allowed
    ]
    assert not undeclared, f"not a dependency in pyproject.toml: {undeclared}"


# Assembled, so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.$}~-])/(?:work|root|home/\w+|Users/\w+|opt/wheels)/")
REGISTRY_HOSTS = re.compile(
    "|".join(
        host.replace(" ", r"\.")
        for host in (
            "pypi org",
            "pythonhosted org",
            "download pytorch org",
            "npmjs org",
            "deb debian org",
            "conda anaconda org",
        )
    )
)


def machine_traces(text: str) -> list[str]:
    """Absolute paths of somebody's machine and package hosts that `text` names."""
    return MACHINE_PATHS.findall(text) + REGISTRY_HOSTS.findall(text)


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_tracked_files_name_no_machine() -> None:
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            found += [f"{show(path, number)}: {trace}" for trace in machine_traces(line)]
    assert not found, found


@pytest.mark.parametrize(
    "text",
    [
        "see /" + "work/project/file.py",
        'open("/' + 'root/.cache")',
        "/" + "home/ada/model.py:3",
        "--index-url https://" + "pypi" + ".org/simple",
    ],
)
def test_machine_trace_is_found(text: str) -> None:
    assert len(machine_traces(text)) == 1


@pytest.mark.parametrize("text", ["docs/home/page", "network/work/", "example.org", "~/work/x"])
def test_ordinary_text_names_no_machine(text: str) -> None:
    assert machine_traces(text) == []


def test_measured_tests_are_tests() -> None:
    for line in read_durations(DURATIONS.read_text()):
        file, _, name = line.rpartition("::")
        assert f"def {name}(" in (ROOT / file.partition("::")[0]).read_text(), line
