"""Snippets: what README and docs tell a reader to run, as it stands there.

In: a page's text. Out: its blocks of Python and its lines of shell, in order, for example::

    commands("README.md")  ->  ["pip install .", "make demo", "turbotx compile minilm ...", ...]
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
_SHELL = re.compile(r"(?:[A-Z_]+=\S+ )*(?:turbotx|python|make|pip|curl|bash|uvicorn|docker) ")


def python_blocks(page: str) -> list[str]:
    """Return a page's fenced blocks of Python."""
    text = (ROOT / page).read_text()
    return [code for language, code in _FENCE.findall(text) if language == "python"]


def commands(page: str) -> list[str]:
    """Return a page's commands, of indented lines and of fenced blocks of shell, less comments."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / page).read_text())  # a line that goes on
    lines = []
    for language, block in _FENCE.findall(text):
        lines += block.splitlines() if language in ("", "sh") else []
    rest = _FENCE.sub("", text)
    lines += [line[4:] for line in rest.splitlines() if line.startswith("    ")]
    return [shlex.join(shlex.split(x, comments=True)) for x in lines if _SHELL.match(x)]
