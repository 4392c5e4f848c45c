"""Call table: the programs of a saved file, and the lookup of the one that serves a call.

In: programs with the kinds of call that they serve, as JSON; a call. Out: its output; or an error
that lists the calls in the file::

    table.run((), {"input_ids": ids})  ->  the model's output, with its original nesting
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from turbotx.capture.ambient import Ambient, differences, read_ambient, read_asked, read_decisive
from turbotx.capture.arguments import carry, describe_leaf, flatten_call, is_float
from turbotx.capture.call_key import describe_kind
from turbotx.capture.decisions import Decisions, Outcomes, describe_last
from turbotx.capture.returned_arguments import ReturnedContainer, give_back
from turbotx.capture.shape_matcher import ShapeMatcher
from turbotx.capture.traced_float import FloatInput, describe_floats
from turbotx.errors import InputError, SavedFileError, TrainingError
from turbotx.runtime.binding import Binding
from turbotx.runtime.lru import LruDict
from turbotx.runtime.packed_program import PackedProgram
from turbotx.runtime.program import Program, Run, run_bound
from turbotx.runtime.token_inputs import Sequences, StandIns, run_sequences
from turbotx.saved.gpu_kernels import NoVariantError
from turbotx.saved.values import decode_constant, decode_tree

MOST_SHAPES = 256


MOST_RUNS = 8
"""Maximum number of runs per call, each for the decision outcomes that the previous one found."""


@dataclass(frozen=True)
class SavedCall:
    """A program, and the calls that it serves.

    floats, ambient, asked: the numbers and the PyTorch state with which it was traced.
    decisions: what it assumes of tensor values.
    out: the nesting of its output's leaves, as JSON.
    stepping: the indices of the dims that grow with every step of a decoder.
    returned: the containers of the arguments that the output holds.
    """

    program: Program
    matcher: ShapeMatcher
    floats: tuple[FloatInput, ...]
    ambient: Ambient
    asked: tuple[int, ...]
    decisions: Decisions | None
    out: Mapping[str, Any]
    stepping: tuple[int, ...] = ()
    returned: tuple[ReturnedContainer, ...] = ()

    def run(
        self, binding: Binding, tensors: list[torch.Tensor], run: Run = run_bound
    ) -> tuple[list[Any], Outcomes]:
        """Return the leaves of the output, and () or the outcomes of its decisions if they differ
        from those assumed. Raises SavedFileError if a launch of the file cannot run."""
        try:
            with torch.no_grad():
                leaves, dims = run(self.program, binding, tensors, None)
        except NoVariantError as error:
            named = zip(self.program.dims, binding.dims, strict=False)
            shown = ", ".join(f"{name}={size}" for name, size in named)
            raise SavedFileError(f"a call of {shown} cannot run: {error}") from error
        decisions = self.decisions
        return leaves, () if decisions is None else decisions.observe(leaves, dims)


class CallTable:
    """Programs by the kind of call that they serve, on one device."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._calls: dict[Any, list[SavedCall]] = {}
        self._bound: LruDict[Any, tuple[SavedCall, Binding]] = LruDict(MOST_SHAPES)
        self._known: dict[Any, SavedCall] = {}
        self._asked: tuple[int, ...] = ()
        self._asks_floats = self._steps = False
        self._padded: StandIns | None = None

    def calls(self) -> list[SavedCall]:
        """Return every call that it serves."""
        return [call for calls in self._calls.values() for call in calls]

    def first(self) -> tuple[tuple[Any, Any], SavedCall]:
        """Return the first kind of call (tree spec and leaves), and what serves it."""
        kind, (call, *_) = next(iter(self._calls.items()))
        return kind, call

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[SavedCall, Binding]:
        """Return what serves a call, bound to its shape; raise InputError if nothing does."""
        return self._find(args, kwargs, ())[0]

    def show(self) -> str:
        """Return the kinds of call in the file, written as calls."""
        return "; ".join(dict.fromkeys(_show(k) for k in self._calls))

    def add(self, made: SavedCall, call: Mapping[str, Any]) -> None:
        """Add a program. call: the kind of call that it serves, as JSON."""
        self._calls.setdefault(_key_of(call, self._place), []).append(made)
        self._asked = tuple(sorted({*self._asked, *made.asked}))
        self._steps |= bool(made.stepping)
        self._asks_floats |= any(x.is_particular for x in made.floats)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], swap: Mapping[str, Any] = {}
    ) -> Any:
        """Run a call and return its output.

        swap: replacements for placeholder strings among the output's leaves. Raises InputError,
        listing what the file holds, if no program serves the call.
        """
        call, leaves = self._run(args, kwargs, run_bound)
        if swap:
            leaves = [swap.get(x, x) if type(x) is str else x for x in leaves]
        output = decode_tree(call.out, leaves.__getitem__)
        return give_back(call.returned, args, kwargs, output)

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], run: Run
    ) -> tuple[SavedCall, list[Any]]:
        """Return what serves a call, whose decisions come out as assumed, and its leaves."""
        outcomes: Outcomes = ()
        for _ in range(MOST_RUNS):
            (call, binding), tensors = self._find(args, kwargs, outcomes)
            leaves, outcomes = call.run(binding, tensors, run)
            if not outcomes:
                return call, leaves
        raise InputError(f"{describe_last(outcomes)}, after {MOST_RUNS} runs of other ways")

    def run_packed(self, found: Sequences, name: str) -> Any:
        """Run sequences without padding and return their output. name: the model's.

        Raises InputError if no packed program serves them, TrainingError if an input requires grad.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in found.rows.values()):
            raise TrainingError("an input requires grad: call under torch.no_grad()")
        padded = self._padded or StandIns()
        standing, by_token = padded.make(found)

        def run(program: Any, binding: Any, tensors: Any, watch: Any) -> Any:
            if not isinstance(program, PackedProgram):
                raise InputError(f"the file's program of this call runs padded: {self.show()}")
            if program.takes_any_sizes:
                self._padded = padded
            return run_sequences(program, binding.dims, found, tensors, by_token, name)

        call, leaves = self._run((), standing, run)
        return decode_tree(call.out, leaves.__getitem__)

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], outcomes: Outcomes
    ) -> tuple[tuple[SavedCall, Binding], list[torch.Tensor]]:
        """Return what serves a call, and its tensors."""
        ambient = read_decisive() + read_asked(self._asked)
        kind = None
        if self._steps and not args and not outcomes:
            kind, tensors = describe_kind(kwargs, ambient)
            known = self._known.get(kind) if kind is not None else None
            dims = None if known is None else known.matcher.match([t.shape for t in tensors])
            if known is not None and dims is not None:
                return (known, known.program.bind_step(dims, known.stepping)), tensors
        leaves, spec = flatten_call(args, kwargs)
        tensors = carry(leaves)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise TrainingError("an input requires grad: call under torch.no_grad()")
        key = (spec, tuple(map(_describe, leaves)))
        numbers = tuple(x.hex() for x in leaves if is_float(x)) if self._asks_floats else ()
        shapes = (key, ambient, numbers, tuple(t.shape for t in tensors))
        found = None if outcomes else self._bound.get(shapes)
        if found is None:
            found = self._bind(key, tensors, outcomes)
            with self._lock:
                if kind is not None and found[0].stepping and not found[0].floats:
                    self._known[kind] = found[0]
                self._bound[shapes] = found
        return found, tensors

    def _bind(
        self, key: Any, tensors: list[torch.Tensor], outcomes: Outcomes
    ) -> tuple[SavedCall, Binding]:
        shapes, ambient = [t.shape for t in tensors], read_ambient()
        # A program for the default order of dims serves others through a dense copy.
        known = self._calls.get(key) or self._calls.get(_in_usual_order(key), [])
        differ = [differences(ambient, p.ambient, p.asked) for p in known]
        holding = [p for p, found in zip(known, differ, strict=True) if not found]
        if known and not holding:
            told = "; or ".join(dict.fromkeys("; ".join(found) for found in differ))
            raise InputError(
                f"no saved program was captured in the state that this call is made in: {told}. "
                "Call the optimized module in this state too before it is saved, or load's module "
                "in the other"
            )
        taking = [p for p in holding if all(x.takes(tensors) for x in p.floats)]
        if holding and not taking:
            told = "; or ".join(dict.fromkeys(describe_floats(p.floats) for p in holding))
            raise InputError(
                f"the model computes in another way for other numbers, and was saved for {told}: "
                "call the optimized module with this one too before it is saved"
            )
        for call in taking:
            dims = call.matcher.match(shapes)
            way = not outcomes or (call.decisions is not None and call.decisions.follow(outcomes))
            if dims is not None and way and call.program.serves(dims):
                return call, call.program.bind(dims)
        if outcomes:
            raise InputError(
                f"{describe_last(outcomes)}, and no saved program goes on from there: call the "
                "optimized module with such values too before it is saved"
            )
        refused = [p.matcher.explain(shapes) for p in taking]
        if refused:
            raise InputError(
                f"no saved program takes these sizes: {'; '.join(refused)}. Call the optimized "
                "module at such sizes too before it is saved"
            )
        for tensor in tensors:
            if tensor.device != self._place:
                raise InputError(
                    f"an input is on {tensor.device}, and this file was loaded for {self._place}: "
                    "move the inputs there, or give turbotx.load another device"
                )
        raise InputError(
            f"the file holds no call of this kind: {_show(key)}. It holds {self.show()}. Call the "
            "optimized module this way before it is saved"
        )


def show_call(call: Mapping[str, Any]) -> str:
    """Return a kind of call, given as JSON, written as a call."""
    return _show(_key_of(call, torch.device("cpu")))


def _key_of(call: Mapping[str, Any], place: torch.device) -> tuple[Any, Any]:
    kinds = [
        (float,) if kind == "float" else (decode_constant(kind), place, rank, *map(tuple, order))
        for kind, rank, *order in call["inputs"]
    ]
    args, kwargs = decode_tree(call["tree"], lambda k: _SavedArgument(kinds[k]))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return spec, tuple(map(_describe, leaves))


class _SavedArgument:
    """Represents an argument of a saved call: a tensor's dtype, device, rank and memory order, or a
    number."""

    def __init__(self, kind: tuple[Any, ...]) -> None:
        self.kind = kind


def _describe(leaf: Any) -> Any:
    """Return the part of an argument that selects the program."""
    return leaf.kind if isinstance(leaf, _SavedArgument) else describe_leaf(leaf)


def _in_usual_order(key: Any) -> Any:
    """Return the key of the same call with inputs in default memory order."""
    spec, described = key
    return spec, tuple(d[:3] if isinstance(d[0], torch.dtype) else d for d in described)


def _show(key: Any) -> str:
    spec, described = key
    shown = [
        f"{str(d[0]).removeprefix('torch.')}[{', '.join('?' * d[2])}]"
        if len(d) >= 3
        else "float"
        if len(d) == 1
        else repr(d[1])
        for d in described
    ]
    if not isinstance(spec, pytree.TreeSpec):
        return f"({', '.join(shown)}, in objects)"
    args, kwargs = pytree.tree_unflatten(shown, spec)
    return f"({', '.join([*map(str, args), *(f'{k}={v}' for k, v in kwargs.items())])})"
