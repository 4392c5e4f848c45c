"""The wheel, as a newcomer meets it: built, installed outside the checkout, every command once.

In: the checkout. Out: exit codes and files of `turbotx ...`, run from another folder where nothing
of the checkout can be imported; dependencies are those of the environment that runs the tests.
"""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.request
import zipfile
from pathlib import Path

from tests.newcomer import Newcomer, wait_until_ready

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


def test_the_wheel_holds_the_package_and_no_machine_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt")))
    assert {
        "turbotx/py.typed",
        "turbotx/runtime/cpu/native.cpp",
        "turbotx/runtime/cpu/quantized.cpp",
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


def test_the_library(newcomer: Newcomer) -> None:
    """The backend is found by its name, and a saved model loads in another process."""
    place = newcomer.run("python", "-c", SAVE.format(weights=False)).strip().splitlines()[-1]
    assert place.startswith(str(newcomer.folder)), "the checkout was imported"
    newcomer.run("python", "-c", LOAD)
