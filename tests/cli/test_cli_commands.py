"""verify, profile, doctor, serve and --target: they say what is true, and fail where it is not.

In: a tiny model in a file. Out: JSON, exit codes; a kernel that is made wrong must be named.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from tests.cli.command_line import Ran
from turbotx import ir
from turbotx.engine.optimize import engine_of
from turbotx.engine.pipeline import jobs
from turbotx.errors import VerifyError
from turbotx.kernels.cpp.printer import print_kernel
from turbotx.report.numerics import compare, difference
from turbotx.runtime.cpu.launch_table import UNITS

SOURCE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + self.down(2 * torch.nn.functional.gelu(self.up(x)))).sort(-1)[0]


def make():
    torch.manual_seed(0)
    return Block().eval(), {"x": torch.randn(2, 3, 16)}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "block.py"
    path.write_text(SOURCE)
    return f"{path}:make"


def test_verify_measures_every_launch_and_the_outputs(run: Callable[..., Ran], model: str) -> None:
    shapes = ("--shape", "batch=1,seq=1", "--shape", "batch=5,seq=7")
    ran = run("verify", model, *shapes, "--json")
    found = ran.json
    assert ran.code == 0 and found["holds"]
    assert [s["dims"]["batch"] for s in found["shapes"]] == [1, 5]
    launches = found["shapes"][1]["launches"]
    assert {e["name"].rsplit("_", 1)[0] for e in launches} >= {
        "linear",
        "fused_add_gelu_mul",
        "sort",
    }
    for error in launches:
        assert 0 <= error["turbotx"] <= error["allowed"] < 1e-3
    assert len(found["shapes"][1]["outputs"]) == 1
    assert list(found["adversarial"]) == ["large mean", "-inf rows", "denormals"]
    harsh = {e["name"] for e in found["adversarial"]["large mean"]}
    assert harsh and all(name.startswith("fused_") for name in harsh)


def test_verify_names_a_kernel_that_is_wrong(
    run: Callable[..., Ran], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(kernel: Any, name: str | None = None) -> str:
        text = print_kernel(kernel, name)
        assert "gelu" not in kernel.name or "0.707106" in text
        return text.replace("0.707106", "0.717106")

    unit = replace(UNITS[ir.KernelLaunch], print=wrong)
    monkeypatch.setitem(UNITS, ir.KernelLaunch, unit)
    ran = run("verify", model, "--json")
    assert ran.code == 1 and not ran.json["holds"]
    bad = [e["name"] for e in ran.json["shapes"][0]["launches"] if not e["holds"]]
    assert bad == ["fused_add_gelu_mul_0"]
    assert not ran.json["shapes"][0]["outputs"][0]["holds"]
    harsh = {
        case: {e["name"]: e["holds"] for e in v} for case, v in ran.json["adversarial"].items()
    }
    assert not harsh["-inf rows"]["fused_add_gelu_mul_0"]
    assert harsh["large mean"]["fused_add_gelu_mul_0"], "gelu(x) is x there, whatever its factor"


def test_verify_catches_a_wrong_pass_in_the_outputs(
    run: Callable[..., Ran], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every launch does what the graph says then; it is the graph that is wrong."""
    from turbotx.engine import pipeline

    rewrite = pipeline.rewrite

    def wrong(graph: Any, *rest: Any) -> Any:
        for node in graph.nodes:
            if node.target is torch.ops.aten.gelu.default:
                node.target, node.kwargs = torch.ops.aten.relu.default, {}
        return rewrite(graph, *rest)

    monkeypatch.setattr(pipeline, "rewrite", wrong)
    ran = run("verify", model, "--json")
    assert ran.code == 1
    assert all(e["holds"] for e in ran.json["shapes"][0]["launches"])
    assert not ran.json["shapes"][0]["outputs"][0]["holds"]


def test_verify_prints_a_table(run: Callable[..., Ran], model: str) -> None:
    ran = run("verify", model)
    assert ran.code == 0 and "fused_add_gelu_mul_0" in ran.out and "holds" in ran.out


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "ours, exact, expected",
    [([1.0, INF], [1.0, INF], 0.0), ([NAN], [NAN], 0.0), ([-INF], [INF], INF), ([1.5], [1.0], 0.5)],
)
def test_difference(ours: list[float], exact: list[float], expected: float) -> None:
    assert difference(torch.tensor(ours), torch.tensor(exact, dtype=torch.float64)) == expected


def test_a_nan_of_ours_is_never_allowed() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    wrong, right = torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0])
    assert not compare("x", "", "", wrong, right, exact).holds
    assert compare("x", "", "", right, right, exact).holds
    integers = torch.tensor([1, 2])
    assert not compare("x", "", "", integers + 1, integers, integers).holds


def test_profile_times_every_launch(run: Callable[..., Ran], model: str, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "report.html"
    files = ("--trace", trace, "--report", page)
    ran = run("profile", model, "--shape", "batch=4,seq=9", "--runs", 5, *files, "--json")
    found = ran.json
    assert ran.code == 0 and found["runs"] == 5 and found["dims"]["seq"] == 9
    kinds = [x["kind"] for x in found["launches"]]
    assert "gemm" in kinds and "kernel" in kinds and "aten" in kinds
    assert all(x["median_us"] > 0 for x in found["launches"])
    assert found["guards_us"] > 0
    assert found["between_launches_us"] * len(found["launches"]) == pytest.approx(
        found["between_us"]
    )
    events = json.loads(trace.read_text())["traceEvents"]
    assert [e["name"] for e in events] == [x["name"] for x in found["launches"]]
    for before, after in pairwise(events):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
    gelu = next(x for x in found["launches"] if "gelu" in x["name"])
    assert gelu["compulsory_nbytes"] == (2 * 4 * 9 * 32 + 32) * 4
    assert f'"{gelu["name"]}":{gelu["median_us"]}' in page.read_text()


def test_profile_prints_tables(run: Callable[..., Ran], model: str) -> None:
    ran = run("profile", model, "--runs", 2)
    assert ran.code == 0 and "By kernel" in ran.out and "between launches" in ran.out


def test_profile_refuses_what_it_cannot_do(
    run: Callable[..., Ran], model: str, tmp_path: Path
) -> None:
    assert run("profile", model, "--shape", "batch=1", "--shape", "batch=2").code == 2
    assert run("profile", model, "--runs", 0).code == 2
    assert run("profile", model, "--runs", 1, "--trace", tmp_path / "no" / "t.json").code == 2


def test_an_optimized_module_profiles_itself() -> None:
    fast, x = turbotx.optimize(nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()), torch.randn(3, 4)
    found = turbotx.explain(fast, x).profile(x, runs=2)
    assert sum(count for _, count in found.by_region().values()) == len(found.launches)
    assert sum(us for us, _ in found.by_module().values()) > 0 and found.overhead >= 0
    assert len(found.to_chrome_trace()["traceEvents"]) == len(found.launches)


def test_the_environment_dumps_and_verifies_what_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval(), torch.randn(3, 4)
    monkeypatch.setenv("TURBOTX_DUMP", str(tmp_path))
    monkeypatch.setenv("TURBOTX_VERIFY", "1")
    fast = turbotx.optimize(layer)
    torch.testing.assert_close(fast(x), layer(x).detach())
    turbotx.optimize(layer)(x)
    assert {p.name for p in tmp_path.iterdir()} == {"Sequential_0", "Sequential_1"}
    assert (tmp_path / "Sequential_1" / "report.html").is_file()
    monkeypatch.setattr("turbotx.report.numerics.FACTOR", -1.0)
    monkeypatch.setattr("turbotx.report.numerics.ULPS", -1)
    with pytest.raises(VerifyError, match="TURBOTX_VERIFY"):
        turbotx.optimize(layer)(x)


def test_the_model_runs_as_before_after_a_profile() -> None:
    layer, x = nn.Linear(4, 4).eval(), torch.randn(3, 4)
    report = turbotx.explain(layer, x)
    report.profile(x, runs=2)
    program = report.compiled.program
    (found,) = program.run(program.bind((3,)), [x])
    torch.testing.assert_close(found, layer(x).detach())


def test_doctor_tries_what_it_says(run: Callable[..., Ran]) -> None:
    ran = run("doctor", "--json")
    checks = {c["name"]: c for c in ran.json["checks"]}
    assert ran.code == 0 and ran.json["ok"]
    assert checks["build"]["state"] == checks["cache"]["state"] == "ok"
    assert torch.__version__ in checks["torch"]["found"]


def test_doctor_without_a_compiler_says_how_to_get_one(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    ran = run("doctor", "--json")
    checks = {c["name"]: c for c in ran.json["checks"]}
    assert checks["compiler"]["state"] == "missing" and "g++" in checks["compiler"]["remedy"]
    assert checks["build"]["state"] == "missing" and ran.code == 0


def test_doctor_finds_a_cache_that_cannot_be_written(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURBOTX_CACHE_DIR", str(tmp_path / "file"))
    ran = run("doctor")
    assert ran.code == 1 and "TURBOTX_CACHE_DIR" in ran.out


def test_serve_hands_its_options_over(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = pytest.importorskip("turbotx.serving.server")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        server, "serve", lambda models, **options: seen.update(options, models=models)
    )
    assert run("serve", "some/folder", "another", "--port", 9000, "--backend", "eager").code == 0
    assert (seen["models"], seen["port"]) == (["some/folder", "another"], 9000)
    assert seen["backend"] == "eager" and seen["served_model_name"] == ()
    assert seen["api_keys"] == () and seen["max_batch_tokens"] == 16_384
    (tmp_path / "keys").write_text("# ours\nfirst\n\n second\n")
    monkeypatch.setenv("TURBOTX_API_KEY", "zeroth")
    run(
        "serve",
        "--served-model-name",
        "small",
        "--api-key-file",
        tmp_path / "keys",
        "--max-batch-tokens",
        0,
        "--no-normalize",
    )
    assert seen["api_keys"] == ("zeroth", "first", "second")
    assert seen["models"] == ["minilm"] and seen["served_model_name"] == ("small",)
    assert seen["max_batch_tokens"] is None and seen["normalize"] is False


@pytest.mark.parametrize(
    "options, says",
    [
        (["no/such/folder"], "not a directory"),
        (["--max-batch", "0"], "max_batch"),
        (["--api-key", ""], "API key"),
        (["--api-key-file", "no/such/file"], "API keys"),
        (["--policy", "random"], "aged"),
        (["--max-length", "9999"], "positions"),
        (["minilm", "minilm", "--pooling", "cls"], "pooling applies to one model"),
        (["minilm", "--served-model-name", "a", "--served-model-name", "b"], "one for each"),
        (["minilm", "minilm"], "models of one name"),
    ],
)
def test_serve_says_which_option_is_wrong(
    run: Callable[..., Ran], options: list[str], says: str, minilm_path: Path
) -> None:
    pytest.importorskip("turbotx.serving.server")
    ran = run("serve", *options)
    assert ran.code == 2 and says in ran.err


def test_an_unknown_target_is_refused(run: Callable[..., Ran], model: str, tmp_path: Path) -> None:
    ran = run("compile", model, "--out", tmp_path / "out", "--target", "sm_1")
    assert ran.code == 2 and "sm_90" in ran.err
    assert not (tmp_path / "out").exists()


def test_compile_for_a_gpu_that_is_not_there(
    run: Callable[..., Ran], model: str, tmp_path: Path
) -> None:
    """What is built and reported is what a GPU would run: the same jobs, GEMMs among them."""
    pytest.importorskip("triton")
    ran = run(
        "compile", model, "--out", tmp_path / "out", "--dtype", "float16", "--target", "sm_90",
        "--json",
    )  # fmt: skip
    assert ran.code == 0 and ran.json["targets"] == ["sm_90"]
    folder = tmp_path / "out" / "kernels" / "sm_90"
    resources = json.loads((folder / "resources.json").read_text())
    gemms = {name for name in resources if name.startswith("gemm_")}
    assert gemms and set(resources) == set(ran.json["kernels"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {g["through"] for g in report["gemms"]} == gemms
    for name, used in resources.items():
        assert used["registers"] > 0 and report["resources"][name]["sm_90"] == used
        assert (folder / f"{name}.cubin").stat().st_size > 0
    module, given = runpy.run_path(model.rpartition(":")[0])["make"]()
    engine = engine_of(module.half())
    captured = engine.capture((), {"x": given["x"].half()})
    made = jobs(engine.compile(captured, "sm_90").unbound, captured.example_dims)
    sources = {(folder / f"{name}.py").read_text() for name in resources}
    assert {x.job.source for x in made} == sources


def test_compile_verifies_every_launch(run: Callable[..., Ran], model: str, tmp_path: Path) -> None:
    assert run("compile", model, "--out", tmp_path / "out", "--verify").code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["numerics"]["holds"] is True
    assert len(report["numerics"]["launches"]) >= len(report["launches"])


def test_what_cannot_run_here_is_not_verified_here(
    run: Callable[..., Ran], model: str, tmp_path: Path
) -> None:
    ran = run("compile", model, "--out", tmp_path / "out", "--target", "sm_90", "--verify")
    assert ran.code == 2 and "sm_90 is not here" in ran.err and "leave out --verify" in ran.err


def test_one_file_for_a_gpu_that_is_not_there(
    run: Callable[..., Ran], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from tests.saved.stand_in_cubins import Cubins

    Cubins(monkeypatch)
    path = tmp_path / "model.ttx"
    ran = run("compile", model, "--target", "sm_90", "--target", "cpu", "--save", path, "--json")
    assert ran.code == 0 and ran.json["targets"] == ["sm_90", "cpu"]
    assert ran.json["nbytes"] == path.stat().st_size
    module, given = runpy.run_path(model.rpartition(":")[0])["make"]()
    torch.testing.assert_close(turbotx.load(path)(**given), module(**given))
    ran = run("compile", model, "--target", "gfx942", "--save", tmp_path / "other.ttx")
    assert ran.code == 3 and "no programs for 'gfx942'" in ran.err
    ran = run("compile", model, "--out", tmp_path / "out", "--save", path)
    assert ran.code == 0 and "for cpu; turbotx.load takes it" in ran.out
    assert (tmp_path / "out" / "report.html").exists()


def test_compile_for_the_cpu_fills_the_cache_ahead(
    run: Callable[..., Ran], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOTX_CACHE_DIR", str(tmp_path / "cache"))
    assert run("compile", model, "--target", "cpu", "--out", tmp_path / "out").code == 0
    module, given = runpy.run_path(model.rpartition(":")[0])["make"]()
    fast = turbotx.optimize(module)
    fast(**given)
    assert fast.stats()["kernel_builds"] == 0 and fast.stats()["captures"] == 1


def test_a_packed_program_is_written_and_verified(run: Callable[..., Ran], tmp_path: Path) -> None:
    small = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64"
    bert = f"hf-config:bert,{small},vocab_size=50"
    folder = tmp_path / "out"
    ran = run("compile", bert, "--shape", "batch=2,seq=8", "--out", folder, "--packed", "--verify")
    assert ran.code == 0, ran.err
    report = json.loads((folder / "report.json").read_text())
    assert report["numerics"]["holds"] is True and 0 < report["dims"]["tokens"] <= 16
    assert any("packed_attention" in x["name"] for x in report["launches"])
    ran = run("compile", bert, "--save", tmp_path / "bert.ttx", "--packed")
    assert ran.code == 0, ran.err
    fast = turbotx.load(tmp_path / "bert.ttx")
    ids = torch.arange(1, 8)
    found = fast.packed(input_ids=ids, lengths=[3, 4], use_cache=False)
    alone = fast.packed(input_ids=ids[:3], lengths=[3], use_cache=False)
    torch.testing.assert_close(found[0][:3], alone[0])


def test_a_packed_program_is_compiled_for_a_gpu(run: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    bert = "hf-config:bert,num_hidden_layers=1,hidden_size=32,num_attention_heads=2,vocab_size=50"
    ran = run("compile", bert, "--out", tmp_path / "out", "--packed", "--target", "sm_90")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    token = next(x for x in report["launches"] if x["name"].startswith("sequence_token"))
    assert token["kind"] == "kernel" and token["kernel"] == "sequence_first_float32"
    resources = json.loads((tmp_path / "out" / "kernels" / "sm_90" / "resources.json").read_text())
    assert any(n.startswith("packed_attention") and not x["spills"] for n, x in resources.items())
