"""Cache layers: store the keys and values of a user's DynamicCache in turbotx's memory.

In: a transformers cache and the shapes of its layers. Out: the memory behind the cache. The cache's
layers are replaced by layers with the interface of transformers' own (length, reorder, crop, batch
selection, reset), which read keys and values from that memory::

    memory = adopt(cache, shapes, torch.float32, device)
    cache.layers[0]  ->  CachedLayer;  cache.layers[0].keys  ->  (2, 12, 33, 64)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from turbotx.errors import InputError
from turbotx.memory.cache_blocks import CacheBudget
from turbotx.runtime.block_memory import BlockMemory, fits_blocks
from turbotx.runtime.cache_memory import CacheMemory, LayerShape


class CachedLayer(CacheLayerMixin):
    """One layer of a `CacheMemory`, with the interface of transformers' cache layers.

    window: size of the sliding window, None without one; `keys` and `values` return only the last
    `window - 1` positions.
    """

    is_croppable = True

    def __init__(self, memory: CacheMemory, layer: int, window: int | None) -> None:
        self.memory, self.layer, self.window = memory, layer, window

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds at least one position."""
        return self.memory.batch_of(self.layer) is not None

    @property
    def is_sliding(self) -> bool:
        """Whether attention sees only the last `window` positions."""
        return self.window is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys, (batch, heads, length, width), of the window only; None before the first call."""
        return self._show(0)

    @property
    def values(self) -> torch.Tensor | None:
        """Values, (batch, heads, length, width), of the window only; None before the first call."""
        return self._show(1)

    def _show(self, part: int) -> torch.Tensor | None:
        held = self.memory.read(self.layer)
        if held is None:
            return None
        rows = held[part]
        return rows if self.window is None else rows[:, :, 1 - self.window :]

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all positions, ignoring the window; the layer must not be empty."""
        held = self.memory.read(self.layer)
        assert held is not None
        return held

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: memory is allocated when the first rows are stored."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Store new keys and values, as an eager model passes them; return all of them, old and
        new."""
        memory, layer = self.memory, self.layer
        memory.put(layer, key_states, value_states, memory.lengths[layer])
        return memory.read(layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a mask for `query_length` new rows covers, and the position of the
        first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of positions stored."""
        return self.memory.lengths[self.layer]

    def get_max_length(self) -> int:
        """Return the window size, or -1 if the length is unbounded."""
        return -1 if self.window is None else self.window

    def offload(self) -> None:
        """Raise InputError: the memory stays on its device."""
        raise InputError("turbotx's key/value cache is not offloaded: leave cache.offload out")

    prefetch = offload

    def reset(self) -> None:
        """Drop all positions; the memory stays allocated."""
        self.memory.clear(self.layer)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove positions; raise ValueError if it is positive."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, not {tokens_to_remove}"
            )
        self.memory.drop(self.layer, -tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows of the batch by index, for beam search; beam_idx: (batch,) int64."""
        self.memory.select(self.layer, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows of the batch by index; indices: (rows,) int64."""
        self.memory.select(self.layer, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times; copies are adjacent."""
        batch = self.memory.batch_of(self.layer)
        if batch is not None:
            rows = torch.arange(batch).repeat_interleave(repeats)
            self.memory.select(self.layer, rows)


def refuse_cache(cache: Any) -> None:
    """Raise InputError if turbotx cannot keep a cache of this type in its own memory."""
    if type(cache) is EncoderDecoderCache:
        refuse_cache(cache.self_attention_cache)
        refuse_cache(cache.cross_attention_cache)
        return
    name = type(cache).__name__
    hint = "pass a DynamicCache, or leave cache_implementation out of generate"
    if type(cache) is not DynamicCache:
        raise InputError(f"a {name} as past_key_values has memory of its own kind: {hint}")
    if cache.offloading:
        raise InputError(f"a {name} that is offloaded moves between devices: {hint}")
    known = {DynamicLayer, DynamicSlidingWindowLayer, CachedLayer}
    if known.issuperset(map(type, cache.layers)):
        return
    for k, layer in enumerate(cache.layers):
        if type(layer) not in known:
            raise InputError(
                f"layer {k} of the {name} is a {type(layer).__name__}, which keeps more than keys "
                "and values of attention: call the model with use_cache=False"
            )


def adopt(
    cache: Cache, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device,
    grows: bool = True, budget: CacheBudget | None = None, in_blocks: bool = False,
) -> CacheMemory:  # fmt: skip
    """Return the memory behind a cache, converting its layers to `CachedLayer` if necessary.

    Positions that the cache already holds are copied.
    in_blocks: whether the model's programs read the cache through block tables. Raises InputError
    if the cache holds layers of other shapes.
    """
    layers: list[Any] = cache.layers
    known = _memory_of(layers)
    wanted = tuple(shapes), dtype, device
    if known is not None and (known.shapes, known.dtype, known.device) == wanted:
        return known
    if len(layers) > len(shapes):
        raise InputError(
            f"the key/value cache has {len(layers)} layers, and the model writes to {len(shapes)}"
        )
    memory, made = _make_memory(shapes, dtype, device, grows, budget, in_blocks), []
    for k in range(len(shapes)):
        layer = layers[k] if k < len(layers) else None
        window = getattr(layer, "window", getattr(layer, "sliding_window", None))
        if layer is not None and layer.get_seq_length() > 0:
            _take_over(memory, k, layer)
        made.append(CachedLayer(memory, k, window))
    if isinstance(memory, BlockMemory):
        memory.windows = [layer.window for layer in made]
    cache.layers, cache.layer_class_to_replicate = made, None
    return memory


def _make_memory(
    shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device,
    grows: bool, budget: CacheBudget | None, in_blocks: bool,
) -> CacheMemory:  # fmt: skip
    if in_blocks and budget is not None and fits_blocks(shapes, device):
        return BlockMemory(shapes, dtype, budget)
    return CacheMemory(shapes, dtype, device, grows, budget)


def _memory_of(layers: Sequence[Any]) -> CacheMemory | None:
    """Return the memory if these are all of its layers in order; otherwise None."""
    known = layers[0].memory if layers and type(layers[0]) is CachedLayer else None
    if known is None or len(layers) != len(known.shapes):
        return None
    for k, layer in enumerate(layers):
        if type(layer) is not CachedLayer or layer.memory is not known or layer.layer != k:
            return None
    return known


def _take_over(memory: CacheMemory, k: int, layer: Any) -> None:
    """Copy a layer's keys and values; positions that have left the window become zeros."""
    keys: torch.Tensor
    values: torch.Tensor
    if type(layer) is CachedLayer:
        keys, values = layer.rows
    else:
        keys, values = layer.keys, layer.values
    gone = layer.get_seq_length() - keys.shape[2]
    if keys.device != memory.device or keys.dtype != memory.dtype:
        raise InputError(
            f"layer {k} of the key/value cache holds {keys.dtype} on {keys.device}, and the model "
            f"writes {memory.dtype} on {memory.device}"
        )
    if gone:
        memory.put(k, keys.new_zeros(*keys.shape[:2], gone, keys.shape[3]),
                   values.new_zeros(*values.shape[:2], gone, values.shape[3]))  # fmt: skip
    memory.put(k, keys, values, gone)
