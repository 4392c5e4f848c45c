"""The reference of what is public in Python, from its docstrings.

In: turbotx itself. Out: docs/api.md, made anew::

    python docs/api_page.py
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import turbotx
from turbotx import errors
from turbotx.engine.drop_in import OptimizedModule
from turbotx.options import Options
from turbotx.report import Report
from turbotx.saved.load import SavedModule

PAGE = Path(__file__).parent / "api.md"
METHODS: dict[type, tuple[str, ...]] = {
    OptimizedModule: ("packed", "stats", "reserve", "refresh"),
    SavedModule: ("packed", "generate", "stats", "refresh"),
    Report: (
        "at", "where", "source_nodes", "numerics", "stress", "profile", "with_findings", "to_dict",
        "to_html", "dump",
    ),
}  # fmt: skip


def make_page() -> str:
    """Return the page: functions, then classes, then errors, each as its docstring has it."""
    parts = [
        "# Reference of the Python interface",
        "Made by `docs/api_page.py` from docstrings. What is not on this page is not public.",
        "## Functions",
    ]
    classes = {"OptimizedModule", "TurbotxError"}
    for name in sorted(set(turbotx.__all__) - {*classes, "__version__"}):
        parts += _function(f"turbotx.{name}", getattr(turbotx, name))
    parts += ["`turbotx.__version__` is the version as a string.", "## Options of `optimize`"]
    parts += [_text(Options)]
    for cls, names in METHODS.items():
        parts += [f"## {cls.__name__}", _text(cls)]
        for name in names:
            parts += _function(name, getattr(cls, name))
    parts += ["## Errors and warnings"]
    kinds = [x for x in vars(errors).values() if getattr(x, "__module__", "") == errors.__name__]
    kinds = [x for x in kinds if inspect.isclass(x)]
    for kind in kinds:
        bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        parts.append(f"**{kind.__name__}**, of {bases}: {_text(kind)}")
    return "\n\n".join(parts) + "\n"


def _function(shown: str, function: Any) -> Iterator[str]:
    signature = str(inspect.signature(function)).replace("'", "")
    for spelled in ("typing.", "collections.abc.", "turbotx.report.report."):
        signature = signature.replace(spelled, "")
    yield f"### `{shown}`"
    yield f"```\n{textwrap.fill(shown + signature, 96, subsequent_indent='    ')}\n```"
    yield _text(function)


def _text(thing: Any) -> str:
    """Return a docstring as Markdown: its indented paragraphs are lists of names."""
    found = inspect.getdoc(thing) or ""
    paragraphs = [" ".join(p.split()) if "\n    " not in p else p for p in found.split("\n\n")]
    return "\n\n".join(f"```\n{p}\n```" if "\n    " in p else p for p in paragraphs)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
