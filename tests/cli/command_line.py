"""`turbotx ...` as a user types it, in this process: what the fixture `run` gives.

In: arguments. Out: the exit code, standard output and standard error, for example::

    run("compile", "nothing")  ->  2, "", "error: 'nothing' is not a MODEL: write ..."
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def make_run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Return the function that runs one command."""
    from turbotx.cli import main

    def run(*arguments: object) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return run
