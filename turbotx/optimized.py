"""`turbotx.optimize`: a module, a module class or a function becomes a faster one.

In: something that is called with tensors. Out: the same thing to its caller, captured at the
first call of each kind (which arguments, dtypes, ranks, flags) for any sizes afterwards::

    fast = turbotx.optimize(model)
    fast(input_ids=ids, attention_mask=mask)
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, TypeVar, overload

import torch
from torch import fx, nn

from turbotx.engine import Engine
from turbotx.errors import CaptureError, InputError, OptionsError
from turbotx.options import Options, make_options

T = TypeVar("T")


class OptimizedModule(nn.Module):
    """A module that runs through turbotx and otherwise is the module it was made from.

    Parameters, buffers, state_dict and attributes are the original's own. `.to(...)` and the like
    move the original and forget the captures.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        # nn.Module's own __init__ is left out on purpose: with no state of its own here, every
        # attribute that nn.Module's methods use is found on the original.
        object.__setattr__(self, "_original", model)
        object.__setattr__(self, "_engine", Engine(model, options))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(args, kwargs)

    __call__ = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)

    def __repr__(self) -> str:
        return f"turbotx.optimize({self._original!r})"

    def __reduce__(self) -> Any:
        return OptimizedModule, (self._original, self._engine.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        return OptimizedModule(copy.deepcopy(self._original, memo), self._engine.options)

    def train(self, mode: bool = True) -> OptimizedModule:
        self._original.train(mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._original._apply(fn, recurse)
        self._engine.reset()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self._original.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return self._original.named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return self._original.named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return self._original.named_children()

    # --- turbotx's own ---

    def stats(self) -> dict[str, int]:
        """Return counts since the last reset: captures, kernel builds, plans, chunk allocations."""
        return self._engine.stats()

    def reserve(self, **dims: int) -> None:
        """Map the memory of the largest shape now, e.g. reserve(batch=8, seq=512)."""
        self._engine.reserve(**dims)

    def refresh(self) -> None:
        """Derive packed weights and constants again at the next call.

        Needed only where single elements were written through `.data`, or where parameters on a
        GPU were written through `.data` at all: every other change is noticed.
        """
        self._engine.refresh()

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

        variants = self._engine.variants()
        if not variants:
            raise CaptureError("nothing was captured yet: call the module once")
        return make_fused_graph(variants[-1])


class FunctionModule(nn.Module):
    """A function of tensors as a module, so that there is one way to capture."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.turbotx_signature_of = function
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _optimize_function(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    module = FunctionModule(function)
    module.__class__ = type(function.__name__, (FunctionModule,), {})
    engine = Engine(module, options)

    @functools.wraps(function)
    def optimized(*args: Any, **kwargs: Any) -> Any:
        return engine(args, kwargs)

    optimized.stats = engine.stats  # type: ignore[attr-defined]
    optimized.reserve = engine.reserve  # type: ignore[attr-defined]
    optimized.refresh = engine.refresh  # type: ignore[attr-defined]
    optimized._engine = engine  # type: ignore[attr-defined]
    return optimized


def _optimize_class(cls: type[nn.Module], options: Options) -> type[nn.Module]:
    """Return a subclass whose calls run through turbotx; instances are made as before."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = engine_of(self)
        if engine.called_plainly:
            return nn.Module.__call__(self, *args, **kwargs)
        return engine(args, kwargs)

    def apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        result = nn.Module._apply(self, fn, recurse)
        if "_turbotx_engine" in self.__dict__:
            self.__dict__["_turbotx_engine"].reset()
        return result

    def stats(self: Any) -> dict[str, int]:
        return self._turbotx_engine.stats() if "_turbotx_engine" in self.__dict__ else {}

    body: dict[str, Any] = {
        "__call__": call,
        "_apply": apply,
        "stats": stats,
        "__doc__": cls.__doc__,
    }
    body["_turbotx_options"] = options
    made = type(cls.__name__, (cls,), body)
    made.__module__, made.__qualname__ = cls.__module__, cls.__qualname__
    return made


def engine_of(target: Any) -> Engine:
    """Return the engine behind anything that `optimize` made, or made of anything it takes.

    A plain module or function gets an engine of default options, which nothing else uses. Raises
    InputError for a class, OptionsError for what `optimize` does not take.
    """
    if inspect.isclass(target):
        raise InputError(f"an instance is needed, not a class: make one of {target.__name__} first")
    own = getattr(target, "__dict__", {})
    for name in ("_engine", "_turbotx_engine"):
        if isinstance(own.get(name), Engine):
            return own[name]
    options = getattr(type(target), "_turbotx_options", None)
    if options is None:
        return engine_of(optimize(target))
    object.__setattr__(target, "_turbotx_engine", Engine(target, options))
    return target.__dict__["_turbotx_engine"]


@overload
def optimize(target: nn.Module, /, **options: Any) -> OptimizedModule: ...
@overload
def optimize(target: Callable[..., T], /, **options: Any) -> Callable[..., T]: ...
@overload
def optimize(target: None = None, /, **options: Any) -> Callable[[Any], Any]: ...
def optimize(target: Any = None, /, **options: Any) -> Any:
    """Return `target` made faster: an nn.Module, an nn.Module class or a function of tensors.

    Also a decorator, bare or with options (see `turbotx.options.Options`). Capture happens at the
    first call; any batch size and sequence length is served by it afterwards. Outputs have the
    model's own structure and belong to the caller.

    Raises OptionsError for an unknown option; the first call raises CaptureError where the model
    cannot be traced, and any call raises TrainingError in training mode or where an input
    requires grad.
    """
    chosen = make_options(**options)
    if target is None:
        return lambda real: optimize(real, **options)
    if isinstance(target, OptimizedModule):
        return optimize(target._original, **options)
    if isinstance(target, nn.Module):
        return OptimizedModule(target, chosen)
    if inspect.isclass(target) and issubclass(target, nn.Module):
        return _optimize_class(target, chosen)
    if callable(target) and not inspect.isclass(target):
        return _optimize_function(target, chosen)
    raise OptionsError(
        f"turbotx.optimize takes an nn.Module, an nn.Module class or a function, not {target!r}"
    )
