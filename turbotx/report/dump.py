"""Dump: writes a report to files, for editors, browsers and debuggers.

In: a `Report` and a folder. Out: the files written, in order::

    dump(report, Path("out"))  ->  Dumped(folder, files=[captured.txt, fused.txt, ...])
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from turbotx.engine.fused_graph import readable
from turbotx.errors import DumpError
from turbotx.memory.planner.svg import plan_to_svg
from turbotx.report.draw import draw_dot, draw_svg
from turbotx.report.html import render_page
from turbotx.report.layers import find_layers, plan_of
from turbotx.report.record import Record

SUFFIX = {"cpp": "cpp", "triton": "triton.py"}


@dataclass
class Dumped:
    """The files written by a dump, in order."""

    folder: Path
    files: list[Path] = field(default_factory=list)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents and return it; raise DumpError if a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DumpError(f"cannot write to {folder}: there is a file of that name") from error
    except OSError as error:
        raise DumpError(f"cannot write to {folder}: {error.strerror}") from error
    return folder


def check_file(path: Path | None) -> None:
    """Raise DumpError for a file that cannot be written, before anything is computed for it."""
    if path is None:
        return
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        kind = "a folder" if path.is_dir() else "no folder to write to"
        raise DumpError(f"cannot write {path}: {path if path.is_dir() else folder} is {kind}")


def write_text(path: Path, text: str) -> None:
    """Write a file; raise DumpError that names it."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DumpError(f"cannot write {path}: {error.strerror}") from error


def dump(report: Record, folder: Path) -> Dumped:
    """Write every stage of a report into `folder`.

    Overwrites files of an earlier dump. Raises DumpError if the folder cannot be created.
    """
    dumped = Dumped(make_folder(folder))
    make_folder(folder / "kernels")
    for name, text in _texts(report):
        path = folder / name
        write_text(path, text)
        dumped.files.append(path)
    return dumped


STAGES = {
    "captured": "captured.txt",
    "fused": "fused.txt",
    "triton": ".triton.py",
    "cpp": ".cpp",
    "memory": "memory_plan.json",
    "report": "report.json",
}
"""The stages that are text, by the names of their files."""


def stage_text(report: Record, stage: str) -> str:
    """Return one stage as text: the file of a dump, or the concatenated sources of all kernels."""
    found = [text for name, text in _texts(report) if name.endswith(STAGES[stage])]
    return "\n".join(readable_text(text) for text in found)


def _texts(report: Record) -> Iterator[tuple[str, str]]:
    yield "captured.txt", readable_text(report.compiled.unbound.call.text)
    yield "fused.txt", fused_text(report)
    yield "fused.dot", draw_dot(report)
    yield "fused.svg", draw_svg(report)
    for kernel in report.kernels:
        for target, text in kernel.sources.items():
            yield f"kernels/{kernel.name}.{SUFFIX[target]}", text
    plan = plan_of(report.memory)
    yield "memory_plan.json", json.dumps(plan.to_dict(), indent=1) + "\n"
    yield "memory_plan.svg", plan_to_svg(plan, find_layers(report))
    yield "report.json", json.dumps(report.to_dict(), indent=1) + "\n"
    yield "report.html", render_page(report)


def readable_text(text: str) -> str:
    """Return the text with a newline at the end."""
    return text if text.endswith("\n") else text + "\n"


def fused_text(report: Record) -> str:
    """Return the fused graph, then the ops of every kind of region and the kernels it became."""
    parts = [readable(report.graph.graph)]
    seen: set[tuple[str, ...]] = set()
    signatures = {k.name: k.signature for k in report.kernels}
    for region in report.regions:
        if (*region.ops, *region.kernels) in seen:
            continue
        seen.add((*region.ops, *region.kernels))
        inner = report.graph.get_submodule(region.name)
        assert isinstance(inner, fx.GraphModule)
        parts.append(f"\n{region.name}: {readable(inner.graph)}")
        parts += [f"\nbecame {signatures[k]}" for k in region.kernels if k in signatures]
        if region.reason:
            parts.append(f"\nbecause {region.reason}")
    return "\n".join(parts) + "\n"
