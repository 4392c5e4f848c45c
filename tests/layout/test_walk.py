"""The way of a call: few folders, none entered again from below, and the hot path fewer."""

from __future__ import annotations

import torch

import turbotx
from tests.layout.walk import as_tree, block, entered_again, ways_down

HOOKS = {
    ("capture", "size_operators.py"),  # Python's: `isinstance` of a symbolic size
    ("capture", "module_state/values.py"),
    ("capture", "tracing.py"),  # PyTorch's, for the modes of an export
}
"""Entered from below, though nothing there calls it: Python does, during a trace."""


def test_a_call_goes_through_few_folders() -> None:
    fast = turbotx.optimize(block)
    x, weight = torch.randn(2, 5, 16), torch.randn(16, 16)
    first = ways_down(lambda: fast(x, weight))
    folders = {way[-1] for way in first}
    assert {"engine", "capture", "passes", "kernels", "memory", "program", "runtime"} <= folders
    assert not {"report", "saved", "serving", "cli"} & folders
    assert len([folder for folder in folders if "." not in folder]) <= 10, folders
    again = {(way[-1], file) for way, files in entered_again(first).items() for file in files}
    assert again <= HOOKS, again - HOOKS
    second = ways_down(lambda: fast(x, weight))
    assert {way[-1] for way in second} <= {"engine", "capture", "runtime", "memory"}, second
    assert not entered_again(second)


def test_a_folder_entered_again_is_found() -> None:
    ways = {("engine",): ["a.py"], ("engine", "ir", "engine"): ["b.py"], ("engine", "ops"): []}
    assert entered_again(ways) == {("engine", "ir", "engine"): ["b.py"]}
    tree = [("engine",), ("engine", "ir"), ("engine", "ir", "engine"), ("engine", "ops")]
    assert as_tree(ways) == tree
