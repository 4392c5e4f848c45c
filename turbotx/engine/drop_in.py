"""Drop-in: an object of a subclass of a model's own class, whose calls run through turbotx.

In: a module, or its class. Out: an instance that shares the module's `__dict__`, and so its
parameters, hooks, config and submodules in both directions; its methods meet turbotx wherever they
call it::

    fast = make_twin(bert, Options())
    isinstance(fast, BertModel), fast.encoder is bert.encoder  ->  (True, True)
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import fx, nn
from torch.nn.modules import module as nn_module

from turbotx.capture.composition import LeftToPyTorch, left_to_pytorch
from turbotx.engine.engine import Engine
from turbotx.errors import CaptureError, EagerWarning, InputError, TrainingError
from turbotx.runtime.packed_parameter import PackedParameter

F = TypeVar("F", bound=Callable[..., Any])
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)
REFUSALS = (CaptureError, InputError, TrainingError)
"""What a method of the model's own class, `generate` for one, is not stopped by."""

REASON_LENGTH = 300
PYTORCH = str(Path(torch.__file__).parent)


is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_told_of: set[str] = set()


@torch.compiler.assume_constant_result
def tell_compiled(name: str) -> int:
    """Warn, once a class, while Dynamo traces an optimized model; tracing runs this."""
    if name not in _told_of:
        _told_of.add(name)
        warnings.warn(
            f"torch.compile compiles the code of {name} itself, and nothing of turbotx runs there: "
            "call the optimized model as it is, or give torch.compile the model from before, with "
            'backend="turbotx" for what needs graph breaks',
            EagerWarning,
        )
    return 0


class _Added:
    """What turbotx adds to a class of the user's: it gives way to whatever an instance has of that
    name, and PyTorch itself sees none of it: the name is free when it registers something there,
    and TorchScript, which looks at every name, finds no more than in the model."""

    def __init__(self, function: Callable[..., Any], value: str = "") -> None:
        """value: the name of an attribute that `function` computes, "" for a method."""
        self.function, self.is_value = function, bool(value)
        self.name, self.__doc__ = value or function.__name__, function.__doc__

    def __get__(self, instance: Any, cls: type) -> Any:
        if instance is None:
            return self.function
        for table in ("_parameters", "_buffers", "_modules"):
            if self.name in instance.__dict__.get(table, ()):
                return instance.__dict__[table][self.name]
        if sys._getframe(1).f_code.co_filename.startswith(PYTORCH):
            raise AttributeError(self.name)
        return (
            self.function(instance) if self.is_value else types.MethodType(self.function, instance)
        )


def _added(function: F) -> F:
    return cast(F, _Added(function))


if TYPE_CHECKING:

    class _ModuleOf(nn.Module, Generic[M_co]):
        """For type checkers: a module of which they know the class that it was made from."""
else:
    # A generic class among the bases of a user's class would change its order of bases.
    _ModuleOf = {M_co: nn.Module}


class OptimizedModule(_ModuleOf[M_co]):
    """A module that runs through turbotx and otherwise is the module that it was made from.

    It precedes the model's class in the method resolution order; `super()` is the model.
    """

    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(types.GenericAlias)  # OptimizedModule[BertModel]
    turbotx_adds_nothing = True
    __jit_unused_properties__ = ("_turbotx_engine",)
    _turbotx_engine: Any = None
    """None for the model as it was, as inside of a trace."""
    _turbotx_run_around: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A class that turbotx makes is none of the user's: no registry of theirs is to see it.
        if "_turbotx_made" not in cls.__dict__:
            super().__init_subclass__(**kwargs)

    # No docstrings: help() shows those of the model's own class.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        engine = self._turbotx_engine
        if engine is None or left_to_pytorch():
            if engine is not None and is_dynamo_compiling():
                tell_compiled(type(self).__name__)
            return super().__call__(*args, **kwargs)
        if (self._forward_hooks or self._forward_pre_hooks or _every_module_has_hooks()) and (
            engine.calls_forward
        ):
            return super().__call__(*args, **kwargs)  # the hooks run; `forward` is turbotx's
        try:
            return engine(args, kwargs)
        except LeftToPyTorch:
            pass
        except REFUSALS as error:
            done, output = self._turbotx_run_around(error, args, kwargs)
            if done:
                return output
            if not _may_go_on(engine, error):
                raise
        if not engine.calls_forward:
            return super().__call__(*args, **kwargs)
        return self.__dict__.get("forward", super().forward)(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        engine = self._turbotx_engine
        if engine is None or left_to_pytorch() or not engine.calls_forward:
            return super().forward(*args, **kwargs)
        if "forward" in self.__dict__:
            engine.count_eager(
                f"{type(self).__name__}.forward was replaced on the object, and what replaced it "
                "calls it in PyTorch: call the module, not its forward"
            )
            return super().forward(*args, **kwargs)
        try:
            return engine(args, kwargs)
        except LeftToPyTorch:
            return super().forward(*args, **kwargs)
        except REFUSALS as error:
            done, output = self._turbotx_run_around(error, args, kwargs)
            if done:
                return output
            if not _may_go_on(engine, error):
                raise
            return super().forward(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for held in self.parameters():
            if isinstance(held, PackedParameter) and fn(held) is not held:
                raise held.refusal("cannot convert")  # before the others are converted
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

    @_added
    def stats(self) -> dict[str, int]:
        """Return counts since the last reset: captures, kernel builds, plans, chunk allocations,
        the calls that ran in PyTorch (`eager_calls`), and runs that a branch on a tensor's values
        made vain (`decided_otherwise`)."""
        return self._turbotx_engine.stats()

    @_added
    def reserve(self, **dims: int) -> None:
        """Map the memory of the largest shape now, e.g. reserve(batch=8, seq=512).

        Raises InputError for a dim that no call so far has.
        """
        self._turbotx_engine.reserve(**dims)

    @_added
    def refresh(self) -> None:
        """Derive packed weights and constants again at the next call.

        Needed only where single elements were written through `.data`, or where parameters on a
        GPU were written through `.data` at all: every other change is noticed.
        """
        self._turbotx_engine.refresh()

    @_added
    def packed(self, *, lengths: Any = None, longest: int | None = None, **inputs: Any) -> Any:
        """Run sequences of any lengths without padding; needs optimize(padding="packed").

        inputs: by the names of forward's parameters, each flat (tokens, ...) beside `lengths`, the
        tokens of every sequence; or nested (torch.jagged); or a list of (length, ...). longest:
        what no length exceeds; with it nothing waits for lengths on a GPU. Returns the model's
        output, (tokens, ...) or nested or listed where forward's is (batch, seq, ...).
        Raises InputError where inputs do not fit, PackError where the model mixes tokens.
        """
        from turbotx.engine.packed_call import call_packed

        return call_packed(self._turbotx_engine, lengths, longest, inputs)

    def _make_graph(self) -> fx.GraphModule:
        """Return the rewritten graph of the latest capture, an ordinary torch.fx.GraphModule; of a
        model that was called with a key/value cache only, that of its steps."""
        from turbotx.engine.fused_graph import make_fused_graph

        engine = self._turbotx_engine
        parts = [part._turbotx_engine for part in engine.parts.values()]
        variants = engine.variants() or [v for part in parts for v in part.variants()]
        if not variants:
            raise CaptureError("nothing was captured yet: call the module once")
        return make_fused_graph(variants[-1])

    graph: fx.GraphModule = cast(fx.GraphModule, _Added(_make_graph, "graph"))


def original_of(model: Any) -> Any:
    """Return the module behind an optimized one, as it was; anything else is returned itself."""
    engine = getattr(model, "_turbotx_engine", None) if isinstance(model, OptimizedModule) else None
    return model if engine is None else engine.model


def _may_go_on(engine: Engine, error: Exception) -> bool:
    """Return whether a call that turbotx refused runs in PyTorch instead, said once a reason: where
    a method of the model's own class made it. Who calls the model hears of the error."""
    if not engine.tolerates():
        return False
    reason = str(error).strip().splitlines()
    name = type(engine.model).__name__
    engine.count_eager(
        f"a call of {name} runs in PyTorch, not turbotx: {' '.join(reason[:2])[:REASON_LENGTH]}"
    )
    return True


def tolerate(engine: Engine, always: bool = False) -> None:
    """Set whether an engine's refused calls may run in PyTorch instead."""
    state = engine.model.__dict__
    engine.tolerates = lambda: always or _is_called_by_a_method(state)


def _is_called_by_a_method(state: dict[str, Any]) -> bool:
    """Return whether a method of the optimized object of that state is running in this thread."""
    frame: Any = sys._getframe(1)
    own = (str(Path(__file__).parents[1]), nn_module.__file__)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and not code.co_filename.startswith(own):
            found = frame.f_locals.get(code.co_varnames[0])
            is_own = isinstance(found, OptimizedModule) and found.__dict__ is state
            if is_own and hasattr(type(found), code.co_name):
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
