"""Cached call: a decoder's call with its key/value cache as plain tensors, for tracing.

In: a model of transformers, and a call's arguments with the cache's memory in the place of the
cache. Out: what the model returns, with the word CACHE where it returns the cache, and the keys and
values of cross attention where it made them; the user's own cache is never met::

    CachedCall(gpt2, 12)(input_ids=ids, kv_memory=memory, kv_length=marker, kv_kind="decoder")
"""

from __future__ import annotations

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
QUERIES = ("input_ids", "inputs_embeds")
"""The arguments whose second dim counts the new tokens; those of an encoder-decoder model have
"decoder_" before."""
KINDS = ("decoder", "first", "further")
"""A decoder alone; an encoder-decoder's first step, which makes cross attention's keys and values,
and those that are given them."""


class CachedCall(nn.Module):
    """A model whose calls take `kv_memory`, `kv_table`, `kv_length`, `kv_kind` (one of KINDS),
    `kv_cross` and `kv_encoded` instead of a cache and of an encoder's outputs.

    kv_memory, kv_table, kv_length: see `ir/cache_ops.py`. kv_cross: (2 x layers, batch, heads,
    source, width), keys and values in turn. kv_encoded: the encoder's last hidden states.
    """

    turbotx_dim_names: ClassVar = {
        "kv_length_d0": "length", "kv_memory_d0": "elements", "kv_memory_d2": "capacity",
        "kv_table_d2": "columns",
    }  # fmt: skip

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.training = False  # the model itself stays in whatever mode it is

    def forward(
        self, *, kv_memory: torch.Tensor, kv_table: torch.Tensor, kv_length: torch.Tensor,
        kv_kind: str, kv_cross: torch.Tensor | None = None,
        kv_encoded: torch.Tensor | None = None, **given: Any,
    ) -> tuple[Any, list[torch.Tensor]]:  # fmt: skip
        """Run the model with a cache of traced layers. Returns its output, CACHE in the cache's
        place, and the keys and values of cross attention that the call made, empty where it was
        given them or has none."""
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
    """Return how many new tokens a call brings.

    Raises CaptureError where it has none of the arguments that tell.
    """
    names = [name if kind == "decoder" else f"decoder_{name}" for name in QUERIES]
    found = next((given[n] for n in names if isinstance(given.get(n), torch.Tensor)), None)
    if found is None or found.dim() < 2:
        raise CaptureError(f"a call with a cache has to have {names[0]!r} or {names[1]!r}")
    return found.shape[1]


class TracedLayer(CacheLayerMixin):
    """A layer whose rows are an op's result: no concatenation, and one symbol for all lengths."""

    is_sliding = False  # whole lengths are kept: the mask hides what left the window

    def __init__(
        self, memory: torch.Tensor, table: torch.Tensor, length: torch.Tensor, past: Any
    ) -> None:
        super().__init__()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._memory, self._table, self._length, self._past = memory, table, length, past
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to do."""

    def append(self, keys: torch.Tensor, values: torch.Tensor, place: int, layer: int) -> None:
        """Store one call's rows, (batch, heads, seq, head_dim) both; `place`: see
        `cache_ops.block_of`. Raises CaptureError where a layer writes twice in one call."""
        if self.keys is not None:
            raise CaptureError(f"layer {layer} writes to the cache twice in one call")
        held, append = (self._memory, self._table), torch.ops.turbotx.cache_append
        self.keys = append(*held, keys, self._length, place, layer, 0)
        place += keys.shape[1] * keys.shape[3]
        self.values = append(*held, values, self._length, place, layer, 1)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Raise CaptureError: a traced layer is written by `TracedCache.update` alone."""
        raise CaptureError("the model writes to a layer of its cache past Cache.update")

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        """Return how many keys a mask has to cover, and the position of the first."""
        return self._past + query_length, 0

    def get_seq_length(self) -> Any:
        """Return the number of positions before the call."""
        return self._past

    def get_max_length(self) -> int:
        """Return -1: the length has no bound."""
        return -1


class CrossLayer(CacheLayerMixin):
    """A layer of cross attention: what the first step makes, or what all others are given."""

    is_sliding = False

    def __init__(self, given: torch.Tensor | None, layer: int) -> None:
        super().__init__()
        self.is_initialized = given is not None
        if given is not None:
            self.keys, self.values = given[2 * layer], given[2 * layer + 1]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to do."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the keys and values of the encoded input; raise CaptureError at the second time."""
        if self.is_initialized:
            raise CaptureError("cross attention's keys and values are made twice")
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        """Return the number of encoded positions, and the position of the first."""
        return self.get_seq_length(), 0

    def get_seq_length(self) -> Any:
        """Return the number of encoded positions, 0 before they are there."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_length(self) -> int:
        """Return -1: the length has no bound."""
        return -1


class TracedCache(DynamicCache):
    """A cache of such layers; places in memory are given out in the order of the first writes."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = layers, None
        self._used = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
        *args: Any, **kwargs: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Append keys and values, (batch, heads, new, width), to a layer; return all of the
        layer's, those of earlier calls first."""
        layer = self.layers[layer_idx]
        if isinstance(layer, CrossLayer):
            return layer.update(key_states, value_states)
        layer.append(key_states, value_states, self._used, layer_idx)
        for rows in (key_states, value_states):
            self._used += int(rows.shape[1]) * int(rows.shape[3])
        return layer.keys, layer.values


def find_appends(graph: fx.Graph) -> list[fx.Node]:
    """Return the calls that write to the cache, in order."""
    op = torch.ops.turbotx.cache_append.default
    return [n for n in graph.nodes if n.op == "call_function" and n.target is op]


assert cache_ops  # defines the op
