"""Pieces of random modules that hold parameters, buffers, submodules, hooks, PyTorch's state.

In: a random generator. Out: modules as in `tests/assumption_pieces.py`, and the list of all::

    PIECES  ->  (Size, Amount, ..., Weight, Tied, Buffer, Parts, Hooks, Ambient)
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from tests import assumption_pieces as plain
from tests.assumption_pieces import ACTIVATIONS, WIDTH, Piece, find_number


@contextmanager
def _writing(tensor: torch.Tensor) -> Iterator[None]:
    """Write as PyTorch lets one: a call in inference mode makes a pruned weight there."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


class Weight(Piece):
    """One linear whose weight is changed in every way."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.linear = nn.Linear(WIDTH, WIDTH, bias=self.kind % 2 == 0)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        if self.kind % 3 == 0:
            return torch.tanh(F.linear(x, self.linear.weight * 2, self.linear.bias))
        return torch.tanh(self.linear(x))

    def change_in_place(self, n: int) -> None:
        with _writing(self.linear.weight):
            self.linear.weight.mul_(-1.5 if n % 2 else 0.7)

    def change_one(self, n: int) -> None:
        with _writing(self.linear.weight):
            self.linear.weight[n % WIDTH, n // 8 % WIDTH] += 3

    def change_data_in_place(self, n: int) -> None:
        with _writing(self.linear.weight):
            self.linear.weight.data.mul_(-1.5 if n % 2 else 0.7)

    def change_data(self, n: int) -> None:
        if self.linear.weight.is_inference():
            return  # nobody could write to it afterwards, eager code neither
        new = self.linear.weight.data.flip(n % 2)
        self.linear.weight.data = new.t().contiguous().t() if n % 3 == 0 else new

    def change_object(self, n: int) -> None:
        if not parametrize.is_parametrized(self.linear) and "weight" in self.linear._parameters:
            new = self.linear.weight.detach().roll(1, 0) * 1.1
            self.linear.weight = nn.Parameter(
                new.t().contiguous().t() if n % 2 else new, requires_grad=n % 3 > 0
            )

    def change_bias(self, n: int) -> None:
        dtype = self.linear.weight.dtype
        self.linear.bias = nn.Parameter(torch.full((WIDTH,), find_number(n), dtype=dtype))
        if n % 3 == 0:
            self.linear.bias = None  # type: ignore[assignment]

    def change_loaded(self, n: int) -> None:
        state = {k: v * (1 + n % 2) for k, v in self.linear.state_dict().items()}
        self.linear.load_state_dict(state, assign=n % 3 == 0)

    def change_asks_grad(self, n: int) -> None:
        self.linear.requires_grad_(n % 2 == 0)

    def change_whole(self, n: int) -> None:
        dtype = self.linear.weight.dtype
        self.linear = nn.Linear(WIDTH, WIDTH, bias=n % 2 == 0, dtype=dtype)

    def change_pruned(self, n: int) -> None:
        if prune.is_pruned(self.linear):
            prune.remove(self.linear, "weight")
        elif not parametrize.is_parametrized(self.linear) and self.linear.weight.is_contiguous():
            prune.l1_unstructured(self.linear, "weight", amount=0.5)

    def change_parametrized(self, n: int) -> None:
        if parametrize.is_parametrized(self.linear):
            parametrize.remove_parametrizations(self.linear, "weight")
        elif "weight" in self.linear._parameters:
            parametrize.register_parametrization(self.linear, "weight", _Doubled())


class _Doubled(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * 2


class Tied(Piece):
    """Two linears of one weight, or not; a norm with its eps."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        x = self.norm(x)
        if self.b.weight is self.a.weight:
            x = x + 1
        return self.b(torch.relu(self.a(x))) + self.b(x) * self.a(x)

    def change_tie(self, n: int) -> None:
        self.b.weight = self.a.weight

    def change_untie(self, n: int) -> None:
        self.b.weight = nn.Parameter(self.a.weight.detach().clone() * (1 + n % 2))

    def change_a(self, n: int) -> None:
        with torch.no_grad():
            self.a.weight.add_(0.1 * (n % 3))

    def change_b_data(self, n: int) -> None:
        self.b.weight.data.neg_()

    def change_eps(self, n: int) -> None:
        self.norm.eps = (1e-5, 1.0, 0.1)[n % 3]

    def change_norm(self, n: int) -> None:
        new = torch.linspace(0, n % 4, WIDTH, dtype=self.a.weight.dtype)
        if n % 3 == 0:
            self.norm.weight = self.norm.bias = None  # type: ignore[assignment]
        elif n % 3 == 1 and self.norm.weight is not None:
            self.norm.weight.data.copy_(new)
        else:
            self.norm.weight = nn.Parameter(new)


class Buffer(Piece):
    """A buffer that is filled, replaced, of another size or dtype, or None."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.scale: Any
        self.register_buffer("scale", torch.full((WIDTH,), 2.0))
        self.register_buffer("places", torch.arange(16)[:, None] * 0.1, persistent=False)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        if self.scale is None:
            return x + 3
        x = x * self.scale + self.places[: x.shape[1]]  # type: ignore[index]
        return torch.tanh(x * 2 if self.scale.numel() == 1 else x)

    def change_fill(self, n: int) -> None:
        if self.scale is not None:
            self.scale.fill_(find_number(n))

    def change_data(self, n: int) -> None:
        if self.scale is not None:
            self.scale.data = torch.full_like(self.scale, find_number(n))

    def change_object(self, n: int) -> None:
        dtype = (torch.float32, torch.float64, torch.int64)[n % 3]
        self.scale = torch.full((1 if n % 2 else WIDTH,), n % 5).to(dtype)

    def change_none(self, n: int) -> None:
        self.scale = None

    def change_places(self, n: int) -> None:
        self.places = torch.arange(4 + n % 8)[:, None] * 0.2  # type: ignore[assignment]


class Parts(Piece):
    """Submodules that are replaced, added and removed; dropout that is on or off."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.act: Any = nn.ReLU()
        self.layers = nn.ModuleList([nn.Tanh()])
        self.by = nn.ModuleDict({"a": nn.Identity()})
        self.seq = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        x = self.drop(self.seq(x))
        if self.act is not None:
            x = self.act(x) + isinstance(self.act, nn.ReLU)
        for layer in self.layers:
            x = layer(x)
        for name, layer in self.by.items():
            x = layer(x) + len(name)
        return x

    def change_act(self, n: int) -> None:
        self.act = (*ACTIVATIONS, lambda: None)[n % 5]()

    def change_layers(self, n: int) -> None:
        if n % 3 == 0 and len(self.layers):
            del self.layers[-1]
        elif n % 3 == 1 and len(self.layers) < 4:
            self.layers.append(ACTIVATIONS[n % 4]())
        elif len(self.layers):
            self.layers[0] = ACTIVATIONS[n % 4]()

    def change_by(self, n: int) -> None:
        if "bb" in self.by:
            del self.by["bb"]
        else:
            self.by["bb"] = ACTIVATIONS[n % 4]()

    def change_seq(self, n: int) -> None:
        self.seq[1] = ACTIVATIONS[n % 4]()

    def change_slope(self, n: int) -> None:
        self.act = nn.LeakyReLU(0.5)
        self.act.negative_slope = find_number(n)

    def change_training(self, n: int) -> None:
        self.drop.train(n % 4 == 0)

    def change_share(self, n: int) -> None:
        if len(self.layers):
            self.layers[0] = self.act if self.act is not None else self.seq[1]


class Hooks(Piece):
    """Hooks of a part, of the piece, of all modules, added and removed."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.handles: list[Any] = []

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        return torch.tanh(self.linear(x))

    def change_after(self, n: int) -> None:
        by = find_number(n)
        self.handles.append(self.linear.register_forward_hook(lambda m, i, out: out * by))

    def change_before(self, n: int) -> None:
        by = find_number(n)
        self.handles.append(self.linear.register_forward_pre_hook(lambda m, i: (i[0] + by,)))

    def change_own(self, n: int) -> None:
        by = find_number(n)
        self.handles.append(self.register_forward_hook(lambda m, i, out: out - by))

    def change_less(self, n: int) -> None:
        if self.handles:
            self.handles.pop(n % len(self.handles)).remove()

    def change_forward(self, n: int) -> None:
        if "forward" in vars(self.linear):
            del self.linear.forward
        else:
            self.linear.forward = torch.neg if n % 2 else torch.relu


class Ambient(Piece):
    """Asks for grad mode, autocast, the default dtype, or makes tensors by them."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        made: list[Callable[[], torch.Tensor]] = [
            lambda: x * 2 if torch.is_grad_enabled() else x + 1,
            lambda: x * 2 if torch.is_autocast_enabled("cpu") else x + 1,
            lambda: x * 2 if torch.get_default_dtype() is torch.float32 else x + 1,
            lambda: x + torch.zeros(WIDTH), lambda: x * torch.tensor([0.5] * WIDTH),
            lambda: x * 2 if torch.is_inference_mode_enabled() else x + 1,
            lambda: self.linear(x), lambda: torch.matmul(x, x.transpose(1, 2)) @ x,
            lambda: F.softmax(self.linear(x), -1), lambda: x + torch.arange(8) / 2,
            lambda: x * 2 if self.training else x + 1,
            lambda: F.layer_norm(self.linear(x), (WIDTH,)),
            lambda: F.scaled_dot_product_attention(
                x, self.linear(x), x, is_causal=bool(x.shape[1] > 1)
            ),
        ]  # fmt: skip
        return made[self.kind % len(made)]()


class Pair(NamedTuple):
    """An argument of two."""

    first: Any
    second: Any


@dataclasses.dataclass
class Batch:
    """An argument that pytree does not know."""

    data: Any
    by: float = 1.0


class Number(Piece):
    """A plain number, bool, string or None as the argument."""

    def argument(self, n: int, x: torch.Tensor) -> Any:  # type: ignore[override]
        return (1.0, 2.5, -0.0, 0.0, 2, 1, 0, True, False, None, "a", "b", 0.5)[n % 13]

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        if given is None or isinstance(given, str):
            return x * 2 if given == "a" else x + 1
        if isinstance(given, bool):
            return torch.relu(x) if given else -x
        if self.kind % 3 == 0 and given > 1:
            return x - given
        if self.kind % 3 == 1 and isinstance(given, int):
            return x[:, :given].sum(1, keepdim=True) + x
        return torch.tanh(x * given)


class Structure(Piece):
    """Tensors and numbers in a dataclass, dict, named tuple, list, or a tensor itself."""

    def argument(self, n: int, x: torch.Tensor) -> Any:  # type: ignore[override]
        t = torch.full(x.shape[: n % 3 + 1], 0.5 + n % 2, dtype=x.dtype)
        t = t.reshape(t.shape + (1,) * (3 - t.dim()))
        by = find_number(n // 3)
        made = (Batch(t, by), {"first": t, "by": by}, Pair(t, by), [t, t * 2], t, None, (t > 1))
        return made[(n + self.kind) // 5 % 7]

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        if isinstance(given, Batch):
            return x * given.data + given.by
        if isinstance(given, dict):
            return x + given["first"] * given.get("by", 1.0) + len(given)
        if isinstance(given, Pair):
            return x - given.first * given.second
        if isinstance(given, list):
            return x + sum(given) + len(given)
        if given is None:
            return x * 3
        return torch.where(given, x, -x) if given.dtype is torch.bool else x * given


PIECES: tuple[type[Piece], ...] = (
    plain.Size, plain.Size, plain.Amount, plain.Slice, plain.Slice, plain.Shaped, plain.Flag,
    plain.OfClass, plain.Config, plain.Held, plain.Named, Number, Structure, Weight,
    Weight, Tied, Buffer, Parts, Hooks, Ambient, Ambient,
)  # fmt: skip
