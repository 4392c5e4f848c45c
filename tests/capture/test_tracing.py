"""Several threads: captures one at a time, and eager calls beside them unharmed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import nn

import turbotx
from turbotx.capture.tracing import tracing
from turbotx.engine.optimize import engine_of

X = torch.randn(2, 5, 8)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        # What a model does where it is traced is for the tracing thread only.
        assert torch.compiler.is_compiling() == isinstance(x, torch._subclasses.FakeTensor)
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model() -> nn.Module:
    return nn.Sequential(*(Layer() for _ in range(3))).eval()


def together(*actions: Callable[[], object]) -> None:
    """Run actions in a thread each, all at once; raise what any of them raised."""
    errors: list[BaseException] = []
    ready = threading.Barrier(len(actions))

    def run(action: Callable[[], object]) -> None:
        try:
            ready.wait()
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(a,)) for a in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def call(fast, plain, times: int = 1) -> Callable[[], None]:
    def action() -> None:
        with torch.no_grad():
            for _ in range(times):
                torch.testing.assert_close(fast(X), plain(X))

    return action


def test_four_models_are_captured_at_once() -> None:
    models = [model() for _ in range(4)]
    fast = [turbotx.optimize(m) for m in models]
    together(*(call(f, m) for f, m in zip(fast, models, strict=True)))
    assert [f.stats()["captures"] for f in fast] == [1] * 4


def test_eager_calls_beside_a_capture_see_nothing_of_it() -> None:
    captured, other = model(), model()
    fast, over = turbotx.optimize(captured), threading.Event()
    rounds = []
    with torch.no_grad():
        right = captured(X), other(X)

    def eager() -> None:
        with torch.no_grad():
            while not over.is_set():
                torch.testing.assert_close((captured(X), other(X)), right)
                held = (*captured.parameters(), *captured.state_dict().values())
                assert {type(t) for t in held} <= {torch.Tensor, nn.Parameter}
                rounds.append(None)

    def capture() -> None:
        try:
            call(fast, captured)()
        finally:
            over.set()

    together(eager, capture)
    assert rounds


def test_two_threads_call_a_fresh_model_while_it_is_reset() -> None:
    plain = model()
    fast = turbotx.optimize(plain)
    again = threading.Event()

    def reset() -> None:
        for _ in range(3):
            again.wait(0.2)
            engine_of(fast).reset()

    together(call(fast, plain, 5), call(fast, plain, 5), reset)
    call(fast, plain)()
    assert fast.stats()["captures"] == 1


def test_one_capture_serves_both_threads() -> None:
    plain = model()
    fast = turbotx.optimize(plain)
    together(call(fast, plain, 2), call(fast, plain, 2))
    assert fast.stats()["captures"] == 1


def test_a_trace_may_be_begun_inside_of_another() -> None:
    plain = model()
    with tracing(), tracing():
        call(turbotx.optimize(plain), plain)()


def test_pytorch_is_as_it_was_afterwards() -> None:
    call_of, flag = nn.Module.__call__, torch.compiler._is_compiling_flag
    turbotx.optimize(model())(X)
    assert nn.Module.__call__ is call_of and torch.compiler._is_compiling_flag is flag
