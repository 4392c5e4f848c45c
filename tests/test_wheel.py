"""The wheel, as a newcomer meets it: built, installed outside the checkout, every command once.

In: the checkout. Out: exit codes and files of `turbotx ...`, run from another folder where nothing
of the checkout can be imported; dependencies are those of the environment that runs the tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest

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
SAVE = """
import torch, turbotx, my_model
model, inputs = my_model.make()
fast = turbotx.optimize(model)
expected = fast(**inputs)
turbotx.save(fast, "block.ttx", weights={weights})
with torch.no_grad():
    compiled = torch.compile(model, backend="turbotx", dynamic=True)
    torch.testing.assert_close(compiled(**inputs), expected)
torch.save((inputs["x"], expected), "expected.pt")
torch.save(model.state_dict(), "weights.pt")
print(turbotx.__file__)
"""
LOAD = """
import torch, turbotx
x, expected = torch.load("expected.pt")
assert torch.equal(turbotx.load("block.ttx", weights="weights.pt")(x=x), expected)
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

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("build", "hatchling"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def newcomer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    return Newcomer(tmp_path_factory.mktemp("newcomer"), wheel)


def test_the_wheel_holds_the_package_and_no_machine_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt")))
    assert {
        "turbotx/py.typed",
        "turbotx/runtime/cpu/native.cpp",
        "turbotx/runtime/tensor_watch.cpp",
    } <= set(names)
    assert any(n.startswith("turbotx/kernels/cpp/") and n.endswith(".h") for n in names)
    assert not [n for n in names if n.endswith((".so", ".pyc")) or n.startswith("tests")]
    assert b"torch_dynamo_backends" in entry_points


def test_commands(newcomer: Newcomer) -> None:
    assert json.loads(newcomer.run("turbotx", "doctor", "--json"))["ok"]
    shape = ("--shape", "batch=2,seq=5")
    made = newcomer.run("turbotx", "compile", "my_model:make", "--out", "out", *shape, "--json")
    assert "report.html" in json.loads(made)["files"]
    assert (newcomer.folder / "out" / "fused.txt").is_file()
    verified = json.loads(newcomer.run("turbotx", "verify", "my_model.py:make", "--json"))
    assert verified["holds"]
    profiled = newcomer.run("turbotx", "profile", "my_model:make", "--runs", "2", "--json")
    assert json.loads(profiled)["runs"] == 2


def test_serve(newcomer: Newcomer, minilm_path: Path) -> None:
    """Until the model answers over HTTP; then SIGTERM, as a supervisor does it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    few = ("--backend", "eager", "--max-length", "16", "--max-batch", "2")
    server = subprocess.Popen(
        [newcomer.bin / "turbotx", "serve", minilm_path, "--port", port, *few],
        cwd=newcomer.folder, env=newcomer.environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/ready")
        asked = json.dumps({"inputs": ["one", "two words"]}).encode()
        head = {"content-type": "application/json"}
        embed = urllib.request.Request(f"http://127.0.0.1:{port}/embed", asked, head)
        with urllib.request.urlopen(embed, timeout=30) as answer:
            assert [len(row) for row in json.load(answer)] == [384, 384]
    finally:
        server.terminate()
        _, said = server.communicate(timeout=60)
    assert server.returncode == 0, said


def wait_until_ready(server: subprocess.Popen[str], url: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"not ready: exit code {server.poll()}")


def test_the_library(newcomer: Newcomer) -> None:
    """The backend is found by its name, and a saved model loads in another process."""
    place = newcomer.run("python", "-c", SAVE.format(weights=False)).strip().splitlines()[-1]
    assert place.startswith(str(newcomer.folder)), "the checkout was imported"
    newcomer.run("python", "-c", LOAD)
