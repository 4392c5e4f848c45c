"""What a command prints: tables for people on a terminal, one JSON object for programs.

In: `--json` or not. Out: an `Output` with a console for results (standard output), one for progress
(standard error), and the exit codes::

    0 it worked   1 the results are wrong   2 the command line or MODEL is wrong
    3 turbotx could not do it   4 an internal error
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

from turbotx.cli import clean_up_when_interrupted
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
"""How wide tables may be in a pipe or a file, where nothing says how wide they are read."""


def exit_code(error: BaseException) -> int:
    """Return 2 where the user can put it right on the command line, 3 for another error that
    turbotx raises on purpose or that the machine is the reason of, 4 for any other."""
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
"""After how long a command says line by line what it does, where nobody sees a progress bar."""


@dataclass
class Steps:
    """A progress bar's handle: `steps("what comes next")` moves it on by one.

    tell: prints a line, where standard error is no terminal; None where the bar is seen.
    """

    progress: Progress
    task: TaskID
    tell: Callable[[str], None] | None = None
    began_s: float = field(default_factory=time.monotonic)

    def __call__(self, description: str, advance: int = 1) -> None:
        """Show what runs next, and that `advance` steps are done."""
        self.progress.update(self.task, description=description, advance=advance)
        passed_s = time.monotonic() - self.began_s
        if self.tell is not None and passed_s > LATE_S:
            self.tell(f"after {passed_s:.0f} s: {description}")

    def expect(self, more: int) -> None:
        """Say that `more` steps are to come than was thought."""
        total = self.progress.tasks[0].total or 0
        self.progress.update(self.task, total=total + more)


class Output:
    """Where results and progress go."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(quiet=as_json)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PIPE_COLUMNS
        self.errors = Console(stderr=True)

    @contextmanager
    def steps(self, first: str, total: int) -> Iterator[Steps]:
        """Show progress on standard error while the block runs: a bar on a terminal, elsewhere a
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
        """Print the JSON object, where that was asked for."""
        if self.as_json:
            print(json.dumps(value, indent=1))

    def failure(self, error: BaseException) -> None:
        """Say what went wrong: on standard error, or as the JSON object."""
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
        # One line: the first few of a long message (a compiler's output); --json has all of it.
        lines = [line.strip() for line in message.splitlines() if line.strip()][:3]
        self.line(" | ".join(lines))
        if internal:
            self.line(f"at {_place(error)}; {', '.join(f'{k} {v}' for k, v in versions().items())}")
            if os.environ.get("TURBOTX_TRACEBACK") == "1":
                self.line("".join(traceback.format_exception(error)))
            else:
                self.line("this is a fault of turbotx: TURBOTX_TRACEBACK=1 prints all of it")

    def line(self, text: str) -> None:
        """Print a line on standard error as it is, however long."""
        self.errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _place(error: BaseException) -> str:
    """Return the last line of code of a traceback, as file:line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
