"""Drop-in: an object of a subclass of a model's own class, whose calls run through turbotx.

In: a module, or its class. Out: an instance that shares the module's `__dict__`, and so its
parameters, hooks, config and submodules in both directions; its methods meet turbotx wherever they
call it::

    fast = make_twin(bert, Options())
    isinstance(fast, BertModel), fast.encoder is bert.encoder  ->  (True, True)
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Hashable
from importlib import import_module
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module

from turbotx.composition import LeftToPyTorch, left_to_pytorch
from turbotx.engine import Engine
from turbotx.errors import CaptureError, EagerWarning, InputError, TrainingError
from turbotx.options import Options
from turbotx.parts import calls_of_parts

REFUSALS = (CaptureError, InputError, TrainingError)
"""What a method of the model's own class, `generate` for one, is not stopped by."""

REASON_LENGTH = 300
OWN_NAMES = ("stats", "reserve", "refresh", "profile", "graph", "_engine")
"""What turbotx adds; where the model has something of that name, the model's stays."""


class OptimizedModule(nn.Module):
    """A module that runs through turbotx and otherwise is the module that it was made from.

    It stands in front of the model's class in the order of bases; `super()` is the model.
    """

    turbotx_adds_nothing = True
    __jit_unused_properties__ = ("graph", "_engine", "_turbotx_engine")
    _turbotx_engine: Any = None
    """None for the model as it was, as inside of a trace."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A class that turbotx makes is none of the user's: no registry of theirs is to see it.
        if "_turbotx_made" not in cls.__dict__:
            super().__init_subclass__(**kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._turbotx_engine
        if engine is None or left_to_pytorch():
            return super().__call__(*args, **kwargs)
        if (self._forward_hooks or self._forward_pre_hooks or _every_module_has_hooks()) and (
            engine.calls_forward
        ):
            return super().__call__(*args, **kwargs)  # the hooks run; `forward` is turbotx's
        try:
            return engine(args, kwargs)
        except LeftToPyTorch:
            return super().__call__(*args, **kwargs)
        except REFUSALS as error:
            if not _may_go_on(engine, error):
                raise
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._turbotx_engine
        if engine is None or left_to_pytorch() or not engine.calls_forward:
            return super().forward(*args, **kwargs)
        try:
            return engine(args, kwargs)
        except LeftToPyTorch:
            return super().forward(*args, **kwargs)
        except REFUSALS as error:
            if not _may_go_on(engine, error):
                raise
            return super().forward(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        if self._turbotx_engine is not None:
            self._turbotx_engine.reset()
        return result

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # its parameters are others
        if self._turbotx_engine is not None:
            replica.__class__ = type(self._turbotx_engine.model)
        return replica

    # --- turbotx's own ---

    @property
    def _engine(self) -> Engine:
        return self._turbotx_engine

    def stats(self) -> dict[str, int]:
        """Return counts since the last reset: captures, kernel builds, plans, chunk allocations,
        and the calls that ran in PyTorch (`eager_calls`)."""
        return self._turbotx_engine.stats()

    def reserve(self, **dims: int) -> None:
        """Map the memory of the largest shape now, e.g. reserve(batch=8, seq=512)."""
        self._turbotx_engine.reserve(**dims)

    def profile(self, *args: Any, runs: int = 30, **kwargs: Any) -> Any:
        """Return the time of every launch of a call, medians over `runs`: a `report.Profile`.

        `.by_region()`, `.by_module()` and `.to_chrome_trace()` sum it up; `.overhead` says what
        measuring cost. The call is compiled anew, so that nothing else runs in it meanwhile.
        """
        explain = import_module("turbotx.report").explain  # later in the flow: on request only
        return explain(self, *args, **kwargs).profile(*args, runs=runs, **kwargs)

    @property
    def graph(self) -> fx.GraphModule:
        """The rewritten graph of the latest capture, an ordinary torch.fx.GraphModule."""
        from turbotx.fused_graph import make_fused_graph

        variants = self._turbotx_engine.variants()
        if not variants:
            raise CaptureError("nothing was captured yet: call the module once")
        return make_fused_graph(variants[-1])


def make_twin(model: nn.Module, options: Options) -> Any:
    """Return another object with the state of `model`, through turbotx; `model` stays as it was."""
    made = _make_class(model, model, options, in_place=False)
    twin: Any = object.__new__(made)
    object.__setattr__(twin, "__dict__", model.__dict__)
    weakref.finalize(twin, _let_go, made).atexit = False
    return twin


def optimize_in_place(model: nn.Module, options: Options) -> Any:
    """Return `model` itself, whose calls run through turbotx from now on."""
    if isinstance(model, OptimizedModule) and "_turbotx_in_place" in vars(type(model)):
        type(model)._turbotx_engine = _make_engine(model._turbotx_engine.model, options)
        return model
    made = _make_class(model, _view(model, type(model)), options, in_place=True)
    model.__class__ = made
    weakref.finalize(model, _let_go, made).atexit = False
    return model


def optimize_class(cls: type[nn.Module], options: Options) -> type[nn.Module]:
    """Return a subclass whose instances' calls run through turbotx; they are made as before."""

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
    """Return an instance of a subclass of a decorated class itself, with those options from now."""
    own = instance._turbotx_engine
    renewed = instance.__dict__["_turbotx_own_engine"] = _make_engine(own.model, options)
    renewed.calls_forward = own.calls_forward
    return instance


def _own_engine(instance: Any, made: type, options: Options) -> Engine | None:
    """Make the engine of an instance of a decorated class, or of a subclass of one."""
    own = type(instance)
    if own is made:
        plain = made.__mro__[2]
    else:
        plain = type(own.__name__, (own,), {"_turbotx_made": True, "_turbotx_engine": None})
        plain.__module__, plain.__qualname__ = own.__module__, own.__qualname__
    engine = _make_engine(_view(instance, plain), options)
    engine.calls_forward = engine.calls_forward and own.forward is made.forward  # type: ignore[attr-defined]
    instance.__dict__["_turbotx_own_engine"] = engine
    return engine


def original_of(model: Any) -> Any:
    """Return the module behind an optimized one, as it was; anything else is returned itself."""
    engine = getattr(model, "_turbotx_engine", None) if isinstance(model, OptimizedModule) else None
    return model if engine is None else engine.model


# --- classes ---


def _make_engine(plain: nn.Module, options: Options) -> Engine:
    engine = Engine(plain, options)
    _tolerate(engine)
    return engine


def _make_class(model: nn.Module, plain: nn.Module, options: Options, in_place: bool) -> type:
    """Return a subclass of the class of `model` for one object: it holds that object's engine,
    which runs `plain`, the same state as an object of the model's own class."""
    engine = _make_engine(plain, options)

    def again(copied: nn.Module) -> Any:
        return _optimized_again(copied, engine.options, in_place)

    def reduce(self: Any, protocol: Any) -> Any:
        return _optimized_again, (engine.model, engine.options, in_place)

    body: dict[str, Any] = {
        "_turbotx_engine": engine,
        "__repr__": lambda self: f"turbotx.optimize({engine.model!r})",
        "__copy__": lambda self: again(copy.copy(engine.model)),
        "__deepcopy__": lambda self, memo: again(copy.deepcopy(engine.model, memo)),
        "__reduce_ex__": reduce,
    }
    if in_place:
        body["_turbotx_in_place"] = True
    return _new_class(type(model), body, _names_of(model))


def _new_class(cls: type, body: dict[str, Any], names: Any) -> Any:
    """Return the subclass; `names`: what instances have that no class knows of, submodules too."""
    for name in OWN_NAMES:
        if hasattr(cls, name):
            body[name] = inspect.getattr_static(cls, name)
        elif name in names:
            body[name] = property(_found_inside(name))
    for name, parts in calls_of_parts(cls, names).items():
        body[name] = _telling(getattr(cls, name), name, parts)
    if hasattr(cls, "get_encoder"):
        body["get_encoder"] = _optimized_part(cls.get_encoder)
    body["forward"] = functools.wraps(cls.forward)(_copy_of(OptimizedModule.forward))  # type: ignore[attr-defined]
    body |= {"__doc__": cls.__doc__, "__module__": cls.__module__, "_turbotx_made": True}
    bases = (OptimizedModule, cls)
    made: Any = types.new_class(cls.__name__, bases, {}, lambda space: space.update(body))
    made.__qualname__ = cls.__qualname__
    return made


def _found_inside(name: str) -> Callable[[Any], Any]:
    return lambda self: nn.Module.__getattr__(self, name)


def _copy_of(function: Any) -> Any:
    return types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip


def _names_of(model: nn.Module) -> dict[str, Any]:
    """Return what `nn.Module.__getattr__` would find, less what lies in the instance itself."""
    return {**model._parameters, **model._buffers, **model._modules}


def _view(model: nn.Module, cls: type) -> nn.Module:
    """Return another object of the same state, of that class."""
    made: nn.Module = object.__new__(cls)
    object.__setattr__(made, "__dict__", model.__dict__)
    return made


def _let_go(made: Any) -> None:
    """Free a class's engine with its object: classes are in circles, and would keep it for long."""
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


def _telling(method: Any, name: str, parts: list[str]) -> Any:
    """Return a method that says once which submodules it runs by itself, past turbotx."""

    @functools.wraps(method)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self._turbotx_engine
        plain = [p for p in parts if not isinstance(getattr(self, p, None), OptimizedModule)]
        if engine is not None and plain and not left_to_pytorch():
            listed = ", ".join(f"self.{p}" for p in plain)
            engine.count_eager(
                f"{type(self).__name__}.{name} runs {listed} by itself, in PyTorch: optimize that "
                f"too, as in model.{plain[0]} = turbotx.optimize(model.{plain[0]})"
            )
        return method(self, *args, **kwargs)

    return told


def _optimized_part(method: Any) -> Any:
    """Return `get_encoder` of transformers' models, by which `generate` runs the encoder, with that
    encoder optimized."""

    @functools.wraps(method)
    def get(self: Any, *args: Any, **kwargs: Any) -> Any:
        part, engine = method(self, *args, **kwargs), self._turbotx_engine
        if engine is None or not isinstance(part, nn.Module) or part.__dict__ is self.__dict__:
            return part
        if isinstance(part, OptimizedModule) or left_to_pytorch():
            return part
        known = engine.parts.get("encoder")
        if known is None or known.__dict__ is not part.__dict__:
            known = engine.parts["encoder"] = make_twin(part, engine.options)
            _tolerate(known._turbotx_engine, always=True)
        return known

    return get


def _may_go_on(engine: Engine, error: Exception) -> bool:
    """Tell whether a call that turbotx refused runs in PyTorch instead, said once a reason: where
    a method of the model's own class made it. Who calls the model hears of the error."""
    if not engine.tolerates():
        return False
    reason = str(error).strip().splitlines()
    name = type(engine.model).__name__
    engine.count_eager(
        f"a call of {name} runs in PyTorch, not turbotx: {' '.join(reason[:2])[:REASON_LENGTH]}"
    )
    return True


def _tolerate(engine: Engine, always: bool = False) -> None:
    """Let an engine say of itself whether a call is one that may go on in PyTorch."""
    engine.tolerates = lambda: always or _is_called_by_a_method(engine.model.__dict__)


def _is_called_by_a_method(state: dict[str, Any]) -> bool:
    """Tell whether a method of the optimized object of that state is running in this thread."""
    frame: Any = sys._getframe(1)
    own = (__file__, nn_module.__file__)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_filename not in own:
            found = frame.f_locals.get(code.co_varnames[0])
            if isinstance(found, OptimizedModule) and found.__dict__ is state:
                return True
        frame = frame.f_back
    return False


def _every_module_has_hooks() -> bool:
    return bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


def _follow_property(module: nn.Module, name: str, value: Any) -> None:
    """Let `holder.auto_model = optimize(holder.auto_model)` mean what it says where `auto_model` is
    a property that gives another submodule: PyTorch registers a module beside it, never read."""
    if not isinstance(value, OptimizedModule) or not isinstance(
        getattr(type(module), name, None), property
    ):
        return
    original = original_of(value)
    for other, held in list(module._modules.items()):
        if held is original and getattr(module, name) is original:
            module._modules[other] = value


nn_module.register_module_module_registration_hook(_follow_property)

__all__ = ["EagerWarning", "OptimizedModule", "make_twin", "optimize_class", "optimize_in_place"]
