"""Step example: the sizes at which a call with a cache is traced.

In: a call of `capture.cached_call`. Out: the same call with tensors of unusual, mostly coprime
sizes, so that no size is mistaken for 1, for 0 or for another::

    make_example({"input_ids": (1, 1), "kv_length": (33, 0), ...})  ->  input_ids (2, 3), (7, 0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

SIZES = {
    "batch": 2,
    "query": 3,
    "length": 7,
    "source": 5,
    "capacity": 11,
    "memory": 13,
    "columns": 17,
}
"""length: the cache with the new tokens. memory: elements per position. columns: of the block
table."""
KEPT = "logits_to_keep"
"""The argument that says for how many of the last new tokens logits are computed."""

_TOKENS = ("batch", "query", None)
_SEEN = ("batch", "length")
_WHOLE_MASK = ("batch", None, "query", "length")
_ENCODED = ("batch", "source", None)
_OWN = {
    "kv_memory": ("memory", "batch", "capacity"),
    "kv_table": (None, "batch", "columns"),
    "kv_length": ("length", None),
    "kv_cross": (None, "batch", None, "source", None),
    "kv_encoded": _ENCODED,
}
_OF_ENCODER = {2: ("batch", "source"), 3: _ENCODED, 4: ("batch", None, "source", "source")}
"""By rank what an encoder returns beside its last hidden states: a mask, hidden states,
attentions."""
_DECODER = {
    "input_ids": _TOKENS, "inputs_embeds": _TOKENS, "position_ids": _TOKENS,
    "token_type_ids": _TOKENS, "attention_mask": _SEEN, "cache_position": ("query",),
}  # fmt: skip


def make_example(call: Mapping[str, Any]) -> dict[str, Any]:
    """Resize every tensor with a known role to the sizes of SIZES.

    Other tensors are unchanged: the capture serves their sizes as it does without a cache.
    """
    alone = call["kv_kind"] == "decoder"
    roles: dict[str, tuple[str | None, ...]] = dict(_OWN)
    if alone:
        roles |= _DECODER
    else:
        roles |= {f"decoder_{name}": dims for name, dims in _DECODER.items()}
        roles |= {"input_ids": _ENCODED, "attention_mask": ("batch", "source")}
        roles |= {"inputs_embeds": _ENCODED, "cache_position": ("query",)}
    kept = call.get(KEPT)
    more = max(0, kept - 1) if isinstance(kept, int) else 0  # at least as many tokens as are kept
    sizes = {k: n + more * (k in ("query", "length", "capacity")) for k, n in SIZES.items()}
    made = {}
    for name, value in call.items():
        dims = roles.get(name)
        if isinstance(value, torch.Tensor) and dims is not None:
            if name.endswith("attention_mask") and value.dim() == 4:
                dims = _WHOLE_MASK
            value = _resize(value, dims, sizes)
        elif name == "encoder_outputs":
            value = _resize_encoded(value, sizes)
        made[name] = value
    return made


def _resize_encoded(outputs: Any, sizes: Mapping[str, int]) -> Any:
    """Resize all that an encoder has returned; its first tensor is the last hidden states."""
    parts, spec = pytree.tree_flatten(outputs)
    source = next((x.shape[1] for x in parts if isinstance(x, torch.Tensor) and x.dim() > 1), None)

    def resize(part: Any) -> Any:
        dims = _OF_ENCODER.get(part.dim()) if isinstance(part, torch.Tensor) else None
        if dims is None:
            return part
        along = zip(dims, part.shape, strict=True)
        return _resize(part, tuple(d if d == "batch" or n == source else None for d, n in along),
                       sizes)  # fmt: skip

    return pytree.tree_unflatten([resize(part) for part in parts], spec)


def _resize(
    tensor: torch.Tensor, dims: tuple[str | None, ...], sizes: Mapping[str, int]
) -> torch.Tensor:
    """Repeat or cut the dims that have a role; `tensor` may have more or fewer dims than `dims`."""
    for d, role in enumerate(dims[: tensor.dim()]):
        if role is not None and tensor.shape[d] > 0:
            places = torch.arange(sizes[role], device=tensor.device) % tensor.shape[d]
            tensor = tensor.index_select(d, places)
    return tensor
