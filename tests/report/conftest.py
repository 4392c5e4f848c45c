"""Fixtures of the page's tests: one browser a file, one report of a small BERT, and a page of any.

In: nothing. Out: `open_page(report)`, a page that fails the test where it logs an error or asks for
anything over a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import turbotx
from tests.report.browser import Open, start_browser
from turbotx.kernels.triton.resources import Resources
from turbotx.report import Report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report() -> Report:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.arange(14).reshape(2, 7)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = turbotx.explain(turbotx.optimize(model, backend="aten", epilogues=False), **batch)
    used = {k.name: {"sm_90": Resources(40, 2, 1024, 128, 64, 333)} for k in made.kernels}
    return made.with_findings(
        numerics=made.numerics(model, **batch),
        profile=made.profile(**batch, runs=1),
        resources=used,
    )


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    def opened(report: Report) -> Any:
        path = tmp_path / "report.html"
        path.write_text(report.to_html(), encoding="utf-8")
        browser.get(path.as_uri())
        return browser

    yield opened
    # The fixture looks at every page that a test has used.
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry["message"] for entry in browser.get_log("browser")] == []
