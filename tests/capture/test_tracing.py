"""Several threads: captures one at a time, and eager calls and PyTorch's own traces beside them
unharmed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

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


class AsksSizes(nn.Module):
    """Asks the same of its sizes before and after `meanwhile`, and keeps a tensor of the trace."""

    def __init__(self, keep: Callable[[torch.Tensor], object] = id) -> None:
        super().__init__()
        self.layer, self.meanwhile, self.keep = nn.Linear(8, 8), lambda: None, keep

    def forward(self, x):
        for _ in range(2):
            x = x.reshape(-1, x.shape[1] * 8).view(x.shape[0], -1, 8)
            x = x + 1 if x.shape[1] % 2 == 1 and x.shape[0] * 3 < 100 else x - 1
            torch._check(x.shape[0] + x.shape[1] <= 300)
            x = self.layer(x[:, : x.shape[1] - 1])
            self.keep(x)
            self.meanwhile()
        return x


def in_another_thread(action: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


def capture_another() -> None:
    """Capture a model that does the same whether or not it is traced: PyTorch tells every thread
    that one is tracing."""
    plain = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    call(turbotx.optimize(plain), plain)()


def export(asks: AsksSizes) -> str:
    """Everything that an export tells, what it says of tensors that are left included."""
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = torch.export.export(asks, (torch.randn(2, 7, 8),), dynamic_shapes=sizes)
    left = [x for w in said if "still alive" in str(w.message) for x in str(w.message).split("\n")]
    return "\n".join([made.graph_module.code, str(made.range_constraints), *sorted(left)])


def compile_by_dynamo(asks: AsksSizes) -> str:
    graphs: list[str] = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        asks.meanwhile()
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(nn.Linear(8, 8), backend=keep, dynamic=True)
    for shape in ((2, 5, 8), (3, 6, 8), (2, 9, 8)):
        compiled(torch.randn(shape))
    return "\n".join(graphs)


def make_symbolic(asks: AsksSizes) -> str:
    made = make_fx(asks, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    return str(made(torch.randn(2, 7, 8)).code)


@pytest.mark.parametrize("trace", [export, compile_by_dynamo, make_symbolic])
@torch._export.config.patch(detect_non_strict_fake_tensor_leaks=True)
def test_a_trace_of_pytorch_in_another_thread_is_unharmed(trace) -> None:
    left: list[torch.Tensor] = []
    asks = AsksSizes(left.append)
    alone = trace(asks)
    left.clear()
    captures = []

    def capture_meanwhile() -> None:
        in_another_thread(capture_another)
        captures.append(None)

    asks.meanwhile = capture_meanwhile
    assert trace(asks) == alone and captures
    if trace is export:
        assert "still alive" in alone and "no proxy mapping" not in alone


class Exports(Layer):
    """Exports a model in another thread whenever it runs."""

    def forward(self, x):
        in_another_thread(lambda: self.made.append(export(AsksSizes())))
        return super().forward(x)


def test_a_capture_during_which_another_thread_exports_is_unharmed() -> None:
    plain = Exports().eval()
    plain.made = []
    fast = turbotx.optimize(plain)
    with torch.no_grad():
        came = fast(X)
        torch.testing.assert_close(came, Layer.forward(plain, X))
    assert set(plain.made) == {export(AsksSizes())}
