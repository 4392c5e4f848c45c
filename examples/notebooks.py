"""Notebooks: executes the sources in this folder and writes each .ipynb beside its .py.

In: the numbered examples/*.py, in Jupytext's percent format, which are what one edits. Out: the
same with outputs, for reading without running; every one ends with assertions that must hold::

    python examples/notebooks.py               # all of them
    python examples/notebooks.py 03 05
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def find_sources(numbers: list[str]) -> list[Path]:
    """Return the sources whose names begin with one of `numbers`, all of them for none."""
    found = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
    return [path for path in found if not numbers or path.name[:2] in numbers]


def execute(path: Path) -> Any:
    """Return a source as a notebook that has run; raises nbclient's CellExecutionError."""
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    tidy(notebook)
    return notebook


def tidy(notebook: Any) -> None:
    """Leave out what differs from run to run and nobody reads: ids, times, warnings."""
    notebook.metadata.pop("language_info", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]


def write(path: Path) -> Path:
    """Execute one source and write the notebook beside it."""
    target = path.with_suffix(".ipynb")
    jupytext.write(execute(path), target)
    return target


if __name__ == "__main__":
    for source in find_sources(sys.argv[1:]):
        print(write(source).name, flush=True)
