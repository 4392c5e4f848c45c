r"""The device functions of templates/functions.py, as text that kernels take along.

In: a kernel's source. Out: the functions that it calls, so that each printed file stands alone and
imports nothing but Triton, for example::

    functions_in("y = tanh(x)")  ->  ["@triton.jit\ndef tanh(x): ..."]
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from turbotx.kernels.triton.specialize import TEMPLATES

# By name, as they are written in templates/functions.py.
FUNCTIONS = {
    text.removeprefix("def ").partition("(")[0]: "@triton.jit\n" + text.rstrip() + "\n"
    for text in (TEMPLATES / "functions.py").read_text().split("@triton.jit\n")[1:]
}


def variant(name: str, dtype: torch.dtype) -> str:
    """Return the name of the function that does `name` for values of `dtype`."""
    if dtype is torch.float64 and f"{name}_float64" in FUNCTIONS:
        return f"{name}_float64"
    return f"{name}_int" if not dtype.is_floating_point and f"{name}_int" in FUNCTIONS else name


def functions_in(text: str) -> list[str]:
    """Return the texts of the functions that `text` calls, each after those that it needs."""
    found: dict[str, str] = {}

    def visit(caller: str, after: str) -> None:
        called = set(re.findall(rf"(?<![\w.])(\w+){after}", caller))
        for name, body in FUNCTIONS.items():
            if name in called and name not in found:
                visit(body.split(":", 1)[1], after=r"\(")
                found[name] = body

    visit(text, after=r"\b")  # a reduction is given its function by name alone
    return list(found.values())


def stand_alone(header: Iterable[str], main: str) -> str:
    """Return a file: `header` as a comment, imports, the functions that `main` calls, `main`."""
    said = [f"# {line}" for line in header]
    imports = ["import triton", "import triton.language as tl"]
    imports += ["from triton.language.extra import libdevice"] * ("libdevice." in main)
    return "\n\n".join(["\n".join([*said, *imports, ""]), *functions_in(main), main])
