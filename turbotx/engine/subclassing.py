"""Subclassing: generate a subclass of a model's class, for one object or for a whole class.

In: a module (optionally in place) or a module class. Out: an object that shares the module's state
and runs through turbotx, or a subclass whose instances do::

    make_twin(bert, Options())  ->  a BertModel, as OptimizedModule
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn

from turbotx.capture.composition import left_to_pytorch
from turbotx.engine.cached_engine import make_engine
from turbotx.engine.drop_in import OptimizedModule, original_of, tolerate
from turbotx.engine.engine import Engine
from turbotx.engine.parts import RUNNING, calls_of_parts, path_to_model
from turbotx.errors import TrainingError
from turbotx.options import Options

OWN_NAMES = ("stats", "reserve", "refresh", "packed", "graph")
"""Names that turbotx adds; if the model's class defines one of them, the model's stays."""


def make_twin(model: nn.Module, options: Options) -> Any:
    """Return another object with the state of `model` that runs through turbotx; `model` is
    unchanged."""
    made = _make_class(model, model, options, in_place=False)
    twin: Any = object.__new__(made)
    object.__setattr__(twin, "__dict__", model.__dict__)
    weakref.finalize(twin, _drop_engine, made).atexit = False
    return twin


def optimize_in_place(model: nn.Module, options: Options) -> Any:
    """Make the calls of `model` run through turbotx from now on; return `model`."""
    if isinstance(model, OptimizedModule) and "_turbotx_in_place" in vars(type(model)):
        type(model)._turbotx_engine = _make_engine(model._turbotx_engine.model, options)
        return model
    made = _make_class(model, _view(model, type(model)), options, in_place=True)
    model.__class__ = made
    weakref.finalize(model, _drop_engine, made).atexit = False
    return model


def optimize_class(cls: type[nn.Module], options: Options) -> type[nn.Module]:
    """Return a subclass whose instances run through turbotx; they are constructed as before."""

    def engine_of_instance(self: Any) -> Engine | None:
        found = self.__dict__.get("_turbotx_own_engine")
        return _own_engine(self, made, options) if found is None else found

    def state(self: Any) -> Any:
        below = getattr(super(made, self), "__getstate__", None)
        found = self.__dict__ if below is None else below()
        if not isinstance(found, dict):
            return found
        return {k: v for k, v in found.items() if k != "_turbotx_own_engine"}

    def reduce(self: Any, protocol: Any) -> Any:
        found = super(made, self).__reduce_ex__(protocol)
        if found[0] is copyreg.__newobj__ and type(self) is made and not _is_importable(made):  # type: ignore[attr-defined]
            return _instance_of, (cls, options), *found[2:]
        return found

    body = {
        "_turbotx_engine": property(engine_of_instance),
        "_turbotx_options": options,
        "__getstate__": state,
        "__reduce_ex__": reduce,
    }
    made: Any = _new_class(cls, body, ())
    return made


def renew_engine(instance: Any, options: Options) -> Any:
    """Give an instance of a subclass of a decorated class an engine with new options; return it."""
    own = instance._turbotx_engine
    renewed = instance.__dict__["_turbotx_own_engine"] = _make_engine(own.model, options)
    renewed.forward_is_models = own.forward_is_models
    return instance


def _own_engine(instance: Any, made: Any, options: Options) -> Engine | None:
    """Make the engine of an instance of a decorated class, or of a subclass of one."""
    own: Any = type(instance)
    if own is made:
        plain = made.__mro__[2]
    else:
        plain = type(own.__name__, (own,), {"_turbotx_made": True, "_turbotx_engine": None})
        plain.__module__, plain.__qualname__ = own.__module__, own.__qualname__
    engine = _make_engine(_view(instance, plain), options)
    engine.forward_is_models = own.forward is made.forward
    instance.__dict__["_turbotx_own_engine"] = engine
    return engine


# --- classes ---


def _make_engine(plain: nn.Module, options: Options) -> Engine:
    engine = make_engine(plain, options)
    tolerate(engine)
    return engine


def _make_class(model: nn.Module, plain: nn.Module, options: Options, in_place: bool) -> type:
    """Return a subclass of the class of `model` for one object. It holds that object's engine,
    which runs `plain`: the same state as an instance of the model's original class."""

    def again(copied: nn.Module, self: Any) -> Any:
        return _optimized_again(copied, self._turbotx_engine.options, in_place)

    def reduce(self: Any, protocol: Any) -> Any:
        engine = self._turbotx_engine
        return _optimized_again, (engine.model, engine.options, in_place)

    cls: Any = type(model)

    @functools.wraps(cls.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # A new object, as fast[:2] makes of nn.Sequential, is not the one of this class.
        if type(self) is made:
            self.__class__ = cls
        cls.__init__(self, *args, **kwargs)

    body: dict[str, Any] = {
        "__init__": init,
        # Functions here must not hold the engine: a class is freed late, the engine immediately.
        "_turbotx_engine": _make_engine(plain, options),
        "__repr__": lambda self: f"turbotx.optimize({self._turbotx_engine.model!r})",
        "__copy__": lambda self: again(copy.copy(self._turbotx_engine.model), self),
        "__deepcopy__": lambda self, memo: again(
            copy.deepcopy(self._turbotx_engine.model, memo), self
        ),
        "__reduce_ex__": reduce,
    }
    if in_place:
        body["_turbotx_in_place"] = True
    made: Any = _new_class(cls, body, _names_of(model))
    return cast(type, made)


def _new_class(cls: Any, body: dict[str, Any], names: Any) -> Any:
    """Return the subclass.

    names: attributes of the instance that its class does not have, submodules included.
    """
    for name in OWN_NAMES:
        if hasattr(cls, name):
            body[name] = inspect.getattr_static(cls, name)
    calls = calls_of_parts(cls, names)
    for name, parts in calls.items():
        body[name] = _method_with_parts(getattr(cls, name), name, parts)
    if hasattr(cls, "get_encoder"):
        body["get_encoder"] = _optimized_part(cls.get_encoder)
    passes = any(passed for parts in calls.values() for passed in parts.values())
    if passes or cls.__getattr__ is not nn.Module.__getattr__:
        body["__getattr__"] = _handing_on(cls.__getattr__)
    body["forward"] = functools.wraps(cls.forward)(_copy_of(OptimizedModule.forward))
    body |= {"__doc__": cls.__doc__, "__module__": cls.__module__, "_turbotx_made": True}
    bases = (OptimizedModule, cls)
    made: Any = types.new_class(cls.__name__, bases, {}, lambda space: space.update(body))
    made.__qualname__ = cls.__qualname__
    return made


def _copy_of(function: Any) -> Any:
    return types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip


def _names_of(model: nn.Module) -> dict[str, Any]:
    """Return what `nn.Module.__getattr__` would find beyond the instance's `__dict__`."""
    return {**model._parameters, **model._buffers, **model._modules}


def _view(model: nn.Module, cls: type) -> nn.Module:
    """Return another object of class `cls` with the same state."""
    made: nn.Module = object.__new__(cls)
    object.__setattr__(made, "__dict__", model.__dict__)
    return made


def _drop_engine(made: Any) -> None:
    """Free a class's engine together with its object: classes are in reference cycles, and would
    keep it alive until garbage collection."""
    made._turbotx_engine = None


def _optimized_again(model: nn.Module, options: Options, in_place: bool) -> Any:
    return (optimize_in_place if in_place else make_twin)(model, options)


def _instance_of(cls: type[nn.Module], options: Options) -> Any:
    return object.__new__(_class_of_copies(cast(Hashable, cls), options))


@functools.cache
def _class_of_copies(cls: Hashable, options: Options) -> type:
    return optimize_class(cast(type[nn.Module], cls), options)


def _is_importable(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


# --- methods ---


_passing: ContextVar[tuple[tuple[int, str], ...]] = ContextVar("turbotx_passing", default=())
"""Inside of methods that pass their call on: (id of the object, name of the submodule)."""


def _method_with_parts(method: Any, name: str, parts: Mapping[str, bool]) -> Any:
    """Return a method that meets optimized the submodules to which it passes its call on, and warns
    once about those that it runs in eager PyTorch."""

    @functools.wraps(method)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self._turbotx_engine
        own = [p for p, passed in parts.items() if not passed]
        plain = [p for p in own if not isinstance(getattr(self, p, None), OptimizedModule)]
        if engine is not None and plain and not left_to_pytorch():
            listed = ", ".join(f"self.{p}" for p in plain)
            engine.count_eager(
                f"{type(self).__name__}.{name} runs {listed} by itself, in PyTorch: optimize that "
                f"too, as in model.{plain[0]} = turbotx.optimize(model.{plain[0]})"
            )
        passed = ((id(self), p) for p in parts if parts[p])
        before = _passing.set((*_passing.get(), *passed))
        try:
            return method(self, *args, **kwargs)
        finally:
            _passing.reset(before)

    return told


def _optimized_part(method: Any) -> Any:
    """Wrap `get_encoder` of transformers' models, through which `generate` runs the encoder, to
    return an optimized encoder."""

    @functools.wraps(method)
    def get(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _twin_of_part(self, "encoder", method(self, *args, **kwargs))

    return get


def _handing_on(getter: Any) -> Any:
    """Wrap a class's `__getattr__` that hands on methods of a submodule, as those of PEFT's tuners
    do: what computes is then a method of the optimized submodule. So is a submodule itself to which
    a running method passes its call on."""

    def find(self: Any, name: str) -> Any:
        found = getter(self, name)
        if (id(self), name) in _passing.get():
            return _twin_of_part(self, f"self.{name}", found)
        if not name.startswith(RUNNING) or not isinstance(found, types.MethodType):
            return found
        part = _twin_of_part(self, name, found.__self__)
        return found if part is found.__self__ else getattr(part, name)

    return find


def _twin_of_part(self: Any, name: str, part: Any) -> Any:
    """Return a submodule optimized, kept under a name; the same object if it cannot be, or is."""
    engine = self._turbotx_engine
    if engine is None or not isinstance(part, nn.Module) or part.__dict__ is self.__dict__:
        return part
    if isinstance(part, OptimizedModule) or left_to_pytorch():
        return part
    return _kept_twin(engine, name, part, lambda: True)


def _kept_twin(engine: Engine, name: str, part: nn.Module, tolerates: Callable[[], bool]) -> Any:
    """Return a submodule optimized, among the engine's parts. tolerates: see `Engine`."""
    known = engine.parts.get(name)
    if known is None or known.__dict__ is not part.__dict__:
        known = engine.parts[name] = make_twin(part, engine.options)
        known._turbotx_engine.tolerates = tolerates
    return known


# --- wrappers ---


def _run_around(
    self: Any, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, Any]:
    """Run a refused call of a wrapper in PyTorch, with the model inside it through turbotx.

    This serves calls whose tensors are all inside containers, such as the features dict that a
    SentenceTransformer passes from part to part and writes to. Returns whether it applied, and the
    output.
    """
    engine = self._turbotx_engine
    if isinstance(error, TrainingError) or any(
        isinstance(x, torch.Tensor) for x in (*args, *kwargs.values())
    ):
        return False, None
    path = path_to_model(engine.model)
    inner = engine.model.get_submodule(".".join(path))
    if not path or isinstance(inner, OptimizedModule):
        return False, None
    part = _kept_twin(engine, "model", inner, engine.tolerates)
    views: list[tuple[nn.Module, nn.Module]] = []
    view: Any = _view_around(engine.model, path, part, views)
    try:
        return True, (view.forward if engine.calls_forward else view)(*args, **kwargs)
    finally:
        for module, seen in views:  # attributes that the call has set
            module.__dict__.update({k: v for k, v in seen.__dict__.items() if k != "_modules"})


def _view_around(
    module: nn.Module, path: tuple[str, ...], part: nn.Module,
    views: list[tuple[nn.Module, nn.Module]],
) -> nn.Module:  # fmt: skip
    """Return an object like `module` with `part` in place of the submodule at `path`."""
    name, *rest = path
    child = module._modules[name]
    inside = _view_around(cast(nn.Module, child), tuple(rest), part, views) if rest else part
    view = object.__new__(type(original_of(module)))
    state = {**module.__dict__, "_modules": {**module._modules, name: inside}}
    object.__setattr__(view, "__dict__", state)
    views.append((module, view))
    return cast(nn.Module, view)


OptimizedModule._turbotx_run_around = _run_around
