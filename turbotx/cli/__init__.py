"""The command line: `turbotx compile|verify|profile|serve|doctor`.

In: arguments. Out: an exit code, results on standard output, progress and errors on standard
error::

    turbotx compile hf-config:bert --shape batch=4,seq=128 --out out
"""

from turbotx.cli.main import main

__all__ = ["main"]
