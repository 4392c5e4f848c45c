"""The command line: `turbotx compile|verify|profile|serve|doctor`.

In: arguments. Out: an exit code, results on standard output, progress and errors on standard
error::

    turbotx compile hf-config:bert --shape batch=4,seq=128 --out out
"""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code, 130 where it is interrupted.

    Until a command begins to work nothing is there to be cleaned up, and an interrupt ends the
    process at once: an exception in the middle of PyTorch's import may abort it.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, _leave)
        from turbotx.cli.commands import run_command

        run_command(argv)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, before)


def clean_up_when_interrupted() -> None:
    """Raise KeyboardInterrupt from now on where `main` would end the process."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os._exit(INTERRUPTED)
