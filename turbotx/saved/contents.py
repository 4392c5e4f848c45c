"""Contents: what a saved file holds, as readable files; nothing is loaded for execution.

In: a file of `turbotx.save`, sizes by name. Out: contents by file name: its manifest, its programs
as lists of launches, their memory plans at these sizes, sources of kernels, and cubins::

    read_contents(Path("model.ttx"), {"seq": 40})
      ->  {"programs.txt": b"...", "kernels/sm_90/gelu.cubin": b"...", ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbotx.memory.planner.plan import Plan
from turbotx.program.executable import CalledLaunch, Executable, NativeLaunch
from turbotx.saved.call_table import show_call
from turbotx.saved.codec import decode_program
from turbotx.saved.container import read_container
from turbotx.saved.example import example_dims
from turbotx.saved.gpu_kernels import variants_entry
from turbotx.saved.places import CPU


def read_contents(path: Path, sizes: Mapping[str, int]) -> dict[str, bytes]:
    """Return the files by name.

    Raises SavedFileError for an incomplete file, InputError for a dim that no program has.
    """
    manifest, entries = read_container(path)
    facts = {k: v for k, v in manifest.items() if k != "entries"}
    files, texts = {"manifest.json": _json(facts)}, []
    programs = [(x, decode_program(x, CPU)[0]) for x in json.loads(entries["programs.json"])]
    example_dims({name for _, executable in programs for name in executable.dims}, sizes)
    for number, (tables, executable) in enumerate(programs):
        own = {k: v for k, v in sizes.items() if k in executable.dims}
        dims = example_dims(executable.dims, own)
        plan = _plan(executable, dims)
        files[f"memory_plan_{number}.json"] = _json(plan.to_dict())
        head = f"program {number}, for {tables['target']}: {show_call(tables['call'])}"
        texts.append(f"{head}\n{_show(executable, dims, plan)}")
    files["programs.txt"] = "\n".join(texts).encode()
    files |= {f"kernels/{name}": text for name, text in entries.items() if name.endswith(".cpp")}
    for target in manifest["targets"]:
        for one in json.loads(entries.get(variants_entry(target), b"[]")):
            name = one.get("cubin")  # without one, it is compiled when needed
            if name is not None:
                files[f"kernels/{target}/{one['name']}-{Path(name).stem[:8]}.cubin"] = entries[name]
    return files


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _plan(executable: Executable, dims: Mapping[str, int]) -> Plan:
    memory = executable.memory
    class_nbytes = memory.class_nbytes.compile(executable.dims)(*dims.values())
    return memory.restore_planner().plan(class_nbytes)


def _show(executable: Executable, dims: Mapping[str, int], plan: Plan) -> str:
    """Return a program as text: its sizes, its memory, and one line per launch."""
    shown = ", ".join(f"{name}={size}" for name, size in dims.items())
    lines = [
        f"{len(executable.launches)} launches; {len(plan.placements)} buffers in "
        f"{plan.peak_nbytes} bytes at {shown or 'its only sizes'}"
    ]
    for k, launch in enumerate(executable.launches):
        what = "through PyTorch" if isinstance(launch, CalledLaunch) else "kernel"
        if isinstance(launch, NativeLaunch):
            what = f"{launch.library}: {launch.symbol}"
        lines.append(f"{k:5}  {launch.name}  {what}  writes {', '.join(launch.writes)}")
    return "\n".join(lines) + "\n"
