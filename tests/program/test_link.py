"""Link: a compiled call as plain data: sizes as texts, tensors as slots, leaves by their kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.ir.sizes import Sizes
from turbotx.program.executable import (
    CalledLaunch,
    Executable,
    NativeLaunch,
    ReturnedView,
    WholeTensor,
    Window,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(9, 8), nn.Linear(8, 6)

    def forward(self, ids):
        y = self.linear(self.words(ids))
        return y, y[:, :1], y.sort(-1)[0], ids.t(), ids.shape[1] * 2, "done"


def link(**options: Any) -> Executable:
    fast = turbotx.optimize(Model().eval(), **options)
    fast(torch.randint(0, 9, (2, 5)))
    return engine_of(fast).variants()[0].program.executable


def test_leaves_are_what_they_are() -> None:
    whole, window, made, view, size, constant = link().leaves
    assert isinstance(whole, WholeTensor) and isinstance(made, WholeTensor)
    assert isinstance(window, Window) and window.tensor == whole.name
    assert window.shape == Sizes(("batch", "1", "6"))
    assert isinstance(view, ReturnedView) and view.root == "ids" and len(view.steps) == 1
    assert isinstance(size, Sizes) and size.compile(["batch", "seq"])(3, 7) == (14,)
    assert constant == "done"


def test_launches_find_their_tensors_in_one_table() -> None:
    found = link()
    native = [x for x in found.launches if isinstance(x, NativeLaunch)]
    (called,) = (x for x in found.launches if isinstance(x, CalledLaunch))
    assert called.call.target is torch.ops.aten.sort.default
    assert {x.library for x in native} == {"kernels", "products"}
    slots = {slot for x in native for slot in x.slots}
    assert slots - {-1} <= set(found.slots.values())
    assert all(0 <= k < len(found.values.texts) for x in native for k in x.sizes)
    assert found.cpu is not None and found.gpu is None
    (packing,) = found.cpu.packings
    assert [w.shape for w in packing.parts] == [(6, 8)] and packing.slot in slots
    assert [x.name for x in found.inputs] == ["ids"]
    assert [w.tensor.replace(".", "_") for w in packing.parts] == ["linear_weight"]
    # What is packed is not read as it is.
    assert {n.replace(".", "_") for n in found.weights} & {"linear_weight", "linear_bias"} == {
        "linear_bias"
    }


def test_a_check_names_its_tensor_and_its_limit() -> None:
    (checks,) = [x.checks for x in link().launches if x.checks]
    assert checks == (("ids", "9"),)


def test_without_a_compiler_all_launches_are_calls() -> None:
    found = link(backend="aten")
    assert all(isinstance(x, CalledLaunch) for x in found.launches)
    assert found.cpu is not None and not found.cpu.packings
    assert found.cpu.segments == tuple((k, k + 1) for k in range(len(found.launches)))


def test_a_product_of_one_row_into_planned_memory() -> None:
    """oneDNN divides by the strides of a result, also by those of its extents of 1."""

    class Pool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x.mean(-1, keepdim=True).softmax(1).mT, x).squeeze(1) * 2

    model, x = Pool().eval(), torch.randn(3, 7, 24).bfloat16()
    fast = turbotx.optimize(model)
    torch.testing.assert_close(fast(x), model(x), rtol=0.02, atol=0.02)
    for launch in engine_of(fast).variants()[0].program.executable.launches:
        for window in launch.call.writes if isinstance(launch, CalledLaunch) else ():
            assert window is None or "0" not in window.strides.texts
