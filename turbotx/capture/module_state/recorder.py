"""State recorder: records which attributes the code under a trace reads and sets.

In: a model's forward, run with the recorder on. Out: per owner (a module, or an object of a user's
class reached from one) the names that were read before the code itself set them, and the names that
it set::

    with recorder.on():
        model(x)
    recorder.reads   ->  [(Encoder(), ["scale", "layers", ...]), (Config(), ["eps"])]

Meanwhile `__getattribute__` and `__setattr__` of nn.Module, and of the classes of objects met, are
replaced; other threads pay only for the check that they are not the tracing one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import proxy_tensor

from turbotx.capture.host_random import is_own_generator, look_at
from turbotx.capture.module_state.attribute_methods import active, patch, release
from turbotx.capture.module_state.dependence import depends_on_values
from turbotx.capture.module_state.values import (
    MAX_DEPTH,
    MISSING,
    dict_of,
    held_by,
    is_library,
    is_watchable,
)
from turbotx.errors import CaptureError

ALL = "__dict__"
"""The name that records a read of an object's whole `__dict__`."""
_UNREAD = frozenset(
    ("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_is_hf_initialized")
)
TABLES = ("_parameters", "_buffers", "_modules")
_WRITERS = frozenset(("register_buffer", "register_parameter", "add_module"))
_PROXY = getattr(proxy_tensor, "_AttrProxy", ())
"""PyTorch's stand-in for a module when tracing a model with shared modules."""


@dataclass
class Write:
    """A write by forward: `owner.name`, last set to `value`. read_first: whether it was read
    before. from_inputs: whether the value is a tensor computed from the call's values."""

    owner: Any
    name: str
    value: Any
    read_first: bool
    from_inputs: bool


class StateRecorder:
    """Records reads and writes of attributes in the thread that activated it."""

    def __init__(self) -> None:
        self._reads: dict[int, tuple[Any, dict[str, None]]] = {}
        self._writes: dict[tuple[int, str], Write] = {}
        self.kept: dict[tuple[int, str], tuple[Any, str]] = {}
        """Owner and name of each attribute that was set to the parameters that it held."""
        self._classes: list[type] = []
        self._met: dict[int, Any] = {}
        self._generators: list[tuple[Any, str | None]] = []
        self._inputs: Sequence[torch.Tensor] = ()
        self.gradients: list[nn.Module] = []
        """The module of each question whether a parameter requires gradients."""
        self._compiles = 0
        self._over = False
        self.open_reads: list[dict[tuple[int, str], tuple[Any, str]]] = []
        """Each takes what is read from now on, owner and name, also where it was read before."""
        self.modules: Sequence[nn.Module] = ()  # of the model
        self._made: set[int] = set()  # the ids of modules that the code itself made
        self._by_attributes: dict[int, nn.Module] = {}
        self._mapped: Sequence[nn.Module] = self.modules  # its source
        self.follows: Callable[[Any], bool] = lambda attributes: True
        """Returns whether writes to an object's attributes are restored and replayed."""
        self.also_meet: Callable[[Any], None] = lambda value: None
        """Called with every object that the code reaches."""
        self.original_of: Callable[[Any], Any] = lambda owner: owner
        """Returns the user's object for a copy that a trace uses in its place."""

    @property
    def reads(self) -> list[tuple[Any, list[str]]]:
        """Every object that was read, with the names of its attributes in the order of first
        reads."""
        return [(owner, list(names)) for owner, names in self._reads.values()]

    @property
    def writes(self) -> list[Write]:
        """The last write to each attribute, in the order of first writes."""
        return list(self._writes.values())

    def find_moved(self) -> list[Any]:
        """Return the random generators met that have advanced, or may have."""
        return [g for g, state in self._generators if state is None or look_at(g) != state]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context manager: make classes report to recorders; `on` inside it starts recording.
        Objects first met later, in functions that only a trace reveals, count as read entirely."""
        try:
            self._watch_class(nn.Module)
            with _told_of_compiles(self._pause, self._resume):
                yield
        finally:
            for cls in self._classes:
                release(cls)
            self._classes.clear()
            self._over = True

    def on(self, inputs: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Context manager: record what this thread reads, in a call with the tensors `inputs`."""
        self._writes.clear()
        self.kept.clear()
        self._inputs = inputs
        return _recording_by(self)

    def unnoted(self) -> AbstractContextManager[None]:
        """Note nothing inside the context, where turbotx itself looks at the code's objects."""
        return _recording_by(None)

    def _pause(self, *_: Any) -> None:
        """Leave classes as they are while Dynamo looks into them: a branch of torch.cond is traced
        by it, and it traces no replaced function."""
        if getattr(active, "recorder", None) is self or self._compiles:
            self._compiles += 1
            if self._compiles == 1:
                active.recorder = None
                for cls in self._classes:
                    release(cls)

    def _resume(self, *_: Any) -> None:
        """Resume recording; since reads in between were missed, all attributes of the modules count
        as read."""
        if self._compiles:
            self._compiles -= 1
            if self._compiles == 0:
                self._classes = [cls for cls in self._classes if patch(cls)]
                for module in self.modules:
                    own = vars(module)
                    tables = (own["_parameters"], own["_buffers"], own["_modules"])
                    plain = [n for n in own if not n.startswith("_")]
                    for name in (*plain, *(n for table in tables for n in table)):
                        self.note_read(module, name)
                active.recorder = self

    def meet(self, value: Any, depth: int = 0) -> None:
        """Record reads of an object that the code reaches, and of those that it holds."""
        if type(value) in (int, bool, str, float) or id(value) in self._met or depth > MAX_DEPTH:
            return
        self.also_meet(value)
        if is_own_generator(value):
            self._met[id(value)] = value
            self._generators.append((value, None if self._over else look_at(value)))
        if held := held_by(value):
            self._met[id(value)] = value
            for item in held:
                self.meet(item, depth + 1)
        if is_watchable(type(value)):
            self._met[id(value)] = value
            if self._over:
                self._note_whole(value, depth)
            else:
                self._watch_class(type(value))

    def _note_whole(self, owner: Any, depth: int) -> None:
        """Count all attributes of an object as read, except those that the traced code has set."""
        attributes = dict_of(owner)
        key = id(owner) if attributes is None else id(attributes)
        names = self._reads.setdefault(key, (self.find_own(owner), {}))[1]
        for name in [*(attributes or ()), *slots_of(type(owner))]:
            if (key, name) not in self._writes:
                names[name] = None
                self.meet(getattr(owner, name, None), depth + 1)

    def _watch_class(self, cls: type) -> None:
        if cls not in self._classes and patch(cls):
            self._classes.append(cls)

    def note_read(self, owner: Any, name: str) -> None:
        """Record that the traced code reads an attribute; reads by PyTorch and Python themselves
        are skipped."""
        if name.startswith("__"):
            if name != ALL or _asked_by_library():
                return
        elif name in _UNREAD or (name in TABLES and _asked_by_writer()):
            return
        attributes = dict_of(owner)
        key = id(owner) if attributes is None else id(attributes)
        for noted in self.open_reads:
            noted.setdefault((key, name), (owner, name))
        entry = self._reads.get(key)
        if entry is None:
            entry = self._reads[key] = (self.find_own(owner), {})
        names = entry[1]
        if name in names or (key, name) in self._writes:
            return
        names[name] = None
        if attributes is not None and name in attributes:
            self.meet(attributes[name])
            return
        # A class attribute, perhaps a descriptor of the user's.
        held = next((vars(c)[name] for c in type(owner).__mro__ if name in vars(c)), MISSING)
        if held is not MISSING:
            self.meet(held)
        elif attributes is not None and _computes_attributes(owner):
            self._note_whole(owner, 0)  # of which it may make what it gives

    def note_write(self, owner: Any, name: str, value: Any) -> None:
        """Record that the traced code sets an attribute; raises CaptureError if the write could not
        be replayed after a call."""
        attributes = dict_of(owner)
        key = id(owner) if attributes is None else id(attributes)
        if id(owner) in self._met and (attributes is None or not self.follows(attributes)):
            raise CaptureError(
                f"its code sets {name!r} of a {type(owner).__name__}, which a program cannot do "
                "(its class has __slots__, or it lies too deep in containers): keep it in an "
                "attribute of the module, or return it"
            )
        tensor = isinstance(value, torch.Tensor)
        computed = tensor and depends_on_values(value, self._inputs)
        known = self._writes.get((key, name))
        if known is not None:
            known.value, known.from_inputs = value, computed
            return
        read = name in self._reads.get(key, (None, {}))[1]
        self._writes[key, name] = Write(self.find_own(owner), name, value, read, computed)

    def note_kept(self, attributes: dict[str, Any], name: str) -> bool:
        """Record that a write left an attribute as it was; returns False if it was not seen."""
        write = self._writes.get((id(attributes), name))
        if write is not None:
            self.kept[id(attributes), name] = write.owner, name
        return write is not None

    def note_made(self, module: nn.Module) -> None:
        """Record that the traced code makes a module, such as a slice of a ModuleList."""
        self._made.add(id(module))

    def is_made(self, owner: Any) -> bool:
        """Return whether the traced code made a module: each call makes its own, from what is
        recorded otherwise."""
        return id(owner) in self._made and isinstance(owner, nn.Module)

    def find_own(self, owner: Any) -> Any:
        """Return the user's object for its stand-in under the trace."""
        if _PROXY and isinstance(owner, _PROXY):
            attributes = object.__getattribute__(owner, "__dict__")
            try:
                # Reading an attribute here would be recorded, recursively.
                owner = type(owner).get_base(owner)
            except KeyError:  # under construction: find the module with the same attributes
                same = (m for m in self.modules if dict_of(m) is attributes)
                owner = next(same, owner)
        return self.original_of(owner)

    def find_known(self, module: Any) -> Any:
        """Return the user's module for a stand-in of one of the model's; others as they are.
        Compares only the identity of their attribute dicts."""
        attributes = id(object.__getattribute__(module, "__dict__"))
        if self._mapped is not self.modules:
            self._by_attributes = {id(dict_of(m)): m for m in self.modules}
            self._mapped = self.modules
        known = self._by_attributes.get(attributes)
        return module if known is None else self.original_of(known)


@contextmanager
def _recording_by(recorder: StateRecorder | None) -> Iterator[None]:
    before, active.recorder = getattr(active, "recorder", None), recorder
    try:
        yield
    finally:
        active.recorder = before


@contextmanager
def _told_of_compiles(begin: Callable[..., None], end: Callable[..., None]) -> Iterator[None]:
    """Context manager: call `begin` and `end` around every compilation by Dynamo."""
    handler = import_module("torch._dynamo.callback").callback_handler
    handler.register_start_callback(begin)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        handler.remove_start_callback(begin)
        handler.remove_end_callback(end)


def _computes_attributes(owner: Any) -> bool:
    """Return whether a class of the user's gives attributes that its objects do not have, perhaps
    of a dict that it reads past all records, by `object.__getattribute__`."""
    getter = getattr(type(owner), "__getattr__", None)
    return not isinstance(owner, nn.Module) and not is_library(getattr(getter, "__module__", None))


def slots_of(cls: type) -> list[str]:
    """Return the names of the slots of a class and its bases."""
    found = [base.__dict__.get("__slots__", ()) for base in cls.__mro__]
    return [n for names in found for n in ((names,) if isinstance(names, str) else names)]


def _asked_by_library() -> bool:
    """Return whether PyTorch or Python itself read `x.__dict__`, to look up a name that is recorded
    separately."""
    frame = sys._getframe(3)  # skips note_read and the replaced __getattribute__
    return is_library(frame.f_globals.get("__name__"))


def _asked_by_writer() -> bool:
    """Return whether PyTorch read a module's table to write to it, or to find the module being
    traced."""
    frame = sys._getframe(3)
    home = frame.f_globals.get("__name__", "")
    return frame.f_code.co_name in _WRITERS or home.startswith(("torch._functorch", "torch.export"))
