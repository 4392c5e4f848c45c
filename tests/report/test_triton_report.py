"""Reports of GPU programs over tokens, and of a decoder's steps: explained, verified, profiled.

In: small models on a device that runs kernels in Triton's interpreter. Out: launches that hold
against float64 one by one, a time for each, a page.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")
pytest.importorskip("transformers")

import turbotx
from tests.engine.test_packed import mask_of
from tests.runtime.cuda.stand_in_device import InterpretedDevice, bind_to
from tests.runtime.cuda.test_packed_graphs import make_model
from tests.runtime.cuda.test_steps import make_small, new_cache, step
from turbotx.report.report import Report


def look(fast: Any, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Report:
    """Return a report that was verified, profiled and drawn."""
    monkeypatch.setattr("turbotx.report.profile.WARM_UP", 1)
    report = turbotx.explain(fast, **call)
    assert report.target == "sm_90"
    numerics = report.numerics(fast, **call)
    assert numerics.holds and numerics.outputs, numerics
    found = report.profile(runs=1, **call)
    assert [t.launch for t in found.launches] == list(report.launches)
    page = report.with_findings(profile=found, numerics=numerics).to_html()
    assert report.launches[0].name in page
    return report


def test_a_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = bind_to(InterpretedDevice(), make_model("bert"), monkeypatch, padding="packed")
    call = {
        "input_ids": torch.randint(5, 60, (3, 9)),
        "attention_mask": mask_of("right", [9, 1, 4], 9),
    }
    report = look(fast, call, monkeypatch)
    assert (report.dims["batch"], report.dims["seq"], report.dims["tokens"]) == (3, 9, 14)
    assert any("packed_attention" in x.name for x in report.launches)


def test_the_program_that_a_mixture_runs_is_the_one_that_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounded up, tokens may belong to the other program, of more launches."""
    fast = bind_to(InterpretedDevice(), make_model("bert"), monkeypatch, padding="packed")
    monkeypatch.setattr("turbotx.runtime.cuda.packed_graphs.room_for", lambda tokens: 4096)
    call = {
        "input_ids": torch.full((2, 5), 7),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
    }
    report = turbotx.explain(fast, **call)
    first, second = report.compiled.programs
    assert report.compiled.program is (first if first.serves((2, 5, 2, 4096)) else second)
    assert report.numerics(fast, **call).holds


def test_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_small("llama")
    fast, cache = bind_to(InterpretedDevice(), model, monkeypatch), new_cache(model)
    for tokens in ((3, 9, 4), (5,)):
        step(fast, cache, *tokens)
    call = {"input_ids": torch.tensor([[6]]), "past_key_values": cache, "use_cache": True}
    report = look(fast, call, monkeypatch)
    assert report.dims["length"] == 5 and cache.get_seq_length() == 4
    stored = [x for x in report.launches if "attention" in x.name]
    assert len(stored) == 1 and "kv_memory" in stored[0].writes
    assert stored[0].traffic.written_nbytes > 2 * 16 * 4  # the new rows, and what attention gives
    # A block, and no contiguous copy of it, which the stats would count.
    assert report.cache is not None
    assert report.cache.nbytes == 64 * report.cache.token_nbytes
    assert fast.stats()["cache_peak_nbytes"] == report.cache.nbytes
