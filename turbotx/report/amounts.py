"""Amounts: byte counts and shapes as text, for tables and pages.

In: numbers. Out: short text::

    show_nbytes(3407872)  ->  "3.25 MiB"      show_shape({"batch": 1, "seq": 40})
"""

from __future__ import annotations

from collections.abc import Mapping

from turbotx.report.entries import CacheEntry


def show_nbytes(nbytes: float) -> str:
    """Return a byte count in a suitable unit: 512 B, 48.0 KiB, 3.25 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}" if unit != "KiB" else f"{nbytes / size:.1f} {unit}"
    return f"{int(nbytes)} B"


def show_shape(dims: Mapping[str, int]) -> str:
    """Return sizes by name, without dims that follow another one."""
    following = find_leaders(dims)
    return ", ".join(f"{name} {size}" for name, size in dims.items() if name not in following)


def find_leaders(dims: Mapping[str, int]) -> dict[str, str]:
    """Return, by name, further dims of inputs that equal an earlier dim, and that dim:
    `attention_mask_d0` equals the batch wherever a mask fits."""
    first: dict[int, str] = {}
    found = {}
    for name, size in dims.items():
        if "_d" in name and size in first:
            found[name] = first[size]
        else:
            first.setdefault(size, name)
    return found


def show_cache(cache: CacheEntry) -> str:
    """Return the size of a key/value cache in one line."""
    token, filled, nbytes = map(
        show_nbytes, (cache.token_nbytes, cache.filled_nbytes, cache.nbytes)
    )
    return f"Key/value cache: {token} a token; {filled} filled, in {nbytes}"


def layer_of(module: str, model: str = "model") -> str:
    """Return a module's path down to its layer: encoder.layer.0 of encoder.layer.0.output.dense;
    the first part if it is in no layer, `model` if it is empty."""
    parts = module.split(".")
    ends = [k for k, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: ends[0] + 1]) if ends else (parts[0] or model)
