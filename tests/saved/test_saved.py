"""Saved models: the same bits in another process, at any size; damaged files are refused.

In: a module with tied weights, a buffer outside its state, an op that PyTorch runs, nested outputs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from turbotx.errors import (
    BuildWarning,
    IndexOutOfRangeError,
    InputError,
    SavedFileError,
    SaveError,
    TrainingError,
    WeightsError,
)
from turbotx.saved.container import FORMAT, read_container
from turbotx.saved.native import Libraries

pytest.importorskip("safetensors")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8), persistent=False)
        self.register_buffer("shift", torch.linspace(-1, 1, 8))

    def forward(self, ids, flip: bool = False):
        x = self.words(ids) * self.scale + self.shift
        y = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        ordered = y.flip(-1) if flip else y.sort(-1)[0]
        return {"logits": self.head(y), "rest": (ordered, ids.shape[1], None)}


def ids(batch: int, seq: int) -> torch.Tensor:
    return torch.randint(0, 20, (batch, seq))


def assert_equal(ours: Any, expected: Any) -> None:
    assert torch.equal(ours["logits"], expected["logits"])
    assert torch.equal(ours["rest"][0], expected["rest"][0])
    assert ours["rest"][1:] == expected["rest"][1:]


@pytest.fixture(scope="module")
def fast() -> Any:
    torch.manual_seed(0)
    fast = turbotx.optimize(Model().eval())
    fast(ids(2, 5))
    fast(ids(2, 5), flip=True)
    return fast


@pytest.fixture(scope="module")
def path(fast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model.ttx"
    turbotx.save(fast, path)
    return path


def test_the_same_bits_at_any_size(fast, path: Path) -> None:
    loaded = turbotx.load(path)
    for shape in ((2, 5), (1, 1), (7, 3), (1, 40)):
        x = ids(*shape)
        assert_equal(loaded(x), fast(x))
        assert_equal(loaded(x, flip=True), fast(x, flip=True))
    x = ids(3, 6).t()
    assert_equal(loaded(x), fast(x))
    assert loaded.stats()["programs"] == 2
    assert list(loaded.state_dict()) == list(fast.state_dict())
    assert loaded.head.weight is loaded.words.weight


def test_a_size_that_was_not_captured_is_said_with_what_to_do(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] == 1 else x * 3

    fast = turbotx.optimize(Branch().eval())
    fast(torch.randn(3, 4))
    turbotx.save(fast, tmp_path / "m.ttx")
    said = "no saved program takes these sizes: batch != 1 does not hold. Call the optimized module"
    with pytest.raises(InputError, match=said):
        turbotx.load(tmp_path / "m.ttx")(torch.randn(1, 4))


def test_an_empty_call_is_served_where_one_was_captured(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size of 0"):
        turbotx.load(path)(ids(0, 4))
    torch.manual_seed(0)
    fast = turbotx.optimize(Model().eval())
    for shape in ((2, 5), (0, 4)):
        fast(ids(*shape))
        fast(ids(*shape), flip=True)
    turbotx.save(fast, tmp_path / "empty.ttx")
    loaded = turbotx.load(tmp_path / "empty.ttx")
    for shape in ((2, 5), (0, 4), (0, 2)):
        x = ids(*shape)
        assert_equal(loaded(x), fast(x))
        assert_equal(loaded(x, flip=True), fast(x, flip=True))


def test_a_fresh_process_needs_no_compiler_no_tracing_and_no_algebra(fast, path: Path) -> None:
    x = ids(3, 7)
    torch.save((x, fast(x)), path.with_suffix(".pt"))
    code = (
        "import sys, torch, turbotx\n"
        f"x, expected = torch.load({str(path.with_suffix('.pt'))!r})\n"
        f"made = turbotx.load({str(path)!r})(x)\n"
        "assert torch.equal(made['logits'], expected['logits'])\n"
        "assert torch.equal(made['rest'][0], expected['rest'][0])\n"
        "print(sorted({'sympy', 'triton', 'transformers'} & set(sys.modules)))\n"
    )
    environment = {"PATH": "", "PYTHONPATH": str(Path(turbotx.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_weights_may_come_from_elsewhere(fast, tmp_path: Path) -> None:
    turbotx.save(fast, tmp_path / "m.ttx", weights=False)
    with pytest.raises(SavedFileError, match="saved without weights"):
        turbotx.load(tmp_path / "m.ttx")
    torch.manual_seed(1)
    other, x = Model().eval(), ids(2, 6)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    expected = turbotx.optimize(other)(x)
    assert_equal(turbotx.load(tmp_path / "m.ttx", weights=tmp_path / "w.pt")(x), expected)
    shared = turbotx.load(tmp_path / "m.ttx", weights=other)
    assert_equal(shared(x), expected)
    with torch.no_grad():
        other.up.weight.mul_(-1)
    assert_equal(shared(x), turbotx.optimize(other)(x))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="missing from the file"):
        turbotx.load(tmp_path / "m.ttx", weights=tmp_path / "w.pt")


def test_pytorch_runs_what_has_no_kernel_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Softmax(-1)).eval()
    fast = turbotx.optimize(model, pack_weights=False, planner="greedy")
    fast(torch.randn(2, 8))
    turbotx.save(fast, tmp_path / "m.ttx")
    loaded, x = turbotx.load(tmp_path / "m.ttx"), torch.randn(5, 8)
    assert torch.equal(loaded(x), fast(x))


def test_calls_that_are_not_in_the_file(path: Path) -> None:
    loaded = turbotx.load(path)
    with pytest.raises(InputError, match=r"holds no call of this kind: \(float32\[\?\]\)"):
        loaded(torch.zeros(3))
    with pytest.raises(IndexOutOfRangeError, match="'ids'"):
        loaded(ids(1, 2) + 20)
    with pytest.raises(InputError, match="stays in the dtype"):
        loaded.to(torch.bfloat16)
    with pytest.raises(TrainingError):
        loaded.train()(ids(1, 2))


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"as fast\(\*\*inputs\)"):
        turbotx.save(turbotx.optimize(Model().eval()), tmp_path / "m.ttx")
    plain = turbotx.optimize(nn.Linear(4, 4).eval(), backend="aten")
    plain(torch.zeros(2, 4))
    with pytest.raises(SaveError, match="kernels were not built"):
        turbotx.save(plain, tmp_path / "m.ttx")
    assert not list(tmp_path.iterdir())


# --- files that are not as they were written ---


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> None:
    """Write a file again with a valid manifest around changed contents."""
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist() if n != "manifest.json"}
        manifest = json.loads(archive.read("manifest.json"))
    change(manifest, entries)
    manifest["entries"] = {n: hashlib.sha256(d).hexdigest() for n, d in entries.items()}
    text = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = hashlib.sha256(text).hexdigest().encode()
        archive.writestr("manifest.json", text)
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.fixture
def copied(path: Path, tmp_path: Path) -> Path:
    (tmp_path / "copy.ttx").write_bytes(path.read_bytes())
    return tmp_path / "copy.ttx"


def test_nothing_in_a_file_is_pickled(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        kinds = {Path(name).suffix for name in archive.namelist()}
    assert kinds == {".json", ".so", ".cpp", ".safetensors"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_files_are_refused(copied: Path, share: float) -> None:
    data = copied.read_bytes()
    copied.write_bytes(data[: int(share * len(data))])
    with pytest.raises(SavedFileError, match=r"not a complete file of turbotx\.save"):
        turbotx.load(copied)


def test_a_changed_byte_anywhere_is_refused(copied: Path) -> None:
    data = copied.read_bytes()
    for place in range(40, len(data) - 30, len(data) // 9):
        copied.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(SavedFileError):
            turbotx.load(copied)


def test_other_versions_are_refused(copied: Path) -> None:
    rewrite(copied, lambda manifest, _: manifest.update(runtime="other", turbotx="0.0.1"))
    with pytest.raises(
        SavedFileError, match=r"saved by turbotx 0\.0\.1 with another C\+\+ runtime"
    ):
        turbotx.load(copied)
    for number in (5, 99):
        rewrite(copied, lambda manifest, _, n=number: manifest.update(format=n))
        with pytest.raises(SavedFileError, match=rf"has format {number}, .* reads format {FORMAT}"):
            turbotx.load(copied)


def test_sizes_that_are_code_are_refused(copied: Path) -> None:
    def attack(manifest: dict[str, Any], entries: dict[str, bytes]) -> None:
        programs = json.loads(entries["programs.json"])
        programs[0]["executable"]["values"]["sizes"][0] = "__import__('os').system('true')"
        entries["programs.json"] = json.dumps(programs).encode()

    rewrite(copied, attack)
    with pytest.raises(SavedFileError, match="not arithmetic"):
        turbotx.load(copied)


def test_another_processor_builds_the_kernels_again(
    fast, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def need_more(manifest: dict[str, Any], entries: dict[str, bytes]) -> None:
        manifest["cpu_features"].append("avx9000")
        for name in entries:
            entries[name] = b"" if name.endswith(".so") else entries[name]

    rewrite(copied, need_more)
    x = ids(2, 3)
    assert_equal(turbotx.load(copied)(x), fast(x))  # from the cache that `fast` has filled
    with monkeypatch.context() as patched:
        patched.setenv("TURBOTX_CACHE_DIR", str(tmp_path))
        patched.setattr("turbotx.saved.native.build_library", lambda units: (CDLL(None), True))
        with pytest.warns(BuildWarning, match="avx9000"):
            Libraries(*read_container(copied)).open("kernels-0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SavedFileError, match=r"avx9000, which this one lacks.*no C\+\+ compiler"):
        turbotx.load(copied)


def test_int8_products_come_back_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fast = turbotx.optimize(Model().eval(), quantize="int8")
    given = ids(3, 4)
    expected = fast(given)
    turbotx.save(fast, tmp_path / "int8.ttx")
    assert_equal(turbotx.load(tmp_path / "int8.ttx")(given), expected)
