"""Cached call: a decoder's call with its key/value cache as plain tensors, for tracing.

In: a transformers model, and a call's arguments with the cache's memory in place of the cache. Out:
what the model returns, with the string CACHE where it returns the cache, and the keys and values of
cross attention if the call computed them. The user's own cache is not touched::

    CachedCall(gpt2, 12)(input_ids=ids, kv_memory=memory, kv_length=marker, kv_kind="decoder")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from turbotx.capture.composition import calls_forward
from turbotx.errors import CaptureError
from turbotx.ir import cache_ops

CACHE = "turbotx: the cache that the call was given"
QUERIES = ("decoder_input_ids", "decoder_inputs_embeds"), ("input_ids", "inputs_embeds")
"""The arguments whose second dim is the number of new tokens: of an encoder-decoder, of others."""
KINDS = ("decoder", "first", "further")
"""A decoder-only model; an encoder-decoder's first step, which computes the keys and values of
cross attention; and its further steps, which receive them."""


class CachedCall(nn.Module):
    """A model whose calls take `kv_memory`, `kv_table`, `kv_length`, `kv_kind` (one of KINDS),
    `kv_cross` and `kv_encoded` instead of a cache and an encoder's outputs.

    kv_memory, kv_table, kv_length: see `ir/cache_ops.py`. kv_cross: (2 x layers, batch, heads,
    source, width), keys and values alternating. kv_encoded: the encoder's last hidden states.
    """

    turbotx_dim_names: ClassVar = {
        "kv_length_d0": "length", "kv_memory_d0": "elements", "kv_memory_d2": "capacity",
        "kv_table_d2": "columns",
    }  # fmt: skip

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.training = False  # the wrapped model keeps its own mode

    def forward(
        self, *, kv_memory: torch.Tensor, kv_table: torch.Tensor, kv_length: torch.Tensor,
        kv_kind: str, kv_cross: torch.Tensor | None = None,
        kv_encoded: torch.Tensor | None = None, **given: Any,
    ) -> tuple[Any, list[torch.Tensor]]:  # fmt: skip
        """Run the model with a cache of traced layers.

        Returns its output, with CACHE in place of the cache, and the keys and values of cross
        attention that the call computed; an empty list if it received them or has none.
        """
        past = kv_length.shape[0] - count_queries(given, kv_kind)
        memory = kv_memory, kv_table, kv_length
        own = TracedCache([TracedLayer(*memory, past) for _ in range(self.layers)])
        cache: Any = own
        cross: list[CrossLayer] = []
        if kv_kind != "decoder":
            cross = [CrossLayer(kv_cross, i) for i in range(self.layers)]
            cache = EncoderDecoderCache(own, TracedCache(cross))
            cache.is_updated = dict.fromkeys(range(self.layers), kv_cross is not None)
        if kv_encoded is not None:
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=kv_encoded)
        model = self.model
        called = model.forward if calls_forward(model) else model
        output = called(**given, past_key_values=cache)
        if kv_cross is not None or not cross:
            made = []
        else:
            made = [part for layer in cross for part in (layer.keys, layer.values)]
        is_cache = lambda x: x is cache or x is own  # noqa: E731
        marked = pytree.tree_map(lambda x: CACHE if is_cache(x) else x, output, is_leaf=is_cache)
        return marked, made


def count_queries(given: dict[str, Any], kind: str) -> Any:
    """Return the number of new tokens in a call.

    Raises CaptureError if none of QUERIES is given as a tensor of two or more dims.
    """
    return find_queries(given, kind).shape[1]


def find_queries(given: Mapping[str, Any], kind: str) -> torch.Tensor:
    """Return the new tokens of a call, or their embeddings; raises as `count_queries` does."""
    names = QUERIES[kind == "decoder"]
    for name in names:
        found = given.get(name)
        if isinstance(found, torch.Tensor) and found.dim() >= 2:
            return found
    raise CaptureError(f"a call with a key/value cache needs {names[0]!r} or {names[1]!r}")


class _LayerOfTrace(CacheLayerMixin):
    """What both kinds of layers of a `TracedCache` have in common."""

    is_sliding = False  # every position is kept; the mask hides those that left the window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: a layer is initialized from the start, or by `update`."""

    def get_max_length(self) -> int:
        """Return -1: the length is unbounded."""
        return -1


class TracedLayer(_LayerOfTrace):
    """A cache layer whose rows are the result of an op: no concatenation, and one symbol for every
    length."""

    def __init__(
        self, memory: torch.Tensor, table: torch.Tensor, length: torch.Tensor, past: Any
    ) -> None:
        super().__init__()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._memory, self._table, self._length, self._past = memory, table, length, past
        self.is_initialized = True

    def append(self, keys: torch.Tensor, values: torch.Tensor, place: int, layer: int) -> None:
        """Store the rows of one call, both (batch, heads, seq, head_dim).

        place: see `cache_ops.block_of`. Raises CaptureError if a layer is written twice in one
        call.
        """
        if self.keys is not None:
            raise CaptureError(f"layer {layer} writes to the cache twice in one call")
        held, append = (self._memory, self._table), torch.ops.turbotx.cache_append
        self.keys = append(*held, keys, self._length, place, layer, 0)
        place += keys.shape[1] * keys.shape[3]
        self.values = append(*held, values, self._length, place, layer, 1)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Raise CaptureError: a traced layer is written only by `TracedCache.update`."""
        raise CaptureError("the model writes to a layer of its cache without Cache.update")

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        """Return the number of keys that a mask covers, and the position of the first."""
        return self._past + query_length, 0

    def get_seq_length(self) -> Any:
        """Return the number of positions before the call."""
        return self._past


class CrossLayer(_LayerOfTrace):
    """A cross-attention layer: stores what the first step computes, or returns what later steps
    receive."""

    def __init__(self, given: torch.Tensor | None, layer: int) -> None:
        super().__init__()
        self.is_initialized = given is not None
        if given is not None:
            self.keys, self.values = given[2 * layer], given[2 * layer + 1]

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Store the keys and values of the encoder's output; raises CaptureError if they are
        already set."""
        if self.is_initialized:
            raise CaptureError("cross attention's keys and values are computed twice in one call")
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        """Return the number of encoder positions, and the position of the first."""
        return self.get_seq_length(), 0

    def get_seq_length(self) -> Any:
        """Return the number of encoder positions; 0 before `update`."""
        return 0 if self.keys is None else self.keys.shape[2]


class TracedCache(DynamicCache):
    """A cache of traced layers; memory is assigned to them in the order of their first writes."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = layers, None
        self._used = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
        *args: Any, **kwargs: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Append keys and values, both (batch, heads, new, width), to a layer.

        Returns all keys and values of the layer, those of earlier calls first.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, CrossLayer):
            return layer.update(key_states, value_states)
        layer.append(key_states, value_states, self._used, layer_idx)
        for rows in (key_states, value_states):
            self._used += int(rows.shape[1]) * int(rows.shape[3])
        return layer.keys, layer.values


def find_appends(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that write to the cache, in order."""
    op = torch.ops.turbotx.cache_append.default
    return [n for n in graph.nodes if n.op == "call_function" and n.target is op]


assert cache_ops  # imported because it registers the op
