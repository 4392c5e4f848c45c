"""A process that compiles Triton kernels for any GPU, on a machine that need not have one.

In: one JSON job a line on standard input: `path` of a source file, `name` of its function,
`signature`, `constexprs`, `divisible` arguments, `target`, `options`, and `out`, a folder. Out:
the artifacts in that folder, and one JSON line for each job: its metadata, or its error::

    python worker.py < jobs > results

It runs by itself, and imports nothing of turbotx, so that many can start quickly.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

ARTIFACTS = ("ttir", "ttgir", "ptx", "amdgcn", "cubin", "hsaco")


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one job and write its artifacts; return the metadata that no artifact holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location(Path(job["path"]).stem, job["path"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, job["name"])
    divisible = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function,
        signature=job["signature"],
        constexprs=job["constexprs"],
        attrs={(function.arg_names.index(a),): divisible for a in job["divisible"]},
    )
    built = triton.compile(source, target=GPUTarget(*job["target"]), options=job["options"])
    for kind in ARTIFACTS:
        if kind in built.asm:
            content = built.asm[kind]
            data = content if isinstance(content, bytes) else content.encode()
            (Path(job["out"]) / f"{job['name']}.{kind}").write_bytes(data)
    scratch = ("global_scratch_size", "profile_scratch_size")  # not every backend has them
    return {
        "shared_nbytes": built.metadata.shared,
        "scratch_nbytes": sum(getattr(built.metadata, name, 0) or 0 for name in scratch),
    }


def main() -> None:
    """Read jobs from standard input, a line of JSON each; answer each by a line of JSON."""
    # Beside this file lie modules of turbotx whose names must not hide others.
    own = str(Path(__file__).parent)
    sys.path[:] = [p for p in sys.path if p != own]
    sys.dont_write_bytecode = True  # sources lie among what they are built into
    results = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        try:
            answer = compile_job(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc(limit=-4)}
        results.write(json.dumps(answer) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
