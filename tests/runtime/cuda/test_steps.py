"""Decoding with a key/value cache as GPU programs, every kernel in Triton's interpreter.

In: tiny decoders, prompts with left padding, tokens by greedy choice and by beams. Out: eager's
tokens, by graphs that serve every length within a cache's room, and caches that lie elsewhere.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux only")
pytest.importorskip("transformers")

import transformers

from tests.engine.decoders import VOCABULARY, make, prompt
from tests.models import assert_as_exact_as_eager, in_double
from tests.runtime.cuda.stand_in_device import InterpretedDevice, RecordingDevice, bind_to
from turbotx.engine.optimize import engine_of
from turbotx.errors import CacheFullError, DeviceError, EagerWarning


@pytest.fixture(autouse=True)
def nothing_runs_in_pytorch() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerWarning)
        yield


def make_small(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A decoder of one layer."""
    config = copy.deepcopy(make(family).config)
    config.num_hidden_layers, config.layer_types = 1, None
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 1
    return model


def new_cache(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


@torch.no_grad()
def step(run: Any, cache: Any, *tokens: int, batch: int = 1, **rest: Any) -> torch.Tensor:
    """Return the logits behind tokens, which are the same in every row."""
    ids = torch.tensor([tokens]).expand(batch, -1).contiguous()
    made: torch.Tensor = run(input_ids=ids, past_key_values=cache, use_cache=True, **rest).logits
    return made


@pytest.mark.parametrize(("family", "beams"), [("gpt2", 1), ("llama", 3), ("t5", 3)])
def test_tokens_are_those_of_eager(
    family: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = make(family), InterpretedDevice()
    fast = bind_to(device, model, monkeypatch)
    for count in (5, 3):
        given = {**prompt(family, 2, count, 2), "num_beams": beams, "do_sample": False}
        given |= {"max_new_tokens": count, "min_new_tokens": count}
        assert torch.equal(fast.generate(**given), model.generate(**given))
    assert fast.stats()["eager_calls"] == 0
    # T5's bias by distance, too, which has as many rows as there are keys at a step.
    assert len([e for e in device.log if e[0] == "replay"]) > 3


@pytest.mark.parametrize(("family", "count"), [("gpt2", 7), ("llama", 8)])
def test_a_step_takes_as_many_launches_a_layer_as_a_call_without_a_cache(
    family: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention stores the new rows itself; here norms are kernels of their own."""
    counts = []
    for layers in (1, 2):
        config = copy.deepcopy(make(family).config)
        config.num_hidden_layers, config.layer_types = layers, None
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        device = RecordingDevice()
        fast = bind_to(device, model, monkeypatch, norms="store", cuda_graphs=False)
        cache, made = new_cache(model), []
        for call in ({"past_key_values": cache, "use_cache": True}, {"use_cache": False}):
            ids = torch.tensor([[3]])
            with torch.no_grad():
                fast(ids, **call)
                device.log.clear()
                fast(ids, **call)
            made.append([e for e in device.log if e[0] in ("launch", "call")])
        writes = [e for e in made[0] if e[:2] == ("call", "write_cells")]
        assert len(writes) == 1  # what a step's kernels read on the device
        counts.append((len(made[0]) - 1, len(made[1])))
    assert {after - before for before, after in zip(*counts, strict=True)} == {count}


def test_memory_that_grows_keeps_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs hold no address of the cache: further blocks, and other caches', change none."""
    model, device = make_small(), InterpretedDevice()
    fast = bind_to(device, model, monkeypatch)
    ours, theirs, others = new_cache(model), new_cache(model), []
    for k in range(6):
        torch.testing.assert_close(step(fast, ours, 5 + k), step(model, theirs, 5 + k))
        if k == 3:
            captures = fast.stats()["graph_captures"]
            memory = ours.layers[0].memory
            before = memory.blocks.mapped_nbytes
            others = [copy.deepcopy(memory) for _ in range(2)]
            for other in others:
                other.tensor_for(1, 20000)
            assert memory.blocks.mapped_nbytes > before
    assert fast.stats()["graph_captures"] == captures


def test_beams_move_rows_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks of a prompt are held once, and no step copies more than a last block a beam."""
    model, device = make_small(), InterpretedDevice()
    fast = bind_to(device, model, monkeypatch)
    given = prompt("llama", 1, 70) | {"num_beams": 3, "do_sample": False, "max_new_tokens": 4}
    assert torch.equal(fast.generate(**given), model.generate(**given))
    assert fast.stats()["eager_calls"] == 0
    block = 64 * 2 * 2 * 8 * 4
    assert fast.stats()["cache_peak_nbytes"] == 6 * block  # before the prompt's are merged
    cache = new_cache(model)
    ids = given["input_ids"].expand(3, -1).contiguous()
    with torch.no_grad():
        fast(input_ids=ids, past_key_values=cache, use_cache=True)
    held = fast.stats()["cache_nbytes"]
    assert held == 4 * block
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    assert fast.stats()["cache_nbytes"] == 2 * block
    step(fast, cache, 5, batch=3)
    assert fast.stats()["cache_nbytes"] == held


def test_rows_that_grow_are_masked_by_every_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of T5's steps has programs for as many keys as its cache has room for."""
    model = make("t5")
    fast = bind_to(RecordingDevice(), model, monkeypatch)
    fast.generate(**prompt("t5", 1, 3), max_new_tokens=3, min_new_tokens=3)
    (first, *_) = engine_of(fast).parts["steps"].variants()
    kernels = first.specialization.code
    masked = [f for f in kernels.in_order if getattr(f, "masks_rows", False)]
    sizes = kernels.executable.values.compile(first.captured.dims)(*first.captured.example_dims)
    for family in masked:
        _, schedule = family.chosen(sizes)
        (part,) = family.at(replace(schedule, rows=1), sizes)
        assert "row_ok" in part.job.source
    assert masked


def test_one_graph_serves_every_length_and_every_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = make_small(), InterpretedDevice()
    fast = bind_to(device, model, monkeypatch)
    kept = []
    for turn in range(2):
        ours, theirs = new_cache(model), new_cache(model)
        kept.append(ours)  # the second cache lies in other blocks
        for k in range(5):
            tokens = (3, 9, 4) if k == 0 else (5 + k + turn,)
            torch.testing.assert_close(step(fast, ours, *tokens), step(model, theirs, *tokens))
    # Prompts and steps: each once plainly, then captured, and replayed from then on.
    assert fast.stats()["graph_captures"] == 2
    assert len([e for e in device.log if e[0] == "replay"]) == 3 + 1 + 4
    first, second = (c.layers[0].memory for c in kept)
    assert not set(first.tables[0].ravel()) & set(second.tables[0].ravel())
    assert first.tensor_for(1, 7).data_ptr() == second.tensor_for(1, 7).data_ptr()
    torch.testing.assert_close(kept[1].layers[0].keys, theirs.layers[0].keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_steps_behind_many_keys_are_as_exact_as_eager(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past a room of 64 keys programs take parts of them, and the last one adds these."""
    model, device = make_small(dtype=dtype), InterpretedDevice()
    fast, exact = bind_to(device, model, monkeypatch), in_double(model)
    ids = torch.randint(2, VOCABULARY, (3, 67), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    caches = [new_cache(model) for _ in range(3)]
    for begin, end in ((0, 62), (62, 63), (63, 64), (64, 65), (65, 66), (66, 67)):
        call = {"attention_mask": mask[:, :end], "use_cache": True}
        call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end]
        with torch.no_grad():
            ours, eager, true = (
                run(input_ids=ids[:, begin:end], past_key_values=cache, **call).logits[:, -1]
                for run, cache in zip((fast, model, exact), caches, strict=True)
            )
        assert_as_exact_as_eager(ours, eager, true)
    grids = {e[2] for e in device.log if e[0] == "launch" and e[1].startswith("split_attention")}
    assert {grid[0] for grid in grids} == {1, 2}  # parts of the keys
    assert not any(arguments.turns.any() for arguments in arguments_of(fast))


def arguments_of(fast: Any) -> list[Any]:
    """The arguments of every arena that steps have run in."""
    variants = engine_of(fast).parts["steps"].variants()
    programs = [p for v in variants for p in v.programs]
    return [e.table.arguments for p in programs for e in p.executions.values()]


def test_blocks_behind_a_window_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_small("mistral")
    fast = bind_to(InterpretedDevice(), model, monkeypatch)
    ours, theirs = new_cache(model), new_cache(model)
    ids = torch.randint(2, VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(1))
    for tokens in (ids[0].tolist(), *([t] for t in range(2, 5)), ids[0, :60].tolist(), [7], [8]):
        made, wanted = (step(run, c, *tokens) for run, c in ((fast, ours), (model, theirs)))
        torch.testing.assert_close(made[:, -1], wanted[:, -1])
    assert ours.layers[0].memory.tables[0].tolist()[0][0] == -1


def test_a_cache_that_is_cut_and_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_small("mistral")
    fast = bind_to(InterpretedDevice(), model, monkeypatch)
    ours, theirs = new_cache(model), new_cache(model)
    ids = torch.randint(2, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for run, cache in ((fast, ours), (model, theirs)):
            run(input_ids=ids, past_key_values=cache, use_cache=True)
            cache.crop(-1)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert ours.layers[0].memory.windows == [8]
    for token in range(6):  # past the window of 8
        torch.testing.assert_close(
            step(fast, ours, token + 2, batch=3), step(model, theirs, token + 2, batch=3)
        )


def test_what_a_graph_of_all_lengths_cannot_hold_runs_plainly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shares that are returned are made by PyTorch's softmax over all keys."""
    model, device = make_small(), InterpretedDevice()
    model.set_attn_implementation("eager")
    fast = bind_to(device, model, monkeypatch)
    ours, theirs = new_cache(model), new_cache(model)
    for tokens in ((3, 9, 4), (5,), (5,), (5,)):
        with torch.no_grad():
            made, wanted = (
                run(torch.tensor([tokens]), past_key_values=c, use_cache=True,
                    output_attentions=True).attentions[0]
                for run, c in ((fast, ours), (model, theirs))
            )  # fmt: skip
        torch.testing.assert_close(made, wanted)


def test_poisoned_memory_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOTX_POISON", "1")
    model = make_small()
    fast = bind_to(InterpretedDevice(), model, monkeypatch)
    ours, theirs = new_cache(model), new_cache(model)
    for tokens in ((3, 9, 4), (5,), (6, 2)):
        torch.testing.assert_close(step(fast, ours, *tokens), step(model, theirs, *tokens))


def test_a_full_cache_and_a_capture_of_ones_own_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, device = make_small(), InterpretedDevice()
    nbytes = 64 * 2 * 2 * 8 * 4
    fast = bind_to(device, model, monkeypatch, max_cache_nbytes=nbytes)
    cache = new_cache(model)
    step(fast, cache, 3, 4)
    with pytest.raises(CacheFullError):
        step(fast, cache, *[3] * 63)
    assert fast.stats()["cache_nbytes"] == nbytes and cache.get_seq_length() == 2
    device.users_capture = True
    with pytest.raises(DeviceError, match="would repeat one step"):
        step(fast, cache, 3)
    device.users_capture = False
    step(fast, cache, 3)


def test_inference_mode_and_its_absence_share_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_small()
    fast = bind_to(RecordingDevice(), model, monkeypatch)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        cache = new_cache(model)
        with mode():
            for token in (3, 4, 5):
                fast(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    assert fast.stats()["graph_captures"] == 1
