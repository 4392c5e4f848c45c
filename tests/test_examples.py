"""The examples run as a newcomer runs them, and fail where they should.

In: examples/*.py. Out: their exit codes; the demo's own checks, on inputs that must break them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # as a script sees the files beside it
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load(EXAMPLES / "demo.py")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    pytest.importorskip("transformers")
    return load(ROOT / "docs" / "generate.py")


class Double(nn.Module):
    """Looks like an encoder to the demo: an embedding's rows, doubled, off by `error`."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.table, self.error = nn.Embedding(10, 4), error

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        class Output:
            last_hidden_state = self.table(input_ids) * 2 + self.error

        return Output


def compare(demo: ModuleType, error: float) -> bool:
    model, wrong = Double(0.0).eval(), Double(error).eval()
    wrong.table = model.table
    ids = torch.arange(6).reshape(2, 3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return bool(demo.compare(model, wrong, [batch])["agrees"])


def test_the_demo_accepts_equal_outputs(demo: ModuleType) -> None:
    assert compare(demo, 0.0)


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_the_demo_notices_wrong_outputs(demo: ModuleType, error: float) -> None:
    assert not compare(demo, error)


def test_a_pooled_sentence_does_not_see_its_padding(demo: ModuleType) -> None:
    hidden = torch.randn(1, 4, 8)
    short = demo.pool_mean(hidden[:, :2], torch.ones(1, 2))
    padded = demo.pool_mean(hidden, torch.tensor([[1, 1, 0, 0]]))
    torch.testing.assert_close(short, padded)


def test_the_demo_runs(minilm_path: Path, tmp_path: Path) -> None:
    options = ("--out", str(tmp_path / "out"), "--seconds", "0")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py"), *options],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "holds" in done.stdout and "captures: 1" in done.stdout
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_reference_is_what_the_script_makes() -> None:
    made = runpy.run_path(str(ROOT / "docs/api_page.py"))["make_page"]()
    assert (ROOT / "docs/api.md").read_text() == made, "run python docs/api_page.py"


def test_tables_and_plots_are_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    for page, made in runpy.run_path(str(ROOT / "docs/generate.py"))["pages"]().items():
        assert page.read_text() == made, f"run python docs/generate.py: {page.name}"
    plot = runpy.run_path(str(ROOT / "docs/latency_plot.py"))
    source = plot["drawn_from"](ROOT / "benchmarks/results")
    assert source in (ROOT / "docs/images/latency.svg").read_text(), "run python docs/generate.py"


def test_the_page_about_fusion_says_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "fusion.md").read_text(), re.S)
    scope: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "fusion.md", "exec"), scope)
    told = re.findall(r"print\(.*\)  # (.*)", "".join(blocks))
    printed = capsys.readouterr().out.splitlines()
    for line, words in zip(printed, told, strict=True):
        pattern = ".*".join(re.escape(part.strip()) for part in words.split("..."))
        assert re.fullmatch(pattern, line), (line, words)


PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """Sources by the end of their path, perhaps with a pattern for some of them."""
    known = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in re.findall(r"`([\w./*-]+\.(?:py|cpp|h|js))`", (ROOT / page).read_text()):
        pattern = re.escape(name).replace(r"\*", "[^/]*")
        found = re.search(rf"(^|/){pattern}$", known.stdout, re.M)
        assert found or name.startswith("kernels-"), f"{page} names {name}"  # inside a saved file


def test_results_say_what_is_not_measured(generate: ModuleType, tmp_path: Path) -> None:
    nothing = generate.results_table(tmp_path)
    assert nothing.count("not yet measured") == nothing.count("\n") - 1
    engines = {
        name: {"median_us": us}
        for name, us in (("turbotx", 5.0), ("sdpa", 15.0), ("bmm+softmax+bmm", 10.0))
    }
    machine = {"device": "a processor", "threads": 2}
    found = {"attention": {"machine": machine, "rows": [{"engines": engines}]}}
    (tmp_path / "cpu_kernels.json").write_text(json.dumps(found))
    assert "2.00 x the speed of the fastest" in generate.results_table(tmp_path)


def test_latency_shows_the_rows_that_turbotx_loses(generate: ModuleType, tmp_path: Path) -> None:
    assert "not yet" in generate.latency_table(tmp_path)
    engines = {"turbotx": 4.0, "eager": 3.0, "floor-mkl": 2.0}
    row = {
        "model": "small", "dtype": "float32", "shape": "1x10", "failed": {"compile": "no memory"},
        "engines": {e: {"median_ms": t, "others_cores": 0.0} for e, t in engines.items()},
    }  # fmt: skip
    machine = {"device": "a CPU", "threads": 1, "versions": {"torch": "2"}}
    (tmp_path / "latency.json").write_text(json.dumps({"machine": machine, "rows": [row]}))
    table = generate.latency_table(tmp_path)
    assert "| small | float32 | 1 x 10 | 4.00 | 2.00 | **3.00** | 2.00 |" in table
    assert "Without torch.compile in float32: no memory." in table


def test_the_table_replaces_the_last_one(generate: ModuleType) -> None:
    text = f"a\n{generate.BEGIN}\nold\n{generate.END}\nb\n"
    once = generate.write_between(text, "new")
    assert once == generate.write_between(once, "new") == text.replace("old", "new")


def test_the_architectures_say_what_split_and_what_failed(
    generate: ModuleType, tmp_path: Path
) -> None:
    assert generate.architectures_table(tmp_path) == generate.NOT_YET
    row = {"batch": 2, "seq": 17, "eager": 1e-6, "turbotx": 2e-6, "passes": False}
    model = {
        "architecture": "bert", "dtype": "float32", "rows": [row], "split": ["one", "two"],
        "layer": {"kernel": 3, "gemm": 4, "attention": 1}, "externs": {"aten.x": "no row"},
    }  # fmt: skip
    record = {"device": "a machine", "versions": {"torch": "2.11"}, "models": [model]}
    (tmp_path / "architectures.json").write_text(json.dumps(record))
    table = generate.architectures_table(tmp_path)
    assert "| 1.0e-06 | 2.0e-06 **breaks the rule** |" in table
    assert "| 8: 4 GEMMs, 1 attention, 3 fused | (1), (2) | `aten.x`: no row |" in table
    assert table.endswith("(1) one\n(2) two") and "2 x 17; torch 2.11; a machine" in table


def test_the_picture_shows_a_layer(generate: ModuleType) -> None:
    picture = generate.draw_layer(generate.explain_bert(1), "encoder.layer.0")
    assert "7 launches" in picture and "attention_0" in picture
