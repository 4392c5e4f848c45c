"""Random ops: drawn at every call, in eager's order, never merged, dropped, kept or moved."""

from __future__ import annotations

import os
import random
import secrets
import tempfile
import uuid

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.errors import CaptureError

X = torch.randn(3, 17)
BACKENDS = ["auto", "aten"]


def check_stream(function, *args, backend="auto", again=True):
    """The same numbers as eager, call after call, and the generator left where eager leaves it."""
    fast = turbotx.optimize(function, backend=backend)
    found = []
    for run in (fast, function):
        torch.manual_seed(7)
        with torch.no_grad():
            found.append([run(*args), run(*args), torch.rand(2)])
    torch.testing.assert_close(found[0], found[1])
    assert not again or not torch.equal(found[0][0], found[0][1])


class Sampled(nn.Module):
    """Weights with noise, as a Bayesian layer has them: the noise depends on parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.randn(17, 17)), nn.Parameter(torch.rand(17, 17))
        self.register_buffer("chance", torch.full((17,), 0.4))

    def forward(self, x):
        weight = self.mean + self.spread * torch.randn_like(self.spread)
        return x @ weight + torch.bernoulli(self.chance) + torch.rand(17)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_depends_on_parameters_alone_is_drawn_anew(backend) -> None:
    check_stream(Sampled().eval(), X, backend=backend)


def mixed(x):
    """Several draws between, before and after what kernels and GEMMs compute."""
    a = x * 2
    first = torch.rand_like(a @ a.t())
    second = torch.randn(17)
    b = a + second
    unused = torch.randn_like(b)  # noqa: F841
    return b * first.sum() + F.dropout(b, 0.1, True) + torch.randint(0, 5, x.shape)


def shuffled(x):
    return x[torch.randperm(x.shape[0])] + torch.empty(17).uniform_(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "function",
    [
        mixed,
        shuffled,
        lambda x: torch.rand_like(x) - torch.rand_like(x),
        lambda x: (torch.rand(4), x * torch.rand(()))[1],
        lambda x: F.dropout(x, 0.3, True) + F.alpha_dropout(x, 0.3, True),
        lambda x: F.dropout1d(x[None], 0.3, True) + F.feature_alpha_dropout(x[None], 0.3, True),
        lambda x: x * x.new_empty((x.shape[0], 1)).bernoulli_(0.5),
        lambda x: torch.multinomial(x.softmax(-1), 4) + torch.randint_like(x[:, :4], 3, 9),
        lambda x: torch.normal(x, x.exp()) + torch.normal(0.0, 1.0, x.shape),
        lambda x: F.rrelu(x, training=True) + torch.poisson(x.exp()),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
    ],
)
def test_the_numbers_are_eagers(function, backend) -> None:
    check_stream(function, X, backend=backend)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5, False).exp(),
        lambda x: F.dropout(x, 0.0, True).exp(),
        lambda x: F.alpha_dropout(x, 0.5, False).exp(),
    ],
)
def test_dropout_that_does_nothing_draws_nothing(function) -> None:
    fast = turbotx.optimize(function)
    before = torch.get_rng_state()
    torch.testing.assert_close(fast(X), X.exp())
    assert torch.equal(torch.get_rng_state(), before)
    (compiled,) = engine_of(fast).variants()
    assert [x.kind for x in compiled.assembly.launches] == ["kernel"]


def test_dropout_between_the_layers_of_a_recurrent_network() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.GRU(17, 5, 2, dropout=0.4)

        def forward(self, x):
            return F.dropout(self.inner(x)[0], 0.5, True)

    check_stream(Recurrent().eval(), X)


def test_other_sizes_draw_as_many_numbers_as_they_have() -> None:
    fast = turbotx.optimize(mixed)
    for rows in (4, 1, 9):
        x = torch.randn(rows, 17)
        torch.manual_seed(rows)
        ours = fast(x)
        torch.manual_seed(rows)
        torch.testing.assert_close(ours, mixed(x))
    assert fast.stats()["captures"] == 1


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: x * random.uniform(0, 1), "Python's random at .*test_random_ops.py"),
        (lambda x: x * random.choice([2, 3]), "Python's random at .*test_random_ops.py"),
        (lambda x: x * np.random.rand(), "numpy.random"),
    ],
)
def test_numbers_that_are_drawn_elsewhere_are_refused(function, what) -> None:
    with pytest.raises(CaptureError, match=what):
        turbotx.optimize(function)(X)


def test_generators_that_the_model_holds_are_refused_where_it_draws_from_them() -> None:
    own, others = random.Random(3), [np.random.default_rng(3), np.random.RandomState(3)]
    sure = random.SystemRandom()

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.others, self.draws = own, others, True

        def forward(self, x):
            return x * self.own.random() if self.draws else x * 2

    model = Holds().eval()
    for function, what in (
        (model, "Python's random at .*test_random_ops.py"),
        (lambda x: x * own.choice([2, 3]), "Python's random at .*test_random_ops.py"),
        (lambda x: x * sure.random(), "the system at .*test_random_ops.py"),
        (lambda x: x * others[0].random(), "numpy.random"),
        (lambda x: x * others[1].rand(), "numpy.random"),
    ):
        with pytest.raises(CaptureError, match=what):
            turbotx.optimize(function)(X)
    model.draws = False
    torch.testing.assert_close(turbotx.optimize(model)(X), X * 2)
    seeded = turbotx.optimize(lambda x: x * random.Random(3).random())
    torch.testing.assert_close(seeded(X), X * random.Random(3).random())


@pytest.mark.parametrize(
    "draw",
    [
        lambda: random.Random().random(),
        lambda: random.SystemRandom().random(),
        lambda: secrets.randbelow(9),
        lambda: uuid.uuid4().int % 9,
        lambda: os.urandom(1)[0],
        lambda: np.random.default_rng().random(),
        lambda: np.random.RandomState().rand(),
        lambda: np.random.Generator(np.random.PCG64()).random(),
    ],
)
def test_numbers_that_the_system_gives_are_refused(draw) -> None:
    with pytest.raises(CaptureError, match=r"from the system at .*test_random_ops"):
        turbotx.optimize(lambda x: x * draw())(X)


def test_what_has_a_seed_and_what_libraries_draw_for_themselves_is_captured() -> None:
    def name_length(x):
        with tempfile.TemporaryDirectory() as folder:
            return x * len(folder) * np.random.default_rng(2).random()

    torch.testing.assert_close(turbotx.optimize(name_length)(X), name_length(X))


def test_another_thread_may_draw_from_pythons_generator_meanwhile() -> None:
    import threading

    over = threading.Event()

    def draw() -> None:
        while not over.is_set():
            random.random()
            over.wait(0.001)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        torch.testing.assert_close(turbotx.optimize(lambda x: x.exp() + 1)(X), X.exp() + 1)
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    "draw",
    [
        lambda x, g: torch.bernoulli(x.sigmoid(), generator=g),
        lambda x, g: x * torch.rand(x.shape, generator=g),
        lambda x, g: torch.zeros_like(x).normal_(generator=g),
    ],
)
def test_a_generator_of_its_own_is_refused(draw) -> None:
    own = torch.Generator()
    with pytest.raises(CaptureError, match=r"test_random_ops.py.*\n.*torch.Generator of its own"):
        turbotx.optimize(lambda x: draw(x, own))(X)


def test_draws_like_a_tensor_that_lies_otherwise_are_eagers() -> None:
    """A draw fills memory in its order, which is that of the tensor that it is like."""

    class Like(nn.Module):
        def forward(self, x):
            moved = (x * 2).transpose(1, 2)
            noise = torch.randn_like(moved) + moved
            return noise, torch.rand_like(x.permute(2, 0, 1)), torch.bernoulli(moved.sigmoid())

    model = Like().eval()
    fast = turbotx.optimize(model)
    for x in (torch.randn(2, 3, 4), torch.randn(3, 5, 4), torch.randn(2, 4, 5).transpose(1, 2)):
        torch.manual_seed(5)
        right = model(x)
        torch.manual_seed(5)
        found = fast(x)
        torch.testing.assert_close(found, right)
        assert [f.stride() for f in found] == [r.stride() for r in right]


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.manual_seed(3) and 1,
        lambda: torch.initial_seed() % 5,
        lambda: float(torch.get_rng_state()[0]),
        lambda: torch.default_generator.manual_seed(2) and 1,
    ],
)
def test_code_that_seeds_pytorchs_generator_is_refused(ask) -> None:
    with pytest.raises(CaptureError, match=r"test_random_ops.py:\d+ sets or reads the seed"):
        turbotx.optimize(lambda x: x * ask() + torch.rand_like(x))(X)
    with pytest.raises(CaptureError, match="sets or reads the seed"):
        turbotx.optimize(seeds_inside)(X)


def seeds_inside(x):
    with torch.random.fork_rng(devices=[]):
        return x + torch.rand_like(x)


def test_pytorchs_own_code_may_keep_the_generators_state() -> None:
    from torch.utils.checkpoint import checkpoint

    def double(x):
        return checkpoint(lambda x: x * 2, x, use_reentrant=False)

    torch.testing.assert_close(turbotx.optimize(double)(X), X * 2)
