"""`turbotx doctor`: what this machine can run, what is missing, and how to get it.

In: nothing. Out: one line per check; exit code 1 if something is broken::

    compiler      g++ (Debian 12.2.0) 12.2.0
"""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from turbotx.cli.output import OK, WRONG, Output
from turbotx.report.machine import CHECKS, check_extras


def doctor(output: Output) -> int:
    """Run all checks and print them; return 0, or 1 if something is broken."""
    with output.steps("look around", total=len(CHECKS)) as steps:
        checks = []
        for name, make in CHECKS.items():
            steps(name)
            checks.append(make())
    checks += check_extras()
    table = Table(show_header=False, box=None)
    colours = {"ok": "green", "missing": "yellow", "broken": "red bold"}
    for check in checks:
        state = f"[{colours[check.state]}]{check.state}[/{colours[check.state]}]"
        text = check.found + (f"\n{check.remedy}" if check.remedy else "")
        table.add_row(check.name, state, text.replace("[", "\\["))
    output.console.print(table)
    broken = any(c.state == "broken" for c in checks)
    output.result({"ok": not broken, "checks": [asdict(c) for c in checks]})
    return WRONG if broken else OK
