"""`turbotx.optimize`: returns a faster equivalent of a module, a module class or a function.

In: something that is called with tensors. Out: the same thing to its caller, captured at the
first call of each kind (which arguments, dtypes, ranks, flags) for any sizes afterwards::

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

from turbotx.capture.composition import LeftToPyTorch, left_to_pytorch
from turbotx.engine.callables import CallableState, as_module
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
"""What `optimize` is given as a decorator with options; None is a mistake of the caller's."""


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
    """Return the engine behind anything that `optimize` made, or made of anything it takes.

    A plain module or function gets an engine of default options, which nothing else uses. Raises
    InputError for a class, OptionsError for what `optimize` does not take.
    """
    if inspect.isclass(target):
        raise InputError(f"an instance is needed, not a class: make one of {target.__name__} first")
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
    """Return `target` made faster: an nn.Module, an nn.Module class or a function of tensors.

    Also a decorator, bare or with options. Capture happens at the first call; any batch size and
    sequence length is served by it afterwards. Outputs have the model's own structure and belong to
    the caller.

    Options, each described at `turbotx.options.Options`: backend, attention, planner, padding,
    pack_weights, keep_weights, quantize, keep_float, epilogues; on a GPU gemms, norms, pdl,
    cuda_graphs, max_graphs, schedules; max_shapes, max_variants, max_arenas, max_cache_nbytes;
    launch_ranges.

    A module becomes an object of a subclass of its own class, which shares its state: parameters,
    attributes and hooks are the same in both, and methods such as `generate` go through turbotx
    wherever they call the model; what they run in PyTorch is said by an EagerWarning, once a
    reason, and counted in `stats()["eager_calls"]`. in_place: change the given module itself.

    Raises OptionsError for an unknown option; the first call raises CaptureError where the model
    cannot be traced, and any call raises TrainingError in training mode or where an input
    requires grad.
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
    if in_place:
        return optimize_in_place(module, options)
    original = original_of(module)
    if isinstance(original, OptimizedModule):
        return renew_engine(module, options)
    return make_twin(original, options)


def _refuse_unknown_names(module: nn.Module, options: Options) -> None:
    """Raise OptionsError for a pattern of `keep_float` that fits no module."""
    names = [name for name, _ in module.named_modules()] if options.quantize != "none" else []
    for pattern in options.keep_float if names else ():
        if pattern != HEAD and not any(fnmatchcase(name, pattern) for name in names):
            raise OptionsError(
                f"keep_float={pattern!r} fits no module of {type(module).__name__}: patterns are "
                f"of dotted names, as {names[-1]!r}"
            )
