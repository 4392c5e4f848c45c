"""`turbotx save`, and the file that it writes as MODEL.

In: a small model, saved. Out: what bench and profile measure of it, and what others say of it.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import turbotx
from tests.cli.command_line import Ran
from turbotx.errors import InputError
from turbotx.saved.example import example_call

SOURCE = """
import torch

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval()
    return model, (torch.randn(2, 3, 8),)
"""


@pytest.fixture
def saved(run: Callable[..., Ran], tmp_path: Path) -> Path:
    (tmp_path / "small.py").write_text(SOURCE)
    path = tmp_path / "small.ttx"
    ran = run("save", f"{tmp_path / 'small.py'}:make", "--out", path, "--json")
    assert ran.code == 0 and ran.json["nbytes"] == path.stat().st_size
    return path


def test_the_file_is_the_model(saved: Path) -> None:
    model, (x,) = runpy.run_path(str(saved.with_suffix(".py")))["make"]()
    torch.testing.assert_close(turbotx.load(saved)(x), model(x))


def test_it_is_timed_launch_by_launch_at_any_shape(run: Callable[..., Ran], saved: Path) -> None:
    found = run("profile", saved, "--shape", "batch=3,seq=5", "--runs", "2", "--json").json
    assert found["dims"] == {"batch": 3, "seq": 5}
    assert [x["name"] for x in found["launches"]] == ["linear_gelu_0"]
    ran = run("profile", saved, "--shape", "nose=3")
    assert ran.code == 2 and "this model's are batch, seq" in ran.err
    ran = run("profile", saved, "--report", saved.with_suffix(".html"))
    assert ran.code == 2 and "--report needs the model" in ran.err


def test_bench_runs_it_in_turbotx_alone(run: Callable[..., Ran], saved: Path) -> None:
    chosen = ("--shape", "batch=3,seq=5", "--rounds", "1", "--calls", "2", "--streams", "2")
    found = run("bench", saved, *chosen, "--json").json
    (engines,) = [row["engines"] for row in found["rows"]]
    assert engines["turbotx"]["runs"] == 4 and engines["turbotx"]["calls_per_s"] > 0
    found = run("bench", saved, "--engine", "eager", *chosen, "--json").json
    assert "holds no module" in found["failed"]["eager"]


@pytest.mark.parametrize(
    "command, says",
    [
        ("verify", "--reference minilm"),
        ("serve", "holds no tokenizer"),
        ("save --out x.ttx", "saved already"),
        ("compile --stage cpp", "holds no stages"),
        ("compile --out x --target sm_90", "compiled already"),
    ],
)
def test_what_needs_the_model_says_so(
    run: Callable[..., Ran], saved: Path, command: str, says: str
) -> None:
    command, *options = command.split()
    ran = run(command, saved, *options)
    assert ran.code == 2 and says in ran.err


def test_it_is_verified_against_the_model_that_it_was_saved_from(
    run: Callable[..., Ran], saved: Path
) -> None:
    model = f"{saved.with_suffix('.py')}:make"
    chosen = ("verify", saved, "--reference", model, "--shape", "batch=2,seq=3")
    found = run(*chosen, "--json").json
    assert found["holds"] and found["shapes"][0]["dims"] == {"batch": 2, "seq": 3}
    assert [x["name"] for x in found["shapes"][0]["outputs"]] == ["output 0"]
    assert "ok" in run(*chosen).out

    without = saved.with_name("without.ttx")
    model_of = runpy.run_path(model.removesuffix(":make"))["make"]
    fast = turbotx.optimize(model_of()[0])
    fast(model_of()[1][0])
    turbotx.save(fast, without, weights=False)
    assert run("verify", without, "--reference", model).code == 0

    saved.with_suffix(".py").write_text(SOURCE.replace("seed(0)", "seed(1)"))
    ran = run(*chosen)
    assert ran.code == 2 and "the model has other values of" in ran.err
    ran = run("verify", model, "--reference", model)
    assert ran.code == 2 and "its own reference" in ran.err


def test_wrong_code_in_a_file_is_found(run: Callable[..., Ran], saved: Path) -> None:
    """A file whose program is of another function than its reference, with the same weights."""
    model = f"{saved.with_suffix('.py')}:make"
    saved.with_suffix(".py").write_text(SOURCE.replace("GELU()", "ReLU()"))
    ran = run("verify", saved, "--reference", model)
    assert ran.code == 1 and "too large: output 0" in ran.out


def test_what_it_holds_is_written_out(run: Callable[..., Ran], saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run("compile", saved, "--out", out, "--shape", "batch=3,seq=5", "--json").json
    assert {"manifest.json", "memory_plan_0.json", "programs.txt"} <= set(found["files"])
    text = (out / "programs.txt").read_text()
    assert text.startswith("program 0, for cpu: (float32[?, ?, ?])\n1 launches; ")
    assert "at batch=3, seq=5" in text and "linear_gelu_0" in text
    ran = run("compile", saved, "--out", out, "--shape", "nose=5")
    assert ran.code == 2 and "no dim is called 'nose'" in ran.err


def test_inputs_are_made_for_every_kind_of_argument(tmp_path: Path) -> None:
    @turbotx.optimize
    def call(
        x: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, scale: float, twice: bool
    ) -> torch.Tensor:
        return (x[:, ids] * scale * (2 if twice else 1)).masked_fill(mask[:, None], 0.0)

    given = (torch.randn(3, 4), torch.tensor([0, 1]), torch.tensor([True, False, True]), 0.5, True)
    call(*given)
    turbotx.save(call, tmp_path / "call.ttx")
    loaded = turbotx.load(tmp_path / "call.ttx")
    args, kwargs = example_call(loaded, {"batch": 5})
    x, ids, mask, scale, twice = args
    assert (
        x.shape[0] == mask.shape[0] == 5 and ids.dtype == torch.int64 and mask.dtype == torch.bool
    )
    assert isinstance(scale, float) and twice is True
    loaded(*args, **kwargs)
    with pytest.raises(InputError, match="no dim is called 'heads'"):
        example_call(loaded, {"heads": 5})


def test_a_decoders_step_is_saved_verified_and_profiled(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    model = (
        "hf-config:gpt2,n_layer=1,n_embd=16,n_head=2,vocab_size=50,bos_token_id=0,eos_token_id=1"
    )
    path, shape = tmp_path / "step.ttx", ("--shape", "batch=2,seq=1,past=70")
    ran = run("compile", model, *shape, "--out", tmp_path / "out", "--save", path, "--json")
    assert ran.code == 0 and ran.json["saved"] == str(path), ran.err
    ran = run("profile", path, "--shape", "batch=3,seq=2,past=90", "--runs", "2", "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert {k: found["dims"][k] for k in ("batch", "seq", "length")} == {
        "batch": 3, "seq": 2, "length": 92
    }  # fmt: skip
    assert any("attention" in x["name"] for x in found["launches"])
    ran = run("verify", path, "--reference", model, *shape, "--json")
    assert ran.code == 0 and ran.json["holds"], ran.err
    ran = run("profile", path, "--shape", "nose=3")
    assert ran.code == 2 and "no dim is called 'nose'" in ran.err


def test_a_step_of_a_file_without_steps_is_refused(run: Callable[..., Ran], saved: Path) -> None:
    ran = run("profile", saved, "--shape", "batch=3,past=5")
    assert ran.code == 2 and "no call with a key/value cache" in ran.err
