"""Programs for GPUs that are not here, saved on a CPU and run from the file alone.

In: tiny models, a file, stand-ins for cubins and for the GPU. Out: errors against float64, plain,
captured and replayed; what a load imports; refusals that say what the file has.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")
pytest.importorskip("safetensors")

import turbotx
from tests.models import token_inputs
from tests.runtime.cuda.stand_in_device import InterpretedDevice, bind_to
from tests.runtime.cuda.test_triton_programs import check, tiny
from tests.saved.stand_in_cubins import Cubins, run_fresh
from tests.saved.test_saved import Model, assert_equal, ids
from turbotx.errors import (
    BuildWarning,
    IndexOutOfRangeError,
    InputError,
    OptionsError,
    SavedFileError,
    SaveError,
)
from turbotx.runtime.cuda.settings import assume_tf32
from turbotx.saved.codec import decode_nodes, encode_nodes
from turbotx.saved.container import FORMAT, read_container
from turbotx.saved.gpu_kernels import read_variants
from turbotx.saved.places import choose_target

pytest.importorskip("transformers")


def save(model: Any, path: Path, *targets: str, **options: Any) -> Any:
    fast = turbotx.optimize(model, **options)
    fast(**token_inputs(2, 3))
    turbotx.save(fast, path, targets=targets)
    return fast


def save_small(path: Path, *targets: str, shapes: tuple[tuple[int, int], ...] = ((2, 5),)) -> Any:
    """Save two kinds of calls of a model with an op that PyTorch runs and a buffer of its own."""
    torch.manual_seed(0)
    fast = turbotx.optimize(Model().eval())
    for shape in shapes:
        fast(ids(*shape))
        fast(ids(*shape), flip=True)
    turbotx.save(fast, path, targets=targets)
    return fast


def assert_near(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours["logits"], expected["logits"])
    torch.testing.assert_close(ours["rest"][0], expected["rest"][0])
    assert ours["rest"][1:] == expected["rest"][1:]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_saved_on_a_cpu_runs_on_a_gpu(
    name: str, cubins: Cubins, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotx.kernels.gemm_heuristics.MOST_FOLDED", 16)
    model = tiny(name, torch.float32 if name == "llama" else torch.float16)
    save(model, path, "sm_90")
    loaded = cubins.load(path)
    placed = len(cubins.device.placed)
    for batch, seq in ((2, 3), (1, 1), (2, 3), (3, 7), (2, 3), (3, 7), (3, 7), (1, 16)):
        check(loaded, model, batch, seq)
    stats = loaded.stats()
    assert stats["kernel_builds"] == 0 and stats["graph_captures"] == 2
    assert sorted(graph.replays for graph in cubins.device.graphs) == [2, 2]
    assert len(cubins.device.placed) == placed  # all kernels were there before the first call
    if name != "llama":  # whose full float32 products fold up to 16 tokens only where that wins
        plans = [p.plans for p in loaded.programs()]
        assert plans == [1, 3]  # norms stored for 21 tokens, folded for fewer


def test_the_same_kernels_run_as_without_a_file(
    cubins: Cubins, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved where it ran, which is the default, with what the caller has chosen there."""
    device, model = InterpretedDevice(), tiny("bert", torch.float16)
    with monkeypatch.context() as patched:
        fast = bind_to(device, model, patched, schedules={"gemm_*": "m16n16k16x2"})
        fast(**token_inputs(2, 3))
        turbotx.save(fast, path)
        turbotx.save(fast, path.with_suffix(".cpu"), targets=["cpu"])
    loaded = cubins.load(path, "sm_90")
    check(turbotx.load(path.with_suffix(".cpu")), model, 2, 3)
    inputs = token_inputs(2, 3)
    for _ in range(3):
        ours, expected = loaded(**inputs), fast(**inputs)
        assert torch.equal(ours["last_hidden_state"], expected["last_hidden_state"])
    launches, wanted = (
        {(e[1], e[2]) for e in d.log if e[0] == "launch"} for d in (cubins.device, device)
    )
    assert launches == wanted and any(grid[1] == 2 for _, grid in launches)
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("manifest.json"))["targets"] == ["sm_90"]


def test_a_file_for_cpus_and_gpus(cubins: Cubins, path: Path) -> None:
    fast = save_small(path, "cpu", "sm_80", "sm_90", shapes=((2, 5), (0, 4)))
    x = ids(3, 7)
    assert_equal(turbotx.load(path)(x), fast(x))
    for target in ("sm_80", "sm_89", "sm_90"):
        loaded = cubins.load(path, target, device="cuda")
        assert {b.target for b in cubins.device.placed} == {
            "sm_80" if target == "sm_89" else target
        }
        for shape in ((2, 5), (1, 1), (2, 5), (2, 5), (0, 4)):
            x = ids(*shape)
            assert_near(loaded(x), fast(x))
            assert_near(loaded(x, flip=True), fast(x, flip=True))
    with pytest.raises(IndexOutOfRangeError, match="'ids'"):
        loaded(ids(1, 2) + 20)
    assert loaded.head.weight is loaded.words.weight
    assert list(loaded.state_dict()) == list(fast.state_dict())


def test_parameters_are_the_files_and_may_be_changed(cubins: Cubins, path: Path) -> None:
    model = tiny("bert")
    save(model, path, "sm_90")
    loaded = cubins.load(path)
    check(loaded, model, 2, 3)
    with torch.no_grad():
        for module in (model, loaded):  # a norm's weight is folded into the GEMM behind it
            module.get_parameter("encoder.layer.0.attention.output.LayerNorm.weight").mul_(1.5)
    for _ in range(3):
        check(loaded, model, 2, 3)
    shared = cubins.load(path, weights=model, device="cuda")
    check(shared, model, 2, 3)
    assert shared.get_parameter("pooler.dense.weight") is model.pooler.dense.weight


def test_tf32_where_the_user_allows_it(cubins: Cubins, path: Path) -> None:
    model = tiny("bert")
    save(model, path, "sm_90", gemms="triton")
    loaded = cubins.load(path)
    inputs = token_inputs(2, 3)

    def sources() -> set[bool]:
        cubins.device.log.clear()
        loaded(**inputs)
        names = {e[1] for e in cubins.device.log if e[0] == "launch"}
        assert any(n.startswith("gemm") for n in names)
        return {"tf32" in v.source for v in cubins.device.ran if v.name.startswith("gemm")}

    plain = sources()
    cubins.device.ran.clear()
    with assume_tf32(True):
        assert sources() != plain


# --- what a load needs ---

FRESH = """
    import sys
    from contextlib import nullcontext
    for name in ("sympy", "triton", "transformers"):
        sys.modules[name] = None
    import torch, turbotx
    DEVICE
    loaded = turbotx.load(PATH)
    x = torch.zeros(2, 5, dtype=torch.long)
    for _ in range(3):
        made = loaded(x)
    assert made["logits"].shape == (2, 5, 20) and made["rest"][1:] == (5, None)
    loaded(x[:1, :4], flip=True)
    assert device.launched and device.graphs == 1, device.launched
    print(sorted(n for n in ("sympy", "triton", "transformers") if sys.modules[n]))
"""


def test_a_fresh_process_needs_neither_triton_nor_algebra(cubins: Cubins, path: Path) -> None:
    save_small(path, "sm_90")
    assert run_fresh(FRESH, path).strip() == "[]"


GPU = """
    import sys, torch
    torch.zeros(1, device="cuda")
    for name in ("sympy", "triton", "transformers"):
        sys.modules[name] = None
    import turbotx
    loaded = turbotx.load(PATH)
    inputs, expected = torch.load(PATH + ".pt")
    for _ in range(3):
        made = loaded(**{k: v.cuda() for k, v in inputs.items()})["last_hidden_state"]
        torch.testing.assert_close(made.cpu(), expected, rtol=2e-2, atol=2e-2)
    stats = loaded.stats()
    assert stats["graph_captures"] == 1 and stats["kernel_builds"] == 0, stats
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(2, 3), (4, 80), (4, 300)], ids=str)
def test_a_file_made_on_the_cpu_runs_on_this_gpu(shape: tuple[int, int], path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    model = tiny("bert", torch.float16, max_position_embeddings=512)
    save(model, path, f"sm_{major}{minor}")
    inputs = token_inputs(*shape)
    with torch.no_grad():
        torch.save((inputs, model(**inputs)["last_hidden_state"]), f"{path}.pt")
    code = textwrap.dedent(GPU).replace("PATH", repr(str(path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_counts_in_64_bits_is_built_where_something_can(
    cubins: Cubins, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("turbotx.runtime.cuda.variants", "turbotx.saved.variants"):
        monkeypatch.setattr(f"{module}.LARGE", 150)  # elements, as if numbers ended there
    # More rows than this have more elements, as more than the true one can have.
    monkeypatch.setattr("turbotx.runtime.cuda.variants.MANY_ROWS", 18)
    fast = save_small(path, "sm_90")
    loaded, x = cubins.load(path), ids(5, 6)
    assert_near(loaded(x[:2, :5]), fast(x[:2, :5]))
    words = r"a call of batch=5, seq=6 cannot run: .*64 bits.*install Triton and SymPy"
    with pytest.raises(SavedFileError, match=words):
        loaded(x)
    cubins.device.compiles = True
    with pytest.warns(BuildWarning, match="64 bits at these sizes"):
        assert_near(loaded(x), fast(x))
    assert loaded.stats()["kernel_builds"] > 0


# --- refusals ---


@pytest.mark.parametrize(
    ("targets", "device", "best"),
    [
        (["cpu", "sm_80", "sm_90"], "sm_89", "sm_80"), (["sm_80", "sm_86"], "sm_89", "sm_86"),
        (["sm_86"], "sm_80", None), (["sm_80"], "sm_90", None), (["sm_90"], "sm_100", None),
        (["sm_100"], "sm_103", "sm_100"), (["sm_100"], "sm_120", None), (["cpu"], "sm_90", None),
    ],
)  # fmt: skip
def test_cubins_run_within_a_major_version(
    targets: list[str], device: str, best: str | None
) -> None:
    assert choose_target(targets, device) == best


def test_other_devices_are_told_what_the_file_has(cubins: Cubins, path: Path) -> None:
    save_small(path, "sm_90", "sm_100")
    words = r"has programs for sm_90 and sm_100, and cuda \(a stand-in\) is sm_80, .*'sm_80'"
    with pytest.raises(SavedFileError, match=words):
        cubins.load(path, "sm_80")
    with pytest.raises(InputError, match="an input is on meta, and this file was loaded for cpu"):
        cubins.load(path, "sm_90")(ids(1, 2).to("meta"))
    with pytest.raises(SavedFileError, match="for sm_90 and sm_100, not for CPUs"):
        turbotx.load(path, device="cpu")
    with pytest.raises(OptionsError, match="'gpu' is none that PyTorch knows: write cpu, cuda"):
        turbotx.load(path, device="gpu")
    with pytest.raises(OptionsError, match="'meta': turbotx runs on CPUs and NVIDIA GPUs"):
        turbotx.load(path, device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(cubins: Cubins, path: Path) -> None:
    save_small(path, "sm_90")
    with pytest.raises(SavedFileError, match="for sm_90, and there is no GPU to load it on: PyTor"):
        turbotx.load(path)


@pytest.mark.parametrize("target", ["gfx942", "sm_75", "h100", ""])
def test_targets_that_nothing_runs_on(target: str, path: Path) -> None:
    fast = turbotx.optimize(Model().eval())
    fast(ids(2, 5))
    with pytest.raises(SaveError, match=f"no programs for '{target}'"):
        turbotx.save(fast, path, targets=["cpu", target])
    with pytest.raises(SaveError, match="leaves nothing to save"):
        turbotx.save(fast, path, targets=[])
    assert not path.exists()


def change(path: Path, entry: Callable[[str], bool]) -> None:
    """Change a byte in the middle of an entry."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        content = archive.read(next(n for n in archive.namelist() if entry(n)))
    place = data.index(content) + len(content) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


@pytest.mark.parametrize("end", [".cubin", "sm_90.json", "programs.json"])
def test_a_changed_kernel_or_table_is_refused(end: str, cubins: Cubins, path: Path) -> None:
    save_small(path, "sm_90")
    change(path, lambda name: name.endswith(end))
    with pytest.raises(SavedFileError):
        cubins.load(path)


def test_nothing_is_pickled(cubins: Cubins, path: Path) -> None:
    save_small(path, "sm_90")
    with zipfile.ZipFile(path) as archive:
        assert {Path(n).suffix for n in archive.namelist()} == {".json", ".cubin", ".safetensors"}
        assert json.loads(archive.read("manifest.json"))["format"] == FORMAT


def test_calls_run_where_the_program_does() -> None:
    """A capture on a CPU names it in what it makes anew; its program may run elsewhere."""
    graph = torch.fx.Graph()
    given = {"device": torch.device("cuda", 3), "pin_memory": False}
    made = graph.call_function(torch.ops.aten.arange.default, (4,), given)
    (node,) = decode_nodes(encode_nodes([made]), torch.device("meta")).values()
    assert node.target(*node.args, **node.kwargs).device.type == "meta"


def test_real_cubins(path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Softmax(-1)).half().eval()
    fast = turbotx.optimize(model)
    fast(torch.randn(2, 16).half())
    turbotx.save(fast, path, targets=["sm_90"])
    _, entries = read_container(path)
    found = [v for v in read_variants("sm_90", entries) if hasattr(v, "image")]
    assert found and all(v.image[:4] == b"\x7fELF" for v in found)
    assert all(v.entry == v.name and v.threads in (32, 64, 128, 256) for v in found)
