"""The command line: `turbotx compile|verify|profile|serve|doctor`.

In: arguments. Out: an exit code, results on standard output, progress and errors on standard
error::

    turbotx compile hf-config:bert --shape batch=4,seq=128 --out out
"""

import sys
from collections.abc import Sequence

from turbotx.cli.interrupts import INTERRUPTED, leaving_when_interrupted


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code, 130 if it is interrupted."""
    try:
        with leaving_when_interrupted():
            from turbotx.cli.commands import run_command

            run_command(argv)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
