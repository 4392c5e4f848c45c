"""`turbotx.optimize`: returns a faster equivalent of a module, a module class or a function.

In: a callable that takes tensors. Out: an equivalent callable, captured at the first call of each
kind (which arguments, dtypes, ranks, flags) and valid for any sizes afterwards::

    fast = turbotx.optimize(model)
    fast(input_ids=ids, attention_mask=mask)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from turbotx.capture.callables import CallableState, as_module
from turbotx.capture.composition import LeftToPyTorch, left_to_pytorch
from turbotx.capture.refusals import refuse_lazy
from turbotx.engine.drop_in import OptimizedModule, original_of
from turbotx.engine.engine import Engine
from turbotx.engine.subclassing import make_twin, optimize_class, optimize_in_place, renew_engine
from turbotx.errors import InputError, OptionsError
from turbotx.options import HEAD, OptionArguments, Options, make_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)
_NOTHING: Any = inspect.Parameter.empty
"""Default of `target` when used as a decorator with options; an explicit None is an error."""


def _optimize_function(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    module = as_module(function)
    engine = Engine(module, options)
    held = CallableState(function)
    held.register(module)

    @functools.wraps(function)
    def optimized(*args: Any, **kwargs: Any) -> Any:
        nonlocal held
        if left_to_pytorch():
            return function(*args, **kwargs)
        if held.have_changed():
            held = CallableState(function)
            held.register(module)
            engine.reset()
        try:
            return engine(args, kwargs)
        except LeftToPyTorch:
            return function(*args, **kwargs)

    shown = ("stats", "reserve", "refresh")
    own = {name: getattr(engine, name) for name in shown}
    optimized.__dict__.update(own, _turbotx_engine=engine)
    return optimized


def engine_of(target: Any) -> Engine:
    """Return the engine behind an object made by `optimize`, or make one for anything it accepts.

    A plain module or function gets a new engine with default options. Raises InputError for a
    class, OptionsError for what `optimize` does not accept.
    """
    if inspect.isclass(target):
        raise InputError(f"an instance is needed, not a class: create a {target.__name__} first")
    found = getattr(target, "_turbotx_engine", None)
    return found if isinstance(found, Engine) else engine_of(optimize(target))


@overload
def optimize(
    target: M, /, *, in_place: bool = False, **options: Unpack[OptionArguments]
) -> OptimizedModule[M]: ...
@overload
def optimize(target: type[M], /, **options: Unpack[OptionArguments]) -> type[M]: ...
@overload
def optimize(
    target: Callable[..., T], /, **options: Unpack[OptionArguments]
) -> Callable[..., T]: ...
@overload
def optimize(**options: Unpack[OptionArguments]) -> Callable[[F], F]: ...
def optimize(target: Any = _NOTHING, /, *, in_place: bool = False, **options: Any) -> Any:
    """Return a faster equivalent of `target`: an nn.Module, an nn.Module class or a function of
    tensors.

    Also a decorator, with or without options. The model is captured at the first call; the capture
    serves any batch size and sequence length. Outputs have the model's own structure and belong to
    the caller.

    Options, each described at `turbotx.options.Options`: backend, attention, planner, padding,
    pack_weights, keep_weights, quantize, keep_float, epilogues; on a GPU gemms, norms, pdl,
    cuda_graphs, max_graphs, schedules; max_shapes, max_variants, max_arenas, max_cache_nbytes;
    launch_ranges.

    For a module, the result is an instance of a subclass of the module's class and shares its
    state: parameters, attributes and hooks are the same in both. Methods such as `generate` run
    through turbotx wherever they call the model. Whatever runs in eager PyTorch raises an
    EagerWarning once per reason and is counted in `stats()["eager_calls"]`.
    in_place: change the given module itself.

    Raises OptionsError for an unknown option. The first call raises CaptureError if the model
    cannot be traced; any call raises TrainingError in training mode or if an input requires grad.
    """
    chosen = make_options(**options)
    if target is _NOTHING:
        return lambda real: optimize(real, in_place=in_place, **options)
    if isinstance(target, torch.jit.ScriptModule):
        raise OptionsError(
            f"{type(target).__name__} is TorchScript, whose code PyTorch runs by itself: give "
            "turbotx.optimize the module that it was made from"
        )
    if getattr(type(target), "compiled_by_turbotx", False):
        raise OptionsError(
            "what turbotx.load returns is compiled already, and has no graph to look at or to "
            "compile again: give turbotx the module that the file was saved from"
        )
    if isinstance(target, nn.Module):
        return _optimize_module(target, chosen, in_place)
    if in_place:
        raise OptionsError(f"in_place=True is for an nn.Module, and this is {target!r}")
    if inspect.isclass(target) and issubclass(target, nn.Module):
        return optimize_class(target, chosen)
    if callable(target) and not inspect.isclass(target):
        return _optimize_function(target, chosen)
    raise OptionsError(
        f"turbotx.optimize takes an nn.Module, an nn.Module class or a function, not {target!r}"
    )


def _optimize_module(module: nn.Module, options: Options, in_place: bool) -> Any:
    _refuse_unknown_names(module, options)
    refuse_lazy(module)
    if in_place:
        return optimize_in_place(module, options)
    original = original_of(module)
    if isinstance(original, OptimizedModule):
        return renew_engine(module, options)
    return make_twin(original, options)


def _refuse_unknown_names(module: nn.Module, options: Options) -> None:
    """Raise OptionsError if a pattern of `keep_float` matches no module."""
    names = [name for name, _ in module.named_modules()] if options.quantize != "none" else []
    for pattern in options.keep_float if names else ():
        if pattern != HEAD and not any(fnmatchcase(name, pattern) for name in names):
            raise OptionsError(
                f"keep_float={pattern!r} fits no module of {type(module).__name__}: patterns are "
                f"of dotted names, as {names[-1]!r}"
            )
