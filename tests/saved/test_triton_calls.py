"""Packed calls and calls with a key/value cache from files for GPUs.

In: small models saved on a CPU for sm_90, cubins that name their jobs. Out: the model's own results
for any mixture, and eager's tokens; tables right at any sizes of steps; no Triton where they run.
"""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

import turbotx
from tests.engine.decoders import make, prompt
from tests.engine.test_packed import mask_of
from tests.runtime.cuda.test_packed_graphs import MASKS, check_masked, leaves, make_model
from tests.runtime.cuda.test_steps import make_small, new_cache, step
from tests.saved.stand_in_cubins import Cubins, run_fresh
from tests.saved.test_triton_variants import tables
from turbotx.engine.compiled import Compiled
from turbotx.engine.optimize import engine_of
from turbotx.runtime.cuda.runtime import LaunchKernels
from turbotx.saved.variants import check_table

# --- over tokens ---


def save_packed(family: str, path: Path, target: str = "sm_90") -> Any:
    model = make_model(family)
    fast = turbotx.optimize(model, padding="packed")
    leaves(fast.packed, input_ids=torch.tensor([7, 8, 9]), lengths=[2, 1])
    turbotx.save(fast, path, targets=[target])
    return model


def test_any_mixture_from_a_file(cubins: Cubins, path: Path) -> None:
    model = save_packed("bert", path)
    loaded = cubins.load(path)
    assert loaded.packs
    placed = len(cubins.device.placed)
    for kind, rows, width in MASKS[2:]:
        ids = torch.randint(5, 60, (len(rows), width))
        check_masked(model, loaded, ids, mask_of(kind, rows, width))
    lengths, flat = [5, 0, 9, 1], torch.randint(5, 60, (15,))
    for _ in range(2):
        hidden = leaves(loaded.packed, input_ids=flat, lengths=lengths)[0]
        for own, ids in zip(hidden.split(lengths), flat.split(lengths), strict=True):
            if ids.numel():
                alone = leaves(model, ids[None], torch.ones_like(ids)[None])[0][0]
                torch.testing.assert_close(own, alone, rtol=3e-5, atol=3e-5)
    stats = loaded.stats()
    assert stats["kernel_builds"] == 0 and 0 < stats["graph_captures"] <= 2
    assert len(cubins.device.placed) == placed


def test_both_programs_of_a_packed_call_share_the_calls(cubins: Cubins, path: Path) -> None:
    save_packed("bert", path)
    loaded = cubins.load(path)
    cubins.device.execute = lambda *given: None  # which program queues is all that is looked at
    few, many = loaded.programs()
    assert few.siblings == many.siblings == [few, many]
    for tokens in (3, 3000):
        leaves(loaded.packed, input_ids=torch.full((tokens,), 7), lengths=[1] * tokens)
    assert [program.plans for program in (few, many)] == [1, 1]
    assert len({program.graphs for program in (few, many)}) == 1


# --- with a cache ---


@pytest.mark.parametrize(("family", "beams"), [("llama", 3), ("t5", 1)])
def test_a_decoder_of_a_file_generates_eagers_tokens(
    family: str, beams: int, cubins: Cubins, path: Path
) -> None:
    model = make(family)
    fast = turbotx.optimize(model)
    given = {**prompt(family, 2, 6, 2), "do_sample": False}
    call = {**given, "num_beams": beams, "max_new_tokens": 4, "min_new_tokens": 4}
    fast.generate(**given, max_new_tokens=2, min_new_tokens=2)
    turbotx.save(fast, path, targets=["sm_90"])
    loaded = cubins.load(path)
    assert torch.equal(loaded.generate(**call), model.generate(**call))
    stats = loaded.stats()
    assert stats["kernel_builds"] == 0 and stats["graph_captures"] > 0
    launched = set(cubins.device.names("launch"))
    assert any(name.startswith("split_attention_float_8") for name in launched), launched


def test_one_graph_of_a_file_serves_every_length(cubins: Cubins, path: Path) -> None:
    model = make_small(dtype=torch.float32)
    fast = turbotx.optimize(model)
    step(fast, new_cache(model), 3, 9, 4)
    turbotx.save(fast, path, targets=["sm_90"])
    loaded = cubins.load(path)
    for _ in range(2):
        ours, theirs = new_cache(model), new_cache(model)
        for tokens in ((3, 9, 4), (5,), (6,), (7,)):
            torch.testing.assert_close(step(loaded, ours, *tokens), step(model, theirs, *tokens))
    assert loaded.stats()["graph_captures"] == 2  # prompts, steps


def compiled_steps(target: str, **sizes: Any) -> Compiled:
    model = make_small(**sizes)
    fast = turbotx.optimize(model)
    step(fast, new_cache(model), 3, 9, 4)
    steps = engine_of(fast).parts["steps"]
    (compiled,) = steps.variants()
    return steps.compile(compiled.captured, target)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float16), ("gpt2", torch.float32)], ids=str
)
def test_no_step_asks_for_more_than_the_table_has(family: str, dtype: torch.dtype) -> None:
    compiled = compiled_steps("sm_90", family=family, dtype=dtype)
    for kernels, found, table in tables(compiled):
        check_table(found, table, kernels.adapt, sizes_of_steps(kernels))


def sizes_of_steps(kernels: LaunchKernels) -> Iterator[Sequence[int]]:
    """Give sizes of few and many sequences, new tokens and keys."""
    draw, executable = random.Random(0), kernels.executable
    assert executable.gpu is not None and executable.gpu.cells is not None
    full = {*executable.gpu.cells.growing, *executable.gpu.cells.room}
    evaluate = executable.values.compile(executable.dims)
    for _ in range(400):
        batch, query = (int(2 ** draw.uniform(0, most)) for most in (10, 8))
        capacity = 64 * int(2 ** draw.uniform(0, 6))
        shape = [
            capacity if k in full else batch if k == 0 or "_d0" in name else query
            for k, name in enumerate(executable.dims)
        ]
        if executable.token_range is None or executable.token_range.holds(shape):
            yield evaluate(*shape)


FRESH = """
    import sys
    from contextlib import nullcontext
    sys.modules["triton"] = None
    import torch, turbotx
    DEVICE
    ids = torch.full((2, 4), 7)
    loaded = turbotx.load(PATH)
    call = dict(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False)
    made = loaded.generate(**call, max_new_tokens=6, min_new_tokens=6)
    assert made.shape == (2, 10) and loaded.stats()["kernel_builds"] == 0
    steps = [name for name in device.launched if name.startswith("split_attention_float_8")]
    print(device.graphs, bool(steps), sys.modules["triton"])
"""


def test_generating_needs_no_triton(cubins: Cubins, path: Path) -> None:
    fast = turbotx.optimize(make("gpt2"))
    fast.generate(**prompt("gpt2", 2, 4), do_sample=False, max_new_tokens=2)
    turbotx.save(fast, path, targets=["sm_90"])
    assert run_fresh(FRESH, path).split() == ["1", "True", "None"]


# --- on a device ---

GPU = """
    import sys, torch
    torch.zeros(1, device="cuda")
    sys.modules["triton"] = None
    import turbotx
    loaded = turbotx.load(PATH)
    given, expected = torch.load(PATH + ".pt")
    given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    for _ in range(3):
        made = RUN
        torch.testing.assert_close(made.cpu(), expected, rtol=2e-3, atol=2e-3)
    stats = loaded.stats()
    assert stats["graph_captures"] > 0 and stats["kernel_builds"] == 0, stats
"""
ON_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run_on_device(run: str, path: Path, given: Any, expected: torch.Tensor) -> None:
    torch.save((given, expected), f"{path}.pt")
    code = textwrap.dedent(GPU).replace("PATH", repr(str(path))).replace("RUN", run)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def this_target() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


@pytest.mark.gpu
@ON_DEVICE
def test_a_mixture_from_a_file_on_this_gpu(path: Path) -> None:
    model = save_packed("bert", path, this_target())
    lengths, flat = [40, 3, 1, 77], torch.randint(5, 60, (121,))
    alone = [leaves(model, x[None], torch.ones_like(x)[None])[0][0] for x in flat.split(lengths)]
    given = {"input_ids": flat, "lengths": lengths}
    run_on_device("loaded.packed(**given)['last_hidden_state']", path, given, torch.cat(alone))


@pytest.mark.gpu
@ON_DEVICE
def test_a_decoder_from_a_file_on_this_gpu(path: Path) -> None:
    model = make("llama")
    fast = turbotx.optimize(model)
    given = {**prompt("llama", 2, 6), "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = fast.generate(**given)
    turbotx.save(fast, path, targets=[this_target()])
    run_on_device("loaded.generate(**given)", path, given, expected)
