"""Step call: converts a decoder's call with a key/value cache to plain tensors, and runs it.

In: a call's arguments by name, and its cache, a DynamicCache or an EncoderDecoderCache of two. Out:
the model's output with that cache in it, one step longer. Both freshly compiled and loaded programs
are run through this class::

    steps.run({"input_ids": ids, "use_cache": True}, cache)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import record_function

from turbotx.capture.cached_call import count_queries, find_queries
from turbotx.engine.cache_layers import adopt, refuse_cache
from turbotx.errors import InputError
from turbotx.memory.cache_blocks import CacheBudget
from turbotx.runtime.cache_memory import BLOCK_LEN, CacheMemory, LayerShape

COMMON = "transformers.modeling_outputs"
"""Where the classes of outputs are that any model may return."""


class StepCalls:
    """Runs calls with a cache; subclasses run the call of plain tensors.

    name: the model's class. shapes: of what its layers write to the cache. budget: of its caches.
    least_columns: of the block tables that programs read, 0 where they read none; known with
    `shapes`.
    """

    name: str
    shapes: tuple[LayerShape, ...]
    device: torch.device
    budget: CacheBudget
    least_columns = 0

    def run_plain(self, call: Mapping[str, Any], cache: Any) -> Any:
        """Run a call of `capture.cached_call`. Returns the model's output, with `cache` where it
        has the placeholder CACHE, and the keys and values computed for cross attention."""
        raise NotImplementedError

    def find_dtype(self, call: Mapping[str, Any]) -> torch.dtype:
        """Return the dtype of the keys and values that layers write in a call; sets `shapes`."""
        raise NotImplementedError

    def run(self, given: dict[str, Any], cache: Any) -> Any:
        """Return the model's output for a call; its keys and values are added to the cache.

        given: the arguments by name, without the cache. Raises InputError for an unsupported cache,
        CacheFullError if it would exceed the memory limit.
        """
        call, memory, count = self._prepare(given, cache)
        with memory.owned():
            length = call["kv_length"].shape[0]
            if memory.length + count != length:
                raise InputError("another thread has changed the key/value cache during the call")
            call["kv_memory"] = memory.tensor_for(count_batch(call), length)
            call["kv_table"] = memory.table()
            run = self.run_plain
            if torch.autograd._profiler_enabled():
                run = record_function(f"turbotx: {self.name} step")(run)
            output, made = run(call, cache)
            if made:
                self._fill_cross(cache, made)
            memory.advance(count)
        _cut_attentions(output, cache, length, count)
        return output

    def describe(self, given: dict[str, Any], cache: Any) -> dict[str, Any]:
        """Return the call as one of plain tensors, over a copy of the cache's memory; a copy of
        blocks has room for as many positions as they."""
        copied = copy.deepcopy(cache)
        call, memory, _ = self._prepare(given, copied)
        length = call["kv_length"].shape[0]
        plain = memory.contiguous()
        if plain is not memory:
            length = -(-length // BLOCK_LEN) * BLOCK_LEN
        tensor = plain.tensor_for(count_batch(call), length)
        return call | {"kv_memory": tensor, "kv_table": plain.table()}

    def _prepare(
        self, given: dict[str, Any], cache: Any
    ) -> tuple[dict[str, Any], CacheMemory, int]:
        """Return a call without `kv_memory` and `kv_table`, the memory of its cache, and the number
        of new tokens.

        Replaces the cache's layers by turbotx's.
        """
        refuse_cache(cache)
        kind = _kind_of(cache)
        own = cache if kind == "decoder" else cache.self_attention_cache
        call = _with_encoded(given)
        count = count_queries(call, kind)
        call |= {"kv_kind": kind}
        if kind == "further":
            call |= {"kv_cross": self._cross_memory(cache, count_batch(call))}
        call["kv_length"] = torch.empty(own.get_seq_length() + count, 0, device=self.device)
        dtype = self.find_dtype(call)
        memory = adopt(
            own, self.shapes, dtype, self.device, budget=self.budget,
            least_columns=self.least_columns,
        )  # fmt: skip
        return call, memory, count

    def _cross_memory(self, cache: Any, batch: int) -> torch.Tensor:
        """Return the keys and values of cross attention as one tensor, (2 x layers, batch, heads,
        source, width)."""
        layers = cache.cross_attention_cache.layers
        made = [part for layer in layers for part in (layer.keys, layer.values)]
        memory = self._adopt_cross(cache, made)
        source, shape = memory.length, memory.shapes[0]
        tensor = memory.tensor_for(batch, source)
        return tensor.view(2 * len(layers), batch, shape.heads, source, shape.key_width)

    def _fill_cross(self, cache: Any, made: list[torch.Tensor]) -> None:
        """Store the cross-attention keys and values that the first step computed."""
        memory = self._adopt_cross(cache, made)
        for k in range(len(made) // 2):
            memory.put(k, made[2 * k], made[2 * k + 1])
        cache.is_updated = dict.fromkeys(range(len(made) // 2), True)

    def _adopt_cross(self, cache: Any, made: list[torch.Tensor]) -> CacheMemory:
        shapes = [
            LayerShape(k.shape[1], k.shape[3], v.shape[3])
            for k, v in zip(made[::2], made[1::2], strict=True)
        ]
        if len(set(shapes)) != 1 or shapes[0].key_width != shapes[0].value_width:
            raise InputError(f"cross attention's keys and values differ among layers: {shapes}")
        of = cache.cross_attention_cache
        return adopt(of, shapes, made[0].dtype, made[0].device, False, self.budget)


def _cut_attentions(output: Any, cache: Any, length: int, count: int) -> None:
    """Leave of each layer's attentions, (batch, heads, count, length), the keys that transformers'
    own cache keeps: those before a sliding window are probabilities of 0."""
    found = getattr(output, "attentions", None)
    windows = [getattr(layer, "window", None) for layer in getattr(cache, "layers", ())]
    if not found or len(found) != len(windows) or not any(windows):
        return
    kept = [length if w is None else min(length - count, w - 1) + count for w in windows]
    output.attentions = tuple(
        a if a is None or a.shape[-1] != length else a[..., length - n :]
        for a, n in zip(found, kept, strict=True)
    )


def _kind_of(cache: Any) -> str:
    """Return the kind, one of `cached_call.KINDS`, of a call with this cache."""
    updated = getattr(cache, "is_updated", None)
    if updated is None:
        return "decoder"
    states = set(updated.values())
    if len(states) > 1:
        raise InputError(
            "cross attention's keys and values are there for some layers of the cache only: call "
            "the model with a new EncoderDecoderCache"
        )
    return "further" if states == {True} else "first"


def _with_encoded(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with `encoder_outputs` replaced by its only tensor, if it has just one
    and is no class of the model's own, which may be asked for more."""
    call = dict(given)
    outputs = call.get("encoder_outputs")
    if outputs is not None:
        parts = list(outputs.values() if isinstance(outputs, dict) else outputs)
        common = not isinstance(outputs, dict) or type(outputs).__module__ == COMMON
        if common and len(parts) == 1 and isinstance(parts[0], torch.Tensor):
            del call["encoder_outputs"]
            call["kv_encoded"] = parts[0]
    return call


def count_batch(call: Mapping[str, Any]) -> int:
    """Return the batch size of a call of plain tensors."""
    return int(find_queries(call, call["kv_kind"]).shape[0])
