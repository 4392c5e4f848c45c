"""What docs/memory.md says of the package holds: its imports, and its first example."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "turbotx" / "memory").rglob("*.py"))
WITH_TORCH = {"pool.py", "arena.py", "cache_blocks.py"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_the_pool_knows_torch_and_nothing_knows_fx(path):
    names = list(imported(path))
    assert ("torch" in names) == (path.name in WITH_TORCH)
    assert not any(name.startswith("torch.") for name in names)
    own = [name for name in names if name.startswith("turbotx")]
    assert all(name.startswith("turbotx.memory") or name == "turbotx.errors" for name in own)


def test_the_checker_shares_no_code_with_any_planner():
    names = list(imported(ROOT / "turbotx" / "memory" / "planner" / "check.py"))
    assert names == ["__future__", "turbotx.memory.planner.plan"]


def test_the_first_example_of_the_document_runs():
    text = (ROOT / "docs" / "memory.md").read_text()
    example = text.split("```python\n")[1].split("```")[0]
    names = {}
    exec(example, names)
    assert names["planner"].offsets([6144, 24576]) == ([24576, 0, 24576], 30720)
