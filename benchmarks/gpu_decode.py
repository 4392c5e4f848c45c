"""The stages of `gpu.py` that decode with a key/value cache: right, and how long a step takes.

In: `emit(name, numbers)`, which keeps a row at once, and the stage's arguments. Out: rows such as::

    decode/gpt2/fp16/b1/past900/turbotx   {"latency_us": 310.2, "row_us": 190.4, "replay_us": 171.0}

latency_us: a step from an idle device to its logits. row_us: one of many steps queued in a row, as
in a loop that samples on the device. replay_us: the device's part alone. floor_us: what it takes to
read the weights and the cache once, at the bandwidth of a copy.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_models import DTYPES, FACTOR, ULPS
from gpu_plans import DRY
from gpu_timing import DEVICE, measure_ceilings, time_replay
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.errors import EagerWarning

Emit = Callable[[str, dict[str, Any]], None]
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    # Llama 3.2 1B's.
    "llama": (
        "llama",
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
         "vocab_size": 128256, "max_position_embeddings": 4096, "tie_word_embeddings": True},
    ),
}  # fmt: skip
# Steps of a round, which stay within the room that the cache has at 64 and at 900 positions.
STEPS = 2 if DRY else 40
# The prompt's length and steps behind it: over the room that a cache has at first, and plainly,
# captured and replayed behind that.
PROMPT, FORCED, GREEDY = (60, 3, 3) if DRY else (60, 10, 32)
STATIC_ROOM = 1024


def make_decoder(name: str, dtype: str, layers: int | None = None) -> nn.Module:
    """A random decoder with its head on the device, in evaluation mode."""
    import transformers

    kind, changed = DECODERS[name]
    config = transformers.AutoConfig.for_model(kind, **changed)
    layers = min(2, layers or 2) if DRY else layers
    if layers is not None:
        config.num_hidden_layers = layers
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, None, None
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(DTYPES[dtype]).eval()


def make_prompt(model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens; every second row is padded on the left by a third."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 50000, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, : length // 3] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def new_cache(model: nn.Module) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


# --- right ---


def right_decode(emit: Emit, name: str, dtype: str, layers: int | None = None) -> None:
    """Steps behind given tokens against float64, and greedy tokens against eager's."""
    model = make_decoder(name, dtype, layers)
    fast = turbotx.optimize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EagerWarning)
        rows = {f"b{batch}": _compare_steps(model, fast, batch) for batch in (1, 3)}
        allowed = max(row["allowed"] for row in rows.values())
        tokens = {f"b{b}": _compare_greedy(model, fast, b, allowed) for b in (1, 3)}
    stats = fast.stats()
    every = [*rows.values(), *tokens.values()]
    emit(
        f"right/decode-{name}/{dtype}",
        {
            "holds": all(r["holds"] for r in every) and stats["eager_calls"] == 0,
            "worst": max(row["turbotx"] / row["allowed"] for row in rows.values()),
            "captures": stats["captures"], "graphs": stats["graph_captures"],
            "eager_calls": stats["eager_calls"], "steps": rows, "greedy": tokens,
        },
    )  # fmt: skip


@torch.no_grad()
def _compare_steps(model: nn.Module, fast: Any, batch: int) -> dict[str, Any]:
    """Largest error of the logits of steps behind the same tokens, by the rule of all tests."""
    given = make_prompt(model, batch, PROMPT + FORCED)
    ids, mask = given["input_ids"], given["attention_mask"]
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": place, "use_cache": False}
    exact = None if DRY else copy.deepcopy(model).double()(**whole).logits[:, PROMPT - 1 :]
    made = []
    # A second cache, which lies elsewhere, is served by the graphs of the first one.
    for run in (model, fast, fast):
        cache, found, begin = new_cache(model), [], 0
        for end in range(PROMPT, PROMPT + FORCED + 1):
            output = run(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end],
                position_ids=place[:, begin:end], past_key_values=cache, use_cache=True,
            )  # fmt: skip
            found.append(output.logits[:, -1:].clone())
            begin = end
        made.append(torch.cat(found, 1))
    if exact is None:
        return {"eager": 1.0, "turbotx": 1.0, "allowed": 1.0, "holds": True}
    eager, *ours = (float((x.double() - exact).abs().max()) for x in made)
    most = float(exact.abs().max())
    allowed = FACTOR * eager + ULPS * torch.finfo(made[0].dtype).eps * most
    holds = all(x <= allowed for x in ours)  # False for a NaN
    return {"eager": eager, "turbotx": max(ours), "allowed": allowed, "holds": holds}


@torch.no_grad()
def _compare_greedy(model: nn.Module, fast: Any, batch: int, allowed: float) -> dict[str, Any]:
    """Whether greedy tokens are eager's, or at the first difference the two best are so near that
    either may come first."""
    given = make_prompt(model, batch, 20)
    options = {"max_new_tokens": GREEDY, "do_sample": False, "use_cache": True}
    ours, theirs = (m.generate(**given, **options) for m in (fast, model))
    differ = (ours != theirs).nonzero()
    if DRY or not len(differ):
        return {"holds": True, "equal": True}
    worst = 0.0
    for row in differ[:, 0].unique():
        first = int(differ[differ[:, 0] == row][0, 1])
        pad = given["attention_mask"].new_ones(batch, first - 20)
        mask = torch.cat([given["attention_mask"], pad], 1)
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=theirs[:, :first], attention_mask=mask, position_ids=place, use_cache=False
        ).logits[row, -1]
        two = logits.float()[[int(theirs[row, first]), int(ours[row, first])]]
        worst = max(worst, float(two[0] - two[1]))
    return {"holds": worst <= 2 * allowed, "equal": False, "margin": worst, "first": first}


# --- how long a step takes ---


def decode(
    emit: Emit, name: str, dtype: str, batches: Sequence[int] = (1, 8),
    pasts: Sequence[int] = (64, 900), quantize: str = "none",
) -> None:  # fmt: skip
    """A step by turbotx and by PyTorch, one model for all batches and pasts; by turbotx alone if it
    is quantised."""
    model = make_decoder(name, dtype)
    fast = turbotx.optimize(model, quantize=quantize)
    copy_rate = measure_ceilings()["copy_gb_per_s"]
    dtype = dtype if quantize == "none" else f"{dtype}-{quantize}"
    plain = quantize == "none" and not DRY  # eager takes minutes on a CPU
    for batch in batches:
        for past in pasts:
            place = f"decode/{name}/{dtype}/b{batch}/past{past}"
            nbytes = decoded_nbytes(model, batch, past)
            row = time_steps(model, fast, batch, past)
            row["replay_us"] = _time_replay(fast)
            row["floor_us"] = round(nbytes / copy_rate / 1e3, 1)  # of float weights
            emit(f"{place}/turbotx", row)
            if plain:
                emit(f"{place}/eager", time_steps(model, model, batch, past, seconds=0.3))
    engines = {"turbotx": fast} | ({"eager": model} if plain else {})
    for batch in batches:
        for engine, run in engines.items():
            emit(f"decode/{name}/{dtype}/b{batch}/generate/{engine}", _time_generate(run, batch))
    emit(f"decode/{name}/{dtype}/stats", fast.stats())


def decode_compiled(
    emit: Emit, name: str, dtype: str, batch: int, past: int, timed: bool = True
) -> None:
    """A step by torch.compile over a StaticCache, in CUDA graphs; not `timed`: only fill its cache
    on disk, so that whoever times it waits for the trace alone."""
    from transformers import StaticCache

    model = make_decoder(name, dtype)
    begin = time.perf_counter()
    run = model if DRY else torch.compile(model, mode="reduce-overhead", dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=STATIC_ROOM)

    def restart() -> Any:
        cache.reset()
        _prefill(model, cache, batch, past)
        return cache

    def step(token: torch.Tensor, held: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return run(input_ids=token, past_key_values=held, use_cache=True)

    held, token = restart(), torch.full((batch, 1), 7, device=DEVICE)
    with torch.no_grad():
        for _ in range(3):
            step(token, held)
    torch.cuda.synchronize()
    ready_s = round(time.perf_counter() - begin, 1)
    row = _time_rounds(restart, step, batch, 0.4) if timed else {}
    kind = "decode" if timed else "warm/decode"
    emit(f"{kind}/{name}/{dtype}/b{batch}/past{past}/compile-static", {"ready_s": ready_s, **row})


def decoded_nbytes(model: nn.Module, batch: int, past: int) -> int:
    """Bytes that a step reads: every weight once, tables of embeddings only where they are the
    head's too, and the cache."""
    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(head)}
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in tables)
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * width * batch * past
    return int(weights + cached * head.element_size())


def time_steps(
    model: nn.Module, run: Any, batch: int, past: int, seconds: float = 0.6
) -> dict[str, Any]:
    """Time steps behind `past` tokens, over one cache that is cut back after each round."""
    cache = new_cache(model)
    _prefill(run, cache, batch, past)

    def restart() -> Any:
        cache.crop(past - cache.get_seq_length())
        return cache

    def step(token: torch.Tensor, held: Any) -> Any:
        return run(input_ids=token, past_key_values=held, use_cache=True)

    return _time_rounds(restart, step, batch, seconds)


@torch.no_grad()
def _prefill(run: Any, cache: Any, batch: int, past: int) -> None:
    ids = torch.randint(3, 50000, (batch, past), device=DEVICE)
    run(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def _time_rounds(
    restart: Callable[[], Any], step: Callable[[torch.Tensor, Any], Any], batch: int, seconds: float
) -> dict[str, Any]:
    """Medians over rounds of STEPS steps each, after one round to warm up."""
    token = torch.full((batch, 1), 7, device=DEVICE)
    singles: list[float] = []
    hosts: list[float] = []
    rows: list[float] = []
    began = time.perf_counter()
    for turn in range(2 if DRY else 60):
        held = restart()
        for _ in range(STEPS if turn < 6 else 0):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step(token, held)
            hosts.append((time.perf_counter() - begin) * 1e6)
            torch.cuda.synchronize()
            singles.append((time.perf_counter() - begin) * 1e6)
        if turn < 1:
            singles.clear()
            hosts.clear()
            began = time.perf_counter()
            continue
        held = restart()
        rows.append(_time_row(step, token, held))
        if time.perf_counter() - began > seconds and turn >= 3:
            break
    return {
        "latency_us": round(statistics.median(singles or [0.0]), 1),
        "row_us": round(statistics.median(rows), 1),
        "host_us": round(statistics.median(hosts or [0.0]), 1),
        "rounds": len(rows),
    }


def _time_row(step: Callable[[torch.Tensor, Any], Any], token: torch.Tensor, held: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(STEPS):
        step(token, held)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / STEPS


def _time_replay(fast: Any) -> float:
    """Microseconds of the graph of the latest steps alone, at the length that they ended with."""
    steps = engine_of(fast).steps()
    graphs = [
        (program.graphs, key)
        for _, variant in steps.keyed_variants()
        for program in variant.compiled.programs
        for key in program.graphs.kept
    ]
    if not graphs:
        return 0.0
    kept, key = graphs[-1]  # the one that was used last
    return time_replay(kept.kept[key].graph.replay)


@torch.no_grad()
def _time_generate(run: Any, batch: int, tokens: int = 4 if DRY else 128) -> dict[str, Any]:
    """Microseconds a token of transformers' own greedy loop behind a prompt of 64 tokens."""
    ids = torch.randint(3, 50000, (batch, 64), device=DEVICE)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    taken = []
    for _ in range(1 if DRY else 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run.generate(**given, **options)
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) * 1e6 / tokens)
    return {"token_us": round(min(taken), 1), "first_us": round(taken[0], 1)}
