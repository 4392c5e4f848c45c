"""The shape of the tree: which module may import which, file sizes, names, what is tracked.

In: the source files and what git tracks. Out: one failure per file and line, for example::

    turbotx/ir.py:12 imports turbotx.kernels, which comes later in the flow
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "turbotx"

# The flow, earliest first. A module may import what stands in an earlier row, or in its own:
# rows of several names are single files that belong together, a folder has a row to itself.
LAYERS = (
    (
        "ambient",
        "collection",
        "composition",
        "errors",
        "memory_order",
        "observers",
        "options",
        "parts",
        "progress",
    ),
    ("arguments",),
    ("call_key", "refusals"),
    ("traced_float",),
    ("weight_files",),
    ("size_functions", "sizes"),
    ("graph", "subgraphs"),
    ("views",),
    ("layout",),
    ("primitives", "ir"),
    ("element", "show"),
    ("loops",),
    ("ops", "attention"),
    ("pull",),
    ("verify",),
    ("watched", "leaks", "shadow", "reach", "effects", "sandbox", "tracing"),
    ("casts", "conditions", "failures"),
    (
        "decompose",
        "eager",
        "unlift",
        "size_tensors",
        "size_questions",
        "guards",
        "input_names",
        "widen",
        "returned",
        "tensor_indices",
        "quiet",
        "trace_errors",
        "host_random",
    ),
    ("module_state",),
    ("layout_questions",),
    ("flat_call",),
    ("capture",),
    ("passes",),
    ("kernels",),
    ("memory",),
    ("assembly", "copies", "assemble", "alternatives", "folding"),
    ("runtime",),
    ("program", "graphed"),
    ("pipeline",),
    ("signature", "state_guard", "fused_graph", "placement", "tune"),
    ("capture_sizes", "variant"),
    ("engine",),
    ("callables", "drop_in", "optimized", "subclassing"),
    ("saved",),
    ("dynamo",),
    ("report",),
    ("serving",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


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


def layer_of(path: Path, package: Path = PACKAGE) -> str:
    """The first name below the package: `kernels` for turbotx/kernels/cpp/build.py."""
    return path.relative_to(package).with_suffix("").parts[0]


def imported_modules(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of each import, also those inside functions.

    `module` is the dotted name of the package that holds the file: relative imports start there.
    `from a import b` yields `a.b`, since b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def forward_imports(source: str, path: Path, package: Path = PACKAGE) -> list[str]:
    """The imports in `source`, the text of file `path`, that point forward along the flow."""
    found = []
    own = layer_of(path, package)
    holder = ".".join(["turbotx", *path.relative_to(package).parts[:-1]])
    for line, name in imported_modules(ast.parse(source), holder):
        if name.split(".")[0] != "turbotx":
            continue
        target = (name.split(".") + [""])[1]
        if target == "__version__" or target == own:
            continue
        if target not in RANK:
            found.append(f"{path.name}:{line} imports {name}: import the module that defines it")
        elif RANK[target] > RANK[own]:
            found.append(f"{path.name}:{line} imports {name}, which comes later in the flow")
    return found


def package_files() -> list[Path]:
    return [path for path in sources("turbotx") if path != PACKAGE / "__init__.py"]


def test_every_module_has_a_layer() -> None:
    unknown = sorted({show(path) for path in package_files() if layer_of(path) not in RANK})
    assert not unknown, f"add to LAYERS, where they stand in the flow: {unknown}"


@pytest.mark.parametrize("path", package_files(), ids=show)
def test_imports_point_backwards(path: Path) -> None:
    if layer_of(path) not in RANK:
        pytest.fail(f"{show(path)} is in no layer: add it to LAYERS")
    assert forward_imports(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ir.py", "from turbotx.kernels.lower import lower"),
        ("ir.py", "from turbotx import cli"),
        ("passes/linear.py", "from ..pipeline import compile"),
        ("passes/linear.py", "def f():\n    import turbotx.memory.planner"),
        ("serving/server.py", "from turbotx.cli import main"),
        ("memory/planner.py", "from turbotx import optimize_everything"),
        ("memory/planner.py", "import turbotx"),
    ],
)
def test_forward_import_is_found(file: str, line: str) -> None:
    assert len(forward_imports(line, PACKAGE / file)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/lower.py", "from turbotx.ir import Region"),
        ("kernels/lower.py", "from ..ir import Region"),
        ("kernels/lower.py", "from . import schedule"),
        ("kernels/lower.py", "from .schedule import Schedule\nimport torch.fx"),
        ("serving/server.py", "from turbotx.optimized import optimize"),
        ("report.py", "from turbotx import __version__"),
    ],
)
def test_backward_import_is_accepted(file: str, line: str) -> None:
    assert forward_imports(line, PACKAGE / file) == []


def fx_uses(source: str) -> list[int]:
    """Lines that import torch.fx or reach it as an attribute."""
    tree = ast.parse(source)
    lines = [
        line
        for line, name in imported_modules(tree, "turbotx.memory")
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
        show(path, line)
        for path in package_files()
        if layer_of(path) == "memory"
        for line in fx_uses(path.read_text())
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
        for line, name in imported_modules(ast.parse(path.read_text()), "turbotx")
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


def test_slow_tests_are_tests() -> None:
    for line in (ROOT / "tests" / "slow.txt").read_text().split():
        file, _, name = line.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), f"tests/slow.txt names {line}"
