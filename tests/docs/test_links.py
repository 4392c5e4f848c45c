"""Links of README and docs lead somewhere, and the files that they name are in the tree."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from tests.docs.snippets import PAGES, ROOT

FOLDERS = ("turbotx", "tests", "benchmarks", "examples", "docs")


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def dangling(page: str, text: str) -> list[str]:
    """Return the relative links of a text that lead to no file, or to no heading of one."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(link)
    return found


def absent(text: str) -> list[str]:
    """Return the sources in backticks that end no path of the tree."""
    names = re.findall(r"`([^`\s]+\.(?:py|h|js))`", text)
    return [n for n in names if not any(fnmatch(file, f"*/{n}") for file in sources())]


@cache
def sources() -> list[str]:
    return [str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_files(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not dangling(page, text) and not absent(text)


def test_what_is_missing_is_found() -> None:
    links = "[a](gpu.md) [b](gpu.md#results) [c](gpu.md#result) [d](none.md) [e](#f)"
    assert dangling("docs/README.md", links) == ["gpu.md#result", "none.md", "#f"]
    assert absent("`memory/pool.py`, `memory/pools.py`, `examples/*.py`") == ["memory/pools.py"]
