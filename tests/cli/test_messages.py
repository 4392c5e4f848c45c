"""Mistakes: what turbotx says of input that is wrong, on the command line and in Python.

In: what people get wrong. Out: one line that names what was seen and what to do, an exit code that
tells a mistake of the user's from a fault of turbotx, and JSON where that was asked for.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import turbotx
from tests.cli.command_line import Ran, make_run
from turbotx.cli.output import FAILED, INTERNAL, MISUSED
from turbotx.errors import versions


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    return make_run(capsys)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["compil", "minilm"], "Did you mean 'compile'?"),
        (["verify"], "Missing argument 'MODEL'"),
        (["verify", "minilm", "--dtype", "float8"], "'float32', 'bfloat16', 'float16'"),
        (["verify", "minilm", "--shap", "batch=1"], "--shape"),
        (["verify", "hf-config:bert,num_layers=2"], "did you mean 'num_hidden_layers'?"),
        (["verify", "hf-config:bert,num_hidden_layers=x"], "expected int, got str"),
        (["verify", "hf-config:brt"], "did you mean"),
        (["verify", "./my:make"], "is not a module name"),
        (["verify", "minilm", "--shape", "seq=²"], "whole number"),
        (["save", "minilm", "--out", "/no/such/folder/x.ttx"], "no folder to write to"),
        (["profile", "minilm", "--trace", "/dev"], "cannot write /dev: /dev is a folder"),
    ],
)
def test_a_wrong_command_is_one_line(
    run: Callable[..., Ran], arguments: list[str], expected: str
) -> None:
    code, out, err = run(*arguments)
    assert code == MISUSED and out == ""
    assert expected in err and err.count("\n") == 1

    found = run(*arguments, "--json")
    assert found.code == MISUSED and expected in found.json["error"]
    assert found.json["exit_code"] == MISUSED and found.err == ""


SMALL = "hf-config:bert,num_hidden_layers=1,hidden_size=32,num_attention_heads=2"
WIDE = """
import torch

def make():
    return torch.nn.LayerNorm(8).double().eval(), (torch.randn(2, 8, dtype=torch.float64),)
"""


def test_a_shape_that_the_model_does_not_have(run: Callable[..., Ran]) -> None:
    code, out, err = run("compile", SMALL, "--shape", "seq=100000", "--stage", "fused")
    assert code == FAILED and out == ""
    assert "100000 tokens, and the model has 512 positions" in err.splitlines()[-1]


def test_a_long_command_says_in_a_pipe_what_it_does(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbotx.cli.output.LATE_S", -1.0)
    ran = run("doctor", "--json")
    assert ran.json["ok"] and "after 0 s: compiler" in ran.err


def test_a_float64_model_is_said_to_be_measured_by_nothing(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "wide.py").write_text(WIDE)
    code, out, _ = run("verify", f"{tmp_path / 'wide.py'}:make")
    assert code == 0 and "n/a: of float64" in out


def test_a_loader_that_failed_is_the_users(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def make():\n    return None\n")
    code, _, err = run("verify", f"{tmp_path / 'broken.py'}:make")
    assert code == MISUSED and "of type NoneType" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise NameError('lost')", "NameError: lost"),
        ("raise SystemExit(7)", "SystemExit: 7"),
        ("def make(:", "SyntaxError"),
    ],
)
def test_a_module_that_fails_is_the_users(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"ugly_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    for model in (f"{name}:make", f"{tmp_path / name}.py:make"):
        code_, _, err = run("verify", model)
        assert code_ == MISUSED and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on device", "/disk/x"), "/disk/x: No space left on device"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: you tried to allocate 8589934592 bytes"),
            "8.0 GiB were asked for",
        ),
    ],
)  # fmt: skip
def test_what_the_machine_refuses_is_no_fault_of_turbotx(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: Any) -> int:
        raise error

    monkeypatch.setattr("turbotx.cli.doctor.doctor", fail)
    code, _, err = run("doctor")
    assert code == FAILED and said in err and err.count("\n") == 1
    assert said in run("doctor", "--json").json["error"]


def test_a_full_standard_output_is_a_line() -> None:
    command = f"{sys.executable} -m turbotx diff no.json no.json --json > /dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == MISUSED and done.stderr.startswith("error: ")


def test_a_fault_of_turbotx_is_told_from_a_mistake(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise KeyError("lost")

    monkeypatch.setattr("turbotx.cli.doctor.doctor", fail)
    code, out, err = run("doctor")
    assert code == INTERNAL and out == ""
    assert err.startswith("internal error: KeyError: 'lost'") and len(err.splitlines()) == 3
    assert "test_messages.py" in err and turbotx.__version__ in err and torch.__version__ in err
    assert run("doctor", "--json").json == {
        "error": "KeyError: 'lost'", "kind": "KeyError", "exit_code": INTERNAL,
        "versions": versions(),
    }  # fmt: skip
    monkeypatch.setenv("TURBOTX_TRACEBACK", "1")
    assert "Traceback" in run("doctor").err


def test_serve_names_the_extra_that_is_missing(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("server", "listener"):  # those that import it
        monkeypatch.delitem(sys.modules, f"turbotx.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ran = run("serve", "minilm")
    assert ran.code == 2 and "pip install 'turbotx[serve]'" in ran.err


def test_an_interrupt_is_no_fault(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("turbotx.cli.doctor.doctor", stop)
    assert run("doctor") == (130, "", "")


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["verify", "-h"], ["compil"]])
def test_help_and_mistyped_commands_load_no_framework(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom turbotx.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'triton', 'sympy', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m turbotx -h | head -n 1", shell=True, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.stdout and done.stderr == ""


class Choosing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if int(x.sum()) > 0 else x


class Odd(nn.Module):
    """Runs at one size only, which it does not say."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check(type(x.shape[0]) is int, lambda: "numbers only")
        return x


class Leaving(nn.Module):
    """Runs in PyTorch, and in no trace: its numbers leave PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.numpy().mean()


def small_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    model: nn.Module = transformers.BertModel(config).eval()
    return model


class Shortening(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda x, path: turbotx.optimize(None), "not None"),
        (lambda x, path: turbotx.optimize(x), "an nn.Module, an nn.Module class or a function"),
        (lambda x, path: turbotx.optimize(nn.Linear(3, 3), dtyp=1), "no option 'dtyp'"),
        (lambda x, path: turbotx.save(nn.Linear(3, 3).eval(), path), r"fast\(\*\*inputs\)"),
        (lambda x, path: turbotx.load(path), "no file"),
        (lambda x, path: turbotx.explain(nn.Linear(3, 3).eval()), "needs example inputs"),
        (
            lambda x, path: turbotx.optimize(nn.Linear(4, 3).eval())(x),
            r"do not fit the model.*input float32 \[2, 3\]",
        ),
        (
            lambda x, path: turbotx.optimize(nn.Linear(3, 3).eval())(inpt=x),
            "keyword argument 'inpt'",
        ),
        (
            lambda x, path: turbotx.optimize(small_bert())(input=x.long()),
            "exactly one of input_ids",
        ),
        (
            lambda x, path: turbotx.optimize(small_bert())(input_ids=x.new_zeros(1, 32).long()),
            "32 tokens, and the model has 16 positions",
        ),
        (
            lambda x, path: turbotx.optimize(small_bert())(x.long(), attention_mask=x[:, 1:]),
            r"do not fit the model.*attention_mask float32 \[2, 2\]",
        ),
        (
            lambda x, path: turbotx.optimize(nn.Linear(3, 3).bfloat16().eval())(x),
            r"multiplies float32 by bfloat16.*input float32 \[2, 3\]",
        ),
        (lambda x, path: turbotx.optimize(Odd().eval())(x), "cannot be traced for others"),
        (lambda x, path: turbotx.optimize(Leaving().eval())(x), "If the plain model fails too"),
        (lambda x, path: turbotx.optimize(Choosing().eval())(x), 'backend="turbotx"'),
        (lambda x, path: turbotx.optimize(Shortening().eval())(x), 'backend="turbotx"'),
        (lambda x, path: turbotx.optimize(nn.Linear(3, 3).eval())("x"), "no tensor among"),
    ],
)
def test_a_wrong_call_says_what_to_do(
    call: Callable[[torch.Tensor, Path], Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(turbotx.TurbotxError, match=f"(?s){expected}"):
        call(torch.randn(2, 3), tmp_path / "model.ttx")


def test_a_wrong_call_is_said_once_and_by_turbotx_alone() -> None:
    """PyTorch's loggers, which tell of every trace that fails, stay silent meanwhile."""
    code = (
        "import torch, turbotx\n"
        "class Shortening(torch.nn.Module):\n"
        "    def forward(self, x): return torch.ops.aten.mm(x, x[x > 0].reshape(3, 3))\n"
        "for model in (torch.nn.Linear(4, 3), Shortening()):\n"
        "    try: turbotx.optimize(model.eval())(torch.randn(2, 3))\n"
        "    except turbotx.TurbotxError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout == ""


def test_torch_compile_of_an_optimized_model_is_said_to_run_without_turbotx() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    fast = turbotx.optimize(Doubling().eval())
    with pytest.warns(turbotx.errors.EagerWarning, match="code of Doubling itself"):
        torch.compile(fast, backend="eager", fullgraph=True)(torch.ones(2))
    torch._dynamo.reset()


def test_a_loaded_model_is_not_compiled_again(tmp_path: Path) -> None:
    fast = turbotx.optimize(nn.Linear(3, 3).eval())
    x = torch.randn(2, 3)
    fast(x)
    turbotx.save(fast, tmp_path / "model.ttx")
    loaded = turbotx.load(tmp_path / "model.ttx")
    for again in (turbotx.optimize, lambda m: turbotx.explain(m, x)):
        with pytest.raises(turbotx.TurbotxError, match="compiled already"):
            again(loaded)


def test_a_warning_is_one_line(run: Callable[..., Ran], tmp_path: Path) -> None:
    file, formatted = tmp_path / "warns.py", warnings.formatwarning
    file.write_text(
        "import sys, warnings\n"
        "sys.stderr.write(warnings.formatwarning('it is slow', UserWarning, 'w.py', 3, 'x()'))\n"
    )
    ran = run("compile", f"{file}:make", "--stage", "fused")
    assert ran.err.startswith("warning: it is slow\nerror: ")
    assert warnings.formatwarning is formatted
