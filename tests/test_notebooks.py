"""The notebooks: every source runs to its end, and the .ipynb beside it is of that source.

In: the numbered examples/*.py. Out: one failure a notebook, with the cell that failed. One runs as
`make notebooks` does, in a kernel of its own, the others in IPython, where their imports are done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.forks import ForkServer
from tests.test_examples import EXAMPLES, load

SOURCES = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
RUN_HERE = [path for path in SOURCES if not path.name.startswith("07")]  # which tests/serving/ runs
AS_MADE = "06"  # the least to do
MAX_NBYTES = 400_000
RUN_CELLS = """
import sys
import jupytext
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for number, cell in enumerate(jupytext.read(sys.argv[1]).cells):
    if cell.cell_type == "code":
        if not shell.run_cell(cell.source).success:  # which has printed why
            sys.exit(f"cell {number} of {sys.argv[1]} failed")
"""


@pytest.fixture(scope="module")
def notebooks() -> Any:
    pytest.importorskip("jupytext")
    pytest.importorskip("nbclient")
    return load(EXAMPLES / "notebooks.py")


def cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def test_there_are_ten() -> None:
    assert [path.name[:2] for path in SOURCES] == [f"{k:02}" for k in range(1, 11)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_is_that_of_its_source(notebooks: Any, path: Path) -> None:
    saved = path.with_suffix(".ipynb")
    notebook = notebooks.jupytext.read(saved)
    assert cells(notebook) == cells(notebooks.jupytext.read(path)), "run: make notebooks"
    assert saved.stat().st_size < MAX_NBYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/" in kind for c in code for o in c.outputs for kind in o.get("data", {}))
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert any(line.startswith("assert ") for line in code[-1].source.splitlines())
    assert notebook.cells[0].cell_type == "markdown"


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "run_cells.py").write_text(RUN_CELLS)
    given = {
        **os.environ, "PYTHONPATH": str(EXAMPLES.parent), "IPYTHONDIR": str(folder),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }  # fmt: skip
    with closing(ForkServer(Path(sys.executable), folder, given)) as server:
        yield server


@pytest.mark.parametrize("path", RUN_HERE, ids=lambda path: path.stem)
def test_the_notebook_runs(
    notebooks: Any, path: Path, minilm_path: Path, forks: ForkServer
) -> None:
    pytest.importorskip("matplotlib")
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    if "make_jobs" in path.read_text():
        pytest.importorskip("triton")
    if path.name.startswith(AS_MADE):
        notebooks.execute(path)
    else:
        done = forks.run("python", "run_cells.py", str(path))
        assert done.code == 0, f"{done.out}\n{done.err}"
