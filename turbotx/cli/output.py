"""What a command prints: tables for people on a terminal, one JSON object for programs.

In: `--json` or not. Out: an `Output` with a console for results (standard output), one for progress
(standard error), and the exit codes::

    0 it worked   1 the results are wrong   2 the command line or MODEL is wrong   3 turbotx failed
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from turbotx.cli.models import ModelError
from turbotx.engine.progress import hide_progress
from turbotx.errors import InputError, OptionsError, TurbotxError, WeightsError
from turbotx.report.dump import DumpError

OK, WRONG, MISUSED, FAILED = 0, 1, 2, 3


def exit_code(error: TurbotxError) -> int:
    """Return 2 where the user can put it right on the command line, otherwise 3."""
    misused = (ModelError, InputError, OptionsError, DumpError, WeightsError)
    return MISUSED if isinstance(error, misused) else FAILED


@dataclass
class Steps:
    """A progress bar's handle: `steps("what comes next")` moves it on by one."""

    progress: Progress
    task: TaskID

    def __call__(self, description: str, advance: int = 1) -> None:
        self.progress.update(self.task, description=description, advance=advance)

    def expect(self, more: int) -> None:
        """Say that `more` steps are to come than was thought."""
        total = self.progress.tasks[0].total or 0
        self.progress.update(self.task, total=total + more)


class Output:
    """Where results and progress go."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(quiet=as_json)
        self.errors = Console(stderr=True)

    @contextmanager
    def steps(self, first: str, total: int) -> Iterator[Steps]:
        """Show progress on standard error while the block runs; nothing where it is no terminal."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
        with hide_progress(), Progress(
            *columns, TimeElapsedColumn(), console=self.errors, transient=True,
            disable=not self.errors.is_terminal,
        ) as progress:  # fmt: skip
            yield Steps(progress, progress.add_task(first, total=total))

    def result(self, value: dict[str, Any]) -> None:
        """Print the JSON object, where that was asked for."""
        if self.as_json:
            print(json.dumps(value, indent=1))

    def failure(self, error: TurbotxError) -> None:
        """Say what went wrong: on standard error, or as the JSON object."""
        if self.as_json:
            kind = type(error).__name__
            print(json.dumps({"error": str(error), "kind": kind, "exit_code": exit_code(error)}))
            return
        self.errors.print("error:", style="red bold", end=" ")
        # One line: the first few of a long message (a compiler's output); --json has all of it.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()][:3]
        self.errors.print(" | ".join(lines), markup=False, highlight=False, soft_wrap=True)
