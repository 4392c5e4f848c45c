"""Decoder: a saved model that generates: transformers' own loop over the programs of a file.

In: a saved module, the file's description of the model, its parts' programs. Out: an object of the
model's class whose forward runs those programs; nothing is traced::

    open_decoder(saved, facts, parts).model.generate(**inputs)
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from turbotx.capture.ambient import Ambient, differences, read_ambient, read_decisive
from turbotx.capture.cached_call import CACHE
from turbotx.engine.step_call import StepCalls
from turbotx.errors import InputError, SavedFileError
from turbotx.memory.cache_blocks import CacheBudget
from turbotx.runtime.cache_memory import LayerShape
from turbotx.saved.call_table import CallTable


class SavedSteps(StepCalls):
    """Runs calls with a cache by a file's programs."""

    def __init__(self, name: str, facts: Mapping[str, Any], table: CallTable, place: torch.device):
        self.name, self.device, self._table = name, place, table
        self.shapes = tuple(LayerShape(*sizes) for sizes in facts["shapes"])
        self.budget = CacheBudget(facts["most_nbytes"])
        # CPU programs of a file are native; GPU programs take contiguous caches.
        self.in_blocks = all(call.program.executable.gpu is None for call in table.calls())
        self._dtypes: dict[Ambient, torch.dtype] = {}

    def find_dtype(self, call: Mapping[str, Any]) -> torch.dtype:
        """Return the dtype of the caches that the file's programs take in this ambient state.
        Raises InputError if the file has no program for it."""
        decisive = read_decisive()
        if decisive not in self._dtypes:
            ambient = read_ambient()
            for known in self._table.calls():
                if not differences(ambient, known.ambient, known.asked):
                    inputs = known.program.executable.inputs
                    memory = next(x for x in inputs if x.name == "kv_memory")
                    self._dtypes[decisive] = memory.dtype
                    break
            else:
                raise InputError(
                    "the file holds no call with a key/value cache in the state that this call is "
                    "made in (autocast, the default dtype): make one before the model is saved"
                )
        return self._dtypes[decisive]

    def run_plain(self, call: Mapping[str, Any], cache: Any) -> Any:
        """Run the file's program for a call of plain tensors."""
        return self._table.run((), dict(call), {CACHE: cache})


@dataclass(frozen=True)
class SavedDecoder:
    """model: an object of the model's class, for `generate`. steps: runs its calls with a cache."""

    model: Any
    steps: SavedSteps


def open_decoder(
    saved: nn.Module, facts: Mapping[str, Any], parts: Mapping[str, CallTable]
) -> SavedDecoder:
    """Return the decoder of a file; its parameters are those of `saved`.

    Raises SavedFileError if this process cannot import the model's class.
    """
    place, _, name = str(facts["class"]).partition(":")
    try:
        cls: Any = import_module(place)
        for part in name.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise SavedFileError(
            f"generation is transformers' own, for the class {facts['class']}, which cannot be "
            f"imported here: {error}"
        ) from error
    config = cls.config_class.from_dict(dict(facts["config"]))
    config._attn_implementation = facts["attention"]
    with torch.device("meta"), torch.no_grad():
        model = cls(config)
    model.load_state_dict(saved.state_dict(keep_vars=True), strict=False, assign=True)
    model.eval()
    if facts["generation"] is not None:
        model.generation_config = type(model.generation_config).from_dict(facts["generation"])
    body = {"forward": _calling(cls, lambda *args, **kwargs: saved(*args, **kwargs))}
    if "encoder" in parts:
        body["get_encoder"] = _encoder_of(cls, parts["encoder"])
    model.__class__ = types.new_class(cls.__name__, (cls,), {}, lambda space: space.update(body))
    steps = SavedSteps(cls.__name__, facts, parts["steps"], model.device)
    return SavedDecoder(model, steps)


def _calling(cls: Any, run: Any) -> Any:
    """Return a forward with the signature of the class's own that calls `run`."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return forward


def _encoder_of(cls: Any, table: CallTable) -> Any:
    """Wrap `get_encoder`, through which `generate` runs the encoder, to return one that runs
    programs."""

    @functools.wraps(cls.get_encoder)
    def get(self: Any, *args: Any, **kwargs: Any) -> Any:
        part = cls.get_encoder(self, *args, **kwargs)
        own = type(part)
        body = {"forward": _calling(own, lambda *a, **k: table.run(a, k))}
        made = types.new_class(own.__name__, (own,), {}, lambda space: space.update(body))
        view: Any = object.__new__(made)
        object.__setattr__(view, "__dict__", part.__dict__)
        return view

    return get
