"""Templates specialized: to the text that is meant, and to what Triton makes of the template.

In: small functions, and the templates of the package with the flags of some kernels. Out: printed
statements; the same intermediate code of both, compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")

from turbotx.ir.matmul_kernels import AttentionKernel, ProductKernel
from turbotx.kernels.attention_jobs import attention_job, product_job
from turbotx.kernels.gemm_heuristics import gemm_job
from turbotx.kernels.job import Job
from turbotx.kernels.triton.attention import AttentionSchedule
from turbotx.kernels.triton.compiler import build
from turbotx.kernels.triton.gemm_template import GemmSchedule, GemmTemplate
from turbotx.kernels.triton.specialize import TEMPLATES, Flag, specialize, specialize_body

SMALL = '''
"""A template."""

import triton
import triton.language as tl

N = tl.constexpr(None)
KIND = tl.constexpr(None)
HALF = tl.constexpr(0.5)


@triton.jit
def load(ptr, at, ok):
    x = tl.load(ptr + at, mask=ok, other=0.0)
    if KIND == "double":
        # Twice of it.
        x = x * 2
    return x


@triton.jit
def add(x, y):
    """The sum of two."""
    x += y * (HALF * 4)
    return x


@triton.jit
def twice(x):
    y = x * 3
    z = y - x
    return z


@triton.jit
def both(x):
    x = twice(x)
    return x


@triton.jit
def kernel(x_ptr, y_ptr, out_ptr, size, TILE: tl.constexpr):
    n = tl.arange(0, TILE)
    ok = n < N if N != 64 else True
    end = size if KIND == "sized" else N

    # Both.
    x = load(x_ptr, n + 0, ok)
    if KIND == "double" or KIND == "sized":
        y = load(y_ptr, n, ok)
        x = add(x, y)
    for k in range(0, end, TILE):
        if k > 0:  # not the first
            tl.store(out_ptr + k, x)
'''


@pytest.fixture
def small(tmp_path: Path) -> str:
    (tmp_path / "small.py").write_text(SMALL)
    return str(tmp_path / "small")


def test_branches_are_decided_and_calls_written_out(small: str) -> None:
    text = specialize(
        small, "kernel", "made", ["x_ptr", "out_ptr", "TILE"], {"N": 64, "KIND": "plain"}
    )
    assert text == (
        "@triton.jit\n"
        "def made(\n    x_ptr,\n    out_ptr,\n    TILE: tl.constexpr,\n):\n"
        "    n = tl.arange(0, TILE)\n"
        "\n"
        "    # Both.\n"
        "    x = tl.load(x_ptr + n)\n"
        "    for k in range(0, 64, TILE):\n"
        "        if k > 0:  # not the first\n"
        "            tl.store(out_ptr + k, x)\n"
    )


def test_locals_of_a_second_call_are_told_apart(small: str) -> None:
    lines = specialize_body(small, "kernel", {"N": 40, "KIND": "double"})
    assert "\n".join(lines) == (
        "    n = tl.arange(0, TILE)\n"
        "    ok = n < 40\n"
        "\n"
        "    # Both.\n"
        "    x = tl.load(x_ptr + n, mask=ok, other=0.0)\n"
        "    # Twice of it.\n"
        "    x = x * 2\n"
        "    y = tl.load(y_ptr + n, mask=ok, other=0.0)\n"
        "    # Twice of it.\n"
        "    y = y * 2\n"
        "\n"
        "    # The sum of two.\n"
        "    x += y * 2.0\n"
        "    for k in range(0, 40, TILE):\n"
        "        if k > 0:  # not the first\n"
        "            tl.store(out_ptr + k, x)"
    )


def test_a_target_that_is_read_is_assigned_last(small: str) -> None:
    lines = specialize_body(small, "both", {"N": 1, "KIND": ""})
    assert lines == ["    y = x * 3", "    z = y - x", "    x = z", "    return x"]


def test_what_does_not_fit_is_refused(small: str) -> None:
    flags: dict[str, Flag] = {"N": 64, "KIND": "sized"}
    with pytest.raises(AssertionError, match="N"):
        specialize_body(small, "kernel", {"KIND": "plain"})
    with pytest.raises(AssertionError, match="M"):
        specialize_body(small, "kernel", flags | {"M": 1})
    with pytest.raises(AssertionError, match=r"made needs.*size"):
        specialize(small, "kernel", "made", ["x_ptr", "y_ptr", "out_ptr", "TILE"], flags)
    with pytest.raises(AssertionError):  # another order
        specialize(small, "kernel", "made", ["y_ptr", "x_ptr", "out_ptr", "size", "TILE"], flags)


# --- the templates of the package, as Triton itself reads them ---

IMPORT = r"^from turbotx\S+\.(\w+) import (?:\w.*|\([^)]*\))$"


def unspecialized(job: Job, file: str, function: str, flags: Mapping[str, Flag]) -> Job:
    """Return the job of a template as it is, its flags constants; what it is not given is None."""
    source = (TEMPLATES / f"{file}.py").read_text()
    for name, value in flags.items():
        own = isinstance(value, str) and value.startswith("tl.")
        text = value if own else f"tl.constexpr({value!r})"
        source, count = re.subn(rf"^{name} = tl\.constexpr\(None\)", f"{name} = {text}", source,
                                flags=re.MULTILINE)  # fmt: skip
        assert count == 1
    source = with_definitions(source)
    head = re.search(rf"^def {function}\(([^)]*)\):", source, re.MULTILINE)
    assert head is not None
    given = dict(job.signature)
    names = re.findall(r"(\w+)(?:: tl\.constexpr)?,", head[1])
    kinds = tuple((name, given.get(name, "constexpr")) for name in names)
    absent = tuple((name, None) for name in names if name not in given)
    return replace(
        job, name=function, source=source, signature=kinds, constexprs=job.constexprs + absent
    )


def with_definitions(source: str) -> str:
    """Return a template with the functions of other files in the places of their imports."""

    def define(found: re.Match[str]) -> str:
        head, *body = (TEMPLATES / f"{found[1]}.py").read_text().partition("@triton.jit")
        imports = [m[0] for m in re.finditer(IMPORT, head, re.MULTILINE)]
        return with_definitions("\n".join(imports)) + "\n" + "".join(body)

    return re.sub(IMPORT, define, source, flags=re.MULTILINE)


def operations(ttir: str, name: str) -> list[str]:
    """Return a module's lines, constants in place, less places in the source and values' names."""
    lines = [re.sub(r" loc\(.*", "", line) for line in ttir.splitlines()]
    text = "\n".join(line for line in lines if not line.startswith("#"))
    named: dict[str, str] = {}
    for value, constant in re.findall(r"^ *(%\w+) = arith\.constant (.*)$", text, re.MULTILINE):
        named[value] = f"({constant})"
    text = re.sub(r"^ *%\w+ = arith\.constant .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"%\w+", lambda m: named.setdefault(m[0], f"%{len(named)}"), text)
    return text.replace(f"@{name}(", "@kernel(").splitlines()


def check(make: Callable[[], Job], module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def recorded(file: str, function: str, name: str, arguments: Any, flags: Any) -> str:
        seen.update(file=file, function=function, flags=flags)
        return specialize(file, function, name, arguments, flags)

    monkeypatch.setattr(f"turbotx.kernels.triton.{module}.specialize", recorded)
    job = make()
    ours, tritons = build([job, unspecialized(job, **seen)], workers=1, measure=False)
    assert operations(ours.files["ttir"].read_text(), job.name) == operations(
        tritons.files["ttir"].read_text(), seen["function"]
    )


@pytest.mark.parametrize("which", ["scores", "values"])
def test_products(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    product = ProductKernel(which, torch.float16, 80)
    check(lambda: product_job(product, "sm_90"), "products", monkeypatch)


@pytest.mark.parametrize(
    "case",
    [
        AttentionKernel(torch.float16, 64, 0.125, True, keys="mask", blind_nan=True),
        AttentionKernel(torch.float32, 20, 0.2, False, "float32", "lengths", (3, 2), softcap=5.0),
        AttentionKernel(torch.float16, 64, 0.125, True, late=True, cached=True),
    ],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("once", [0, 1])
def test_attention(case: AttentionKernel, once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = AttentionSchedule(16, 32, once=once)
    check(lambda: attention_job(case, "sm_90", tiles), "attention", monkeypatch)


FULL = {"residual": True, "residual_norm": "layer", "stats": True}


@pytest.mark.parametrize(
    ("template", "schedule"),
    [
        (GemmTemplate(torch.float16, 768, 768, True, **FULL), GemmSchedule(16, 32, 64, splits=2)),
        (
            GemmTemplate(torch.float32, 40, 70, gated=True, activation="silu", norm="layer"),
            GemmSchedule(16, 16, 16, late=0),
        ),
        (
            GemmTemplate(torch.bfloat16, 72, 64, True, "gelu", norm="layer", flipped=True),
            GemmSchedule(16, 32, 32, stat_tile=32),
        ),
    ],
)
def test_gemms(
    template: GemmTemplate, schedule: GemmSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(lambda: gemm_job(template, "sm_90", schedule), "gemm", monkeypatch)
