"""A fuzzer of assumptions: random modules, and sequences of calls with changes between them.

In: a seed. Out: what came of its sequence: failures (another result than eager's, or an error that
is no TurbotxError), each with the fewest pieces and steps that show it, and refusals, by kind::

    python -m tests.assumptions --seed 0 --count 200 [--backend aten]
    200 sequences, 1534 calls, 31 of them refused, 0 failures
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

import turbotx
from tests.assumption_pieces import WIDTH, Piece, forget_globals
from tests.assumption_results import difference, is_rounding
from tests.assumption_weights import PIECES, Pair
from turbotx.errors import TurbotxError

PER_MODULE = 20
"""So many sequences in a row are made with one module, each going on where the last one ended: so
captures are shared, and states come back."""

SIZES = (0, 1, 2, 3, 4, 5, 7)
LAYOUTS = ("dense", "dense", "transposed", "slice", "offset", "expanded", "folded")
FORMS = ("tensor", "tuple", "dict", "pair", "sizes", "views", "nothing", "state")
TRIES = 60
"""How often a failure is run again to make it smaller."""


@dataclass(frozen=True)
class Step:
    """A change, by the number of the piece or "call", "model"; whether a call follows."""

    target: int | str
    change: str
    n: int
    calls: bool = True

    def __str__(self) -> str:
        return f"{self.target}.{self.change}({self.n}){'' if self.calls else ' (no call)'}"


@dataclass(frozen=True)
class Spec:
    """A module: number, class and drawn kind of each piece."""

    pieces: tuple[tuple[int, type[Piece], int], ...]
    seed: int

    def build(self) -> Composed:
        forget_globals()
        torch.manual_seed(self.seed)
        model = Composed()
        for number, kind, drawn in self.pieces:
            piece = kind(random.Random(drawn))
            model.pieces.add_module(f"p{number}", piece)
        return model.eval()

    def __str__(self) -> str:
        return ", ".join(f"{n}: {c.__name__}({k})" for n, c, k in self.pieces)


class Composed(nn.Module):
    """Pieces one after the other; `form` is what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.ModuleDict()
        self.form = "tensor"

    def forward(self, x: torch.Tensor, **given: Any) -> Any:
        first = x
        for name, piece in self.pieces.items():
            x = piece(x, given.get(name))
        made = {
            "tuple": lambda: (x, x * 2),
            "dict": lambda: {"x": x, "n": 3, "none": None},
            "pair": lambda: Pair(x, [x.sum(-1)]),
            "sizes": lambda: (x, x.shape[1], x.shape, x.dim(), x.dtype is torch.float32),
            "views": lambda: (x[:, :1], x.transpose(0, 1), x.mT, x),
            "nothing": lambda: (None, x.mean(-1), [], {}),
            "state": lambda: (first, *(p * 1 for p in self.parameters()), x),
        }
        return made[self.form]() if self.form in made else x


@dataclass
class Situation:
    """All of a call but the module: sizes, layout, numbers of arguments, the state around it."""

    batch: int = 2
    seq: int = 3
    layout: str = "dense"
    data: int = 0
    autocast: bool = False
    grad: str = "grad"
    default: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    arguments: dict[str, int] = field(default_factory=dict)

    def change(self, name: str, n: int) -> None:
        options: dict[str, Sequence[Any]] = {
            "batch": SIZES, "seq": SIZES, "layout": LAYOUTS, "data": range(1000),
            "autocast": (True, False, False), "grad": ("grad", "no_grad", "inference"),
            "default": (torch.float32, torch.float32, torch.float64),
            "dtype": (torch.float32, torch.float32, torch.float64, torch.bfloat16),
        }  # fmt: skip
        if name in options:
            setattr(self, name, options[name][n % len(options[name])])
        else:
            self.arguments[name] = n

    @contextmanager
    def around(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        grad = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
        with ExitStack() as stack:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(self.default)
            stack.enter_context(grad.get(self.grad, torch.enable_grad)())
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=self.autocast))
            yield

    def inputs(self, model: Composed) -> tuple[torch.Tensor, dict[str, Any]]:
        b, t = self.batch, self.seq
        drawn = torch.Generator().manual_seed(self.data)
        x = torch.randn(2 * b + 1, 2 * t + 1, WIDTH, generator=drawn, dtype=torch.float64)
        x = x.to(self.dtype)
        part = x[:b, :t]
        x = {
            "transposed": lambda: part.transpose(0, 1).contiguous().transpose(0, 1),
            "slice": lambda: x[: 2 * b : 2, : 2 * t : 2],
            "offset": lambda: x[b : 2 * b, 1 : t + 1],
            "expanded": lambda: x[:1, :t].expand(b, t, WIDTH),
            "folded": lambda: part.transpose(1, 2).contiguous().transpose(1, 2),
        }.get(self.layout, part.contiguous)()
        given = {}
        for name, piece in model.pieces.items():
            if piece.argument is not None and name in self.arguments:
                given[name] = piece.argument(self.arguments[name], x)
        return x, given


@dataclass(frozen=True)
class Failure:
    """What went wrong: its kind ("values", "strides", "crash TypeError", ...) and the details."""

    kind: str
    text: str
    step: int


@dataclass
class Tally:
    """What many sequences came to."""

    sequences: int = 0
    calls: int = 0
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    known: collections.Counter[Any] = field(default_factory=collections.Counter)


class Run:
    """One module with what turbotx made of it, and the situation that its next call is in."""

    def __init__(self, spec: Spec, backend: str, tally: Tally) -> None:
        self.model, self.situation, self.tally = spec.build(), Situation(), tally
        self.fast = turbotx.optimize(self.model, backend=backend)

    def play(self, steps: Sequence[Step]) -> Failure | None:
        """Change and call; return the first failure."""
        for k, step in enumerate(steps):
            self._change(step)
            if step.calls and (found := self._compare(k)) is not None:
                return found
        return None

    def _change(self, step: Step) -> None:
        if step.target == "call":
            self.situation.change(step.change, step.n)
        elif step.target == "form":
            self.model.form = FORMS[step.n % len(FORMS)]
        elif step.target == "model":
            self.situation.change("dtype", step.n)
            self.model.to(self.situation.dtype)
        elif f"p{step.target}" in self.model.pieces:
            getattr(self.model.pieces[f"p{step.target}"], step.change)(step.n)

    def _compare(self, k: int) -> Failure | None:
        self.tally.calls += 1
        situation = self.situation
        with situation.around(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, given = situation.inputs(self.model)
            try:
                right, wrong = self.model(x, **given), None
            except Exception as error:
                right, wrong = None, error
            try:
                came = self.fast(x, **given)
            except TurbotxError as error:
                if wrong is None:
                    self.tally.refusals[shorten(error)] += 1
                return None
            except Exception as error:
                if wrong is not None:
                    return None
                return Failure(f"crash {type(error).__name__}", str(error)[:400], k)
            if wrong is not None:
                return Failure("no error", f"eager raises {wrong!r:.200}", k)
            # Of a result in a wider dtype too, where what it was made of was rounded.
            rounded = situation.autocast or situation.dtype is torch.bfloat16
            single = situation.dtype is torch.float32
            found = difference(right, came, 0.08 if rounded else 2e-4 if single else 0.0)
            if found is not None and found[0] == "values" and rounded:
                found = None if is_rounding(self.model, (x,), given, right, came) else found
            if found is None:
                _scribble(right, came, [x, *pytree.tree_leaves(given), *self.model.parameters()])
        return None if found is None else Failure(*found, k)


def shorten(error: Exception) -> str:
    """Return a refusal's kind: its class and its words without numbers and paths."""
    text = " ".join(str(error).split())
    text = re.sub(r" at /\S+:\d+: .*?(?=  |\w+Error|$)", " ", text)
    return f"{type(error).__name__}: {re.sub(r'[0-9]+', '#', text)[:170]}"


def _scribble(right: Any, came: Any, kept: Sequence[Any]) -> None:
    """Write into what is the caller's own: no later call may see it."""
    held = {t.untyped_storage().data_ptr() for t in kept if isinstance(t, torch.Tensor)}
    pairs = zip(pytree.tree_leaves(right), pytree.tree_leaves(came), strict=True)
    for x, y in pairs:
        if isinstance(y, torch.Tensor) and x.untyped_storage().data_ptr() not in held:
            with torch.no_grad():
                y.untyped_storage().fill_(77)


def make_spec(seed: int) -> Spec:
    """Return the module of a group of sequences."""
    draw = random.Random(seed)
    drawn = [(i, draw.choice(PIECES), draw.randrange(1000)) for i in range(draw.randint(2, 4))]
    return Spec(tuple(drawn), seed)


def make_steps(spec: Spec, seed: int) -> list[Step]:
    """Return 5 to 10 steps for a module."""
    draw = random.Random(f"steps {seed}")
    arguments = [f"p{i}" for i, kind, _ in spec.pieces if kind.argument is not None]
    changes = [(i, name) for i, kind, _ in spec.pieces for name in kind.changes()]
    steps = []
    for _ in range(draw.randint(5, 10)):
        target: int | str
        kind = draw.random()
        if changes and kind < 0.5:
            target, name = draw.choice(changes)
        elif arguments and kind < 0.65:
            target, name = "call", draw.choice(arguments)
        elif kind < 0.9:
            sizes = ["batch", "seq"] * 2
            names = [*sizes, "layout", "data", "autocast", "grad", "default"]
            target, name = "call", draw.choice(names)
        elif kind < 0.97:
            target, name = "form", "of the result"
        else:
            target, name = "model", "to"
        steps.append(Step(target, name, draw.randrange(1000), draw.random() < 0.85))
    return [*steps[:-1], replace(steps[-1], calls=True)]


def minimize(spec: Spec, steps: list[Step], kind: str, backend: str) -> tuple[Spec, list[Step]]:
    """Drop steps, calls and pieces one by one while the failure's kind stays."""
    tries = TRIES

    def fails(spec: Spec, steps: Sequence[Step]) -> bool:
        nonlocal tries
        tries -= 1
        found = Run(spec, backend, Tally()).play(steps)
        return found is not None and found.kind == kind

    size = len(steps) // 2
    while size and tries > 0:
        i = 0
        while i < len(steps) and tries > 0:
            if len(fewer := steps[:i] + steps[i + size :]) and fails(spec, fewer):
                steps = fewer
            else:
                i += size
        size //= 2
    for piece in spec.pieces:
        less = replace(spec, pieces=tuple(p for p in spec.pieces if p != piece))
        if tries > 0 and len(spec.pieces) > 1 and fails(less, steps):
            spec, steps = less, [s for s in steps if s.target != piece[0]]
    for i, step in enumerate(steps):
        fewer = [*steps[:i], replace(step, calls=False), *steps[i + 1 :]]
        if tries > 0 and step.calls and fails(spec, fewer):
            steps = fewer
    return spec, steps


def run_sequences(
    seed: int, count: int, backend: str = "aten", tally: Tally | None = None
) -> Tally:
    """Run sequences `seed` to `seed + count`; those of one module go on from each other."""
    tally = tally or Tally()
    k = seed
    while k < seed + count:
        spec = make_spec(k // PER_MODULE)
        end = min((k // PER_MODULE + 1) * PER_MODULE, seed + count)
        run, played = Run(spec, backend, tally), []
        for number in range(k, end):
            steps = make_steps(spec, number)
            found = run.play(steps)
            tally.sequences += 1
            if found is None:
                played += steps
                continue
            played += steps[: found.step + 1]
            alike = (spec, found.kind, re.sub(r"[0-9]+", "#", found.text)[:60])
            tally.known[alike] += 1
            if tally.known[alike] > 1:  # said already, of this module
                run, played = Run(spec, backend, tally), []
                continue
            alone = Run(spec, backend, Tally()).play(steps)
            if alone is not None and alone.kind == found.kind:
                played, found = steps[: alone.step + 1], alone
            small, fewer = minimize(spec, played, found.kind, backend)
            tally.failures.append(
                f"seed {number} {backend}: {found.kind}: {found.text}\n    {small}\n    "
                + "; ".join(map(str, fewer))
            )
            run, played = Run(spec, backend, tally), []
        k = end
    return tally


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=PER_MODULE)
    parser.add_argument("--backend", default="aten")
    given = parser.parse_args()
    faulthandler.enable()
    tally, shown = Tally(), 0
    for seed in range(given.seed, given.seed + given.count, PER_MODULE):
        print(f"{seed}\r", end="", flush=True)  # what was running, should the process die
        left = min(PER_MODULE, given.seed + given.count - seed)
        run_sequences(seed, left, given.backend, tally)
        for text in tally.failures[shown:]:
            print(text, flush=True)
        shown = len(tally.failures)
    for text, times in tally.refusals.most_common():
        print(f"{times:6d} refused: {text}")
    again = sum(tally.known.values()) - len(tally.failures)
    print(
        f"{tally.sequences} sequences, {tally.calls} calls, {sum(tally.refusals.values())} of them "
        f"refused, {len(tally.failures)} failures, {again} times seen again"
    )


if __name__ == "__main__":
    main()
