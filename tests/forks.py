"""Processes that have their imports behind them: each is forked from one that waits.

In: a Python, a folder and an environment. Out: what a command does in a process of its own, which
PyTorch, transformers and turbotx need not be imported into again, seconds of CPU time each::

    ForkServer(python, folder, environment).run("turbotx", "doctor")  ->  0, "...", ""
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

cpu_seconds: list[float] = []
"""What each command has taken: os.times() of the tests has it only when its server has ended."""


class Done(NamedTuple):
    code: int
    out: str
    err: str


class ForkServer:
    """Runs `python FILE ...` and commands that a package installs, one after the other.

    A command sees what it would see in a new process: its arguments, sys.path, an empty standard
    input; it ends by its exit code, without handlers at exit. PyTorch has computed nothing before,
    so it has no threads yet.
    """

    def __init__(self, python: Path, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [python, "-c", SERVER], cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *command: str) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        assert answer, f"the server ended before {command} did"
        cpu_seconds.append(float(answer[1]))
        out, err = ((self.folder / name).read_text() for name in ("stdout.txt", "stderr.txt"))
        return Done(int(answer[0]), out, err)

    def close(self) -> None:
        self.process.communicate()


SERVER = """
import gc, importlib.metadata, json, multiprocessing, os, resource, runpy, sys
import torch, transformers, turbotx.engine.optimize

def run(program, *arguments):
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if program == "python":
        sys.argv, sys.path[0] = [*arguments], os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.argv, sys.path[0] = [program, *arguments], os.path.dirname(sys.executable)
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=program)
        entry.load()()

gc.freeze()  # children look through no object of these imports, and so copy no page of them
used = 0.0
for line in sys.stdin:
    child = multiprocessing.get_context("fork").Process(target=run, args=json.loads(line))
    child.start()
    child.join()
    before, used = used, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    print(child.exitcode, used - before, flush=True)
"""
