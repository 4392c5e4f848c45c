"""Output: what a command prints: tables on a terminal, or one JSON object for programs.

In: `--json` or not. Out: an `Output` with a console for results (standard output), one for progress
(standard error), and the exit codes::

    0 success   1 wrong results   2 wrong command line or MODEL
    3 turbotx could not do it   4 internal error
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from turbotx.cli.interrupts import clean_up_when_interrupted
from turbotx.errors import (
    DumpError,
    InputError,
    ModelError,
    OptionsError,
    SavedFileError,
    TurbotxError,
    WeightsError,
    versions,
)

OK, WRONG, MISUSED, FAILED, INTERNAL = 0, 1, 2, 3, 4
_MISUSED = (ModelError, InputError, OptionsError, DumpError, WeightsError, SavedFileError)
PIPE_COLUMNS = 160
"""Width of tables in a pipe or file, where the reader's width is unknown."""


def exit_code(error: BaseException) -> int:
    """Return 2 for an error that the user can fix on the command line, 3 for other errors that
    turbotx raises deliberately and those of the machine, 4 for all others."""
    if isinstance(error, _MISUSED):
        return MISUSED
    known = isinstance(error, TurbotxError) or of_the_machine(error) is not None
    return FAILED if known else INTERNAL


def of_the_machine(error: BaseException) -> str | None:
    """Return what the machine refused, as a line: a file, room on a disk, memory; None for an
    error of another kind."""
    if isinstance(error, OSError) and error.strerror is not None:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}"
    said = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in said:  # torch has no class for it
        asked = re.search(r"allocate (\d+) bytes", said)
        amount = f": {int(asked[1]) / 2**30:,.1f} GiB were asked for at once" if asked else ""
        return f"there is not enough memory{amount}; take a smaller --shape or model"
    return None


LATE_S = 10.0
"""Seconds after which a command prints its steps as lines if there is no progress bar."""


@dataclass
class Steps:
    """Handle of a progress bar: `steps("description of the next step")` advances it by one.

    tell: prints a line if standard error is not a terminal; None if the bar is visible.
    """

    progress: Progress
    task: TaskID
    tell: Callable[[str], None] | None = None
    began_s: float = field(default_factory=time.monotonic)

    def __call__(self, description: str, advance: int = 1) -> None:
        """Show the description of the next step, and count `advance` steps as done."""
        self.progress.update(self.task, description=description, advance=advance)
        passed_s = time.monotonic() - self.began_s
        if self.tell is not None and passed_s > LATE_S:
            self.tell(f"after {passed_s:.0f} s: {description}")

    def expect(self, more: int) -> None:
        """Increase the expected number of steps by `more`."""
        total = self.progress.tasks[0].total or 0
        self.progress.update(self.task, total=total + more)


class Output:
    """The destinations of results and progress."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(quiet=as_json)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PIPE_COLUMNS
        self.errors = Console(stderr=True)

    @contextmanager
    def steps(self, first: str, total: int) -> Iterator[Steps]:
        """Show progress on standard error while the block runs: a bar on a terminal, otherwise a
        line for each step that begins after LATE_S."""
        from turbotx.engine.progress import hide_progress

        clean_up_when_interrupted()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
        with hide_progress(), Progress(
            *columns, TimeElapsedColumn(), console=self.errors, transient=True,
            disable=not self.errors.is_terminal,
        ) as progress:  # fmt: skip
            tell = None if self.errors.is_terminal else self.line
            yield Steps(progress, progress.add_task(first, total=total), tell)

    def result(self, value: dict[str, Any]) -> None:
        """Print the JSON object if --json was given."""
        if self.as_json:
            print(json.dumps(value, indent=1))

    def failure(self, error: BaseException) -> None:
        """Report an error on standard error, or as the JSON object."""
        message, kind = str(error), type(error).__name__
        message = of_the_machine(error) or message
        internal = exit_code(error) == INTERNAL
        if internal:
            message = f"{kind}: {message}" if message else kind
        if self.as_json:
            found = {"error": message, "kind": kind, "exit_code": exit_code(error)}
            with suppress(OSError):  # else standard output takes nothing: the line below is left
                print(json.dumps({**found, **({"versions": versions()} if internal else {})}))
                return
        self.errors.print("internal error:" if internal else "error:", style="red bold", end=" ")
        # One line: the first few of a long message (such as compiler output); --json has all.
        lines = [line.strip() for line in message.splitlines() if line.strip()][:3]
        self.line(" | ".join(lines))
        if internal:
            self.line(f"at {_place(error)}; {', '.join(f'{k} {v}' for k, v in versions().items())}")
            if os.environ.get("TURBOTX_TRACEBACK") == "1":
                self.line("".join(traceback.format_exception(error)))
            else:
                self.line("this is a fault of turbotx: TURBOTX_TRACEBACK=1 prints all of it")

    def line(self, text: str) -> None:
        """Print a line on standard error without wrapping."""
        self.errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _place(error: BaseException) -> str:
    """Return the innermost frame of a traceback, as file:line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
