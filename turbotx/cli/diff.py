"""`turbotx diff`: compares two report.json.

In: the files, as written by `turbotx compile --out` and `turbotx.explain(...).dump`. Out: a table
of differences; exit code 0 if only times differ, 1 otherwise, as for `diff`::

    turbotx diff before/report.json after/report.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from turbotx.cli.output import OK, WRONG, Output
from turbotx.errors import InputError
from turbotx.report.compare import Comparison, compare
from turbotx.report.table import right, titled_table


def diff_reports(before: Path, after: Path, output: Output) -> int:
    """Print how the second report differs; raise InputError for a file that is not a
    report.json."""
    found = compare(_read(before), _read(after))
    for line in found.other:
        output.console.print(f"not the same: {line}", highlight=False)
    output.console.print(_table(found))
    for title, names in (("gone", found.gone), ("new", found.new), ("changed", found.changed)):
        if names:
            output.console.print(f"kernels {title}: {escape(', '.join(names))}", highlight=False)
    output.console.print("no difference" if found.equal else "they differ")
    output.result({"equal": found.equal, **asdict(found)})
    return OK if found.equal else WRONG


def _read(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise InputError(f"{path} is not a report.json")
    return read


def _table(found: Comparison) -> Table:
    numbers = right("A", "B", "B / A", no_wrap=True)
    table = titled_table("Reports", Column("", overflow="fold"), *numbers)
    for figure in found.figures:
        ratio = "" if figure.ratio is None else f"{figure.ratio:.3f}"
        style = "" if figure.before == figure.after else "bold"
        table.add_row(
            escape(figure.name), _shown(figure.before), _shown(figure.after), ratio, style=style
        )
    return table


def _shown(number: float | None) -> str:
    return (
        "-" if number is None else f"{number:,.0f}" if number == int(number) else f"{number:,.1f}"
    )
