"""A newcomer: the wheel in an environment and a folder of its own, away from the checkout.

In: the checkout. Out: a `Newcomer` that runs commands as a user types them; dependencies are those
of the environment that runs the tests::

    newcomer.run("turbotx", "doctor", "--json")  ->  standard output, or a failed test
    newcomer.run_forked("turbotx", "doctor")     ->  the same, without the time of the imports
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from functools import cached_property
from pathlib import Path

import pytest

from tests.forks import ForkServer

ROOT = Path(__file__).parents[1]
MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))


def make():
    torch.manual_seed(0)
    return Block().eval(), {"x": torch.randn(2, 3, 16)}
"""


class Newcomer:
    """A folder and an environment of its own with the wheel in it."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        venv.create(folder / "venv", with_pip=False)
        python = str(self.bin / "python")
        install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
        # The dependencies, behind what is installed here: gigabytes that need no second copy.
        places = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        own = Path(places.stdout.strip())
        (own / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        (folder / "my_model.py").write_text(MODEL)

        kept = {k: v for k, v in os.environ.items() if k in ("HOME", "OMP_NUM_THREADS", "TMPDIR")}
        self.environment = {
            **kept, "PATH": f"{self.bin}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
            "TURBOTX_CACHE_DIR": str(self.folder / "cache"),
        }  # fmt: skip

    @cached_property
    def forks(self) -> ForkServer:
        return ForkServer(self.bin / "python", self.folder, self.environment)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def run_forked(self, *command: str) -> str:
        """Run as `run` does what tests/forks.py can, in a process that has its imports."""
        done = self.forks.run(*command)
        assert done.code == 0, f"{command}: {done.out}\n{done.err}"
        return done.out

    def close(self) -> None:
        if "forks" in self.__dict__:
            self.forks.close()


def build_wheel(folder: Path) -> Path:
    """Build the checkout's wheel with what is installed; skip where that does not include pip's
    own tools for it."""
    for name in ("build", "hatchling"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


def wait_until_ready(server: subprocess.Popen[str], url: str) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"not ready: exit code {server.poll()}")
