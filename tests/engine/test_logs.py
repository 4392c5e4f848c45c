"""TURBOTX_LOGS: names become loggers, and a name that is none is refused with the nearest."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from turbotx.engine.logs import TOPICS, read_logs, show_logs
from turbotx.errors import OptionsError

CODE = """
import torch, turbotx
fast = turbotx.optimize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).eval())
fast(torch.randn(2, 4))
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    for name in TOPICS:
        logger = logging.getLogger(f"turbotx.{name}")
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    show_logs.cache_clear()


def test_each_name_is_a_logger_and_is_turned_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOTX_LOGS", "capture, memory")
    read_logs()
    read_logs()
    handlers = {name: len(logging.getLogger(f"turbotx.{name}").handlers) for name in TOPICS}
    assert handlers == {name: int(name in ("capture", "memory")) for name in TOPICS}
    show_logs("all")
    assert all(logging.getLogger(f"turbotx.{name}").handlers for name in TOPICS)


def test_a_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionsError, match="did you mean 'fusion'"):
        show_logs("capture,fuson")
    with pytest.raises(OptionsError, match="write all, or capture, guards"):
        show_logs("1")
    assert not any(logging.getLogger(f"turbotx.{name}").handlers for name in TOPICS)


def test_what_a_process_shows() -> None:
    given = {**os.environ, "TURBOTX_LOGS": "capture,fusion,memory,build"}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    for said in (
        "turbotx.capture: captured Sequential over batch",
        "turbotx.fusion: fused_add_gelu: 2 ops in 1 kernel",
        "turbotx.memory: planned",
        "turbotx.build: ",
    ):
        assert said in done.stderr
