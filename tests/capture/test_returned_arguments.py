"""Lists and dicts that a call changes and returns are the caller's own, as in eager mode.

In: functions that fill what they are given and return it, whole or in part. Out: the same object as
was passed, with the same contents as eager mode leaves in it; also from a saved file.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import turbotx
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.capture.returned_arguments import PassedArguments, ReturnedContainer
from turbotx.errors import CaptureError, InputError

Pair = namedtuple("Pair", "first second")


def fill(d: Any) -> Any:
    d["y"] = d["x"] * 2 + 1
    return d


def grow(items: list[Any]) -> Any:
    items.append(items[0] * 2)
    del items[1]
    return items


def replace(d: Any) -> Any:
    d["x"] = d["x"] + 1
    d.pop("gone")
    return {"result": d, "other": d["x"]}


def nested(d: Any) -> Any:
    d["in"]["y"] = d["x"] * 2
    d["all"] = [d["in"]]
    return Pair(d["in"], (d, [d["x"] - 1]))


def untouched(d: Any) -> Any:
    return d, d["x"] * 2


def shift(items: Any) -> Any:
    items.append(items.popleft() * 2)
    return [items]


def inner(d: Any) -> Any:
    d["in"].append(d["x"] * 2)
    return d["in"]


def make(function: Callable[[Any], Any], n: int) -> Any:
    x = torch.arange(n).float()
    return {
        fill: {"x": x},
        grow: [x, x * 3],
        replace: OrderedDict(gone=x, x=x - 1),
        nested: {"x": x, "in": {"z": x}},
        untouched: {"x": x, "k": 3},
        shift: deque([x, x * 3], 2),
        inner: {"x": x, "in": [x - 1]},
    }[function]


FUNCTIONS = (fill, grow, replace, nested, untouched, shift, inner)


def same(one: Any, other: Any) -> bool:
    (a, left), (b, right) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return left == right and all(torch.equal(torch.as_tensor(x), torch.as_tensor(y))
                                 for x, y in zip(a, b, strict=True))  # fmt: skip


def places(given: Any, output: Any) -> tuple[ReturnedContainer, ...]:
    return PassedArguments((given,), {}).find_returned(output)[0]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_callers_containers_are_filled(function: Callable[[Any], Any]) -> None:
    fast = turbotx.optimize(function, backend="aten")
    for n in (3, 5, 3, 1, 0):
        given = make(function, n)
        wanted_given = copy.copy(given)
        if function in (nested, inner):
            wanted_given["in"] = copy.copy(given["in"])
        came, wanted = fast(given), function(wanted_given)
        assert same(came, wanted) and same(given, wanted_given)
        assert places(given, came) == places(wanted_given, wanted) != ()


def test_tensors_that_stay_are_the_callers_own() -> None:
    given = {"x": torch.ones(3), "mask": torch.ones(3)}
    x, mask = given["x"], given["mask"]
    came = turbotx.optimize(fill, backend="aten")(given)
    assert came is given and given["x"] is x and given["mask"] is mask


def test_named_arguments_and_the_same_container_twice() -> None:
    def function(a: Any, *, b: Any) -> Any:
        b.append(a["x"])
        return [b, a, b]

    fast = turbotx.optimize(function, backend="aten")
    a, b = {"x": torch.ones(2)}, [torch.zeros(2)]
    came = fast(a, b=b)
    assert came[0] is b and came[1] is a and came[2] is b and len(b) == 2


def test_what_is_not_changed_is_not_filled() -> None:
    returned = places({"x": 1, "in": [2]}, [])
    assert returned == ()
    given: Any = {"x": 1, "in": [2]}
    passed = PassedArguments((given,), {})
    given["in"].append(3)
    (inside, whole), lost = passed.find_returned([given])
    assert inside == ReturnedContainer((0, "in"), (0, "in"), changed=True)
    assert whole == ReturnedContainer((0,), (0,), changed=False)
    assert lost == [] and passed.find_returned(given["in"])[1] == []
    assert passed.find_returned([given["x"]])[1] == ["number 0"]


class Marked(dict[str, Any]):
    """A dict with an attribute."""

    mark = 0


def fill_and_return_a_part(d: Any) -> Any:
    d["y"] = d["x"] * 2
    return d["in"]


def mark(d: Any) -> Any:
    d.mark = 1
    d["y"] = d["x"] * 2
    return d


def count(d: Any) -> Any:
    d["sizes"].add(len(d["sizes"]))
    return d["x"] * 2


def below_another_key(d: Any) -> Any:
    d[0, 1].append(d["x"])
    return d


def popped(d: Any) -> Any:
    d.pop("in").append(d["x"])
    return d


LOST: tuple[tuple[Callable[[Any], Any], Callable[[], Any]], ...] = (
    (fill_and_return_a_part, lambda: {"x": torch.ones(2), "in": {"z": torch.ones(2)}}),
    (mark, lambda: Marked(x=torch.ones(2))),
    (count, lambda: {"x": torch.ones(2), "sizes": {7}}),
    (below_another_key, lambda: {"x": torch.ones(2), (0, 1): []}),
    (popped, lambda: {"x": torch.ones(2), "in": []}),
)


@pytest.mark.parametrize(("function", "given"), LOST, ids=lambda x: getattr(x, "__name__", ""))
def test_changes_that_no_call_could_do_are_refused(
    function: Callable[[Any], Any], given: Callable[[], Any]
) -> None:
    passed, before = given(), str(given())
    with pytest.raises(CaptureError, match="changes its argument number 0"):
        turbotx.optimize(function, backend="aten")(passed)
    assert str(passed) == before and not getattr(passed, "mark", 0)


def test_a_dict_whose_keys_are_tensors_is_refused() -> None:
    x = torch.ones(2)
    fast = turbotx.optimize(lambda x, d: d[x] if x in d else x * 2, backend="aten")
    with pytest.raises(CaptureError, match="argument number 1 has a dict whose keys are tensors"):
        fast(x, {x: torch.zeros(2)})
    assert torch.equal(fast(x, {"x": x}), x * 2)


def test_a_container_that_is_passed_twice_and_changed_is_refused() -> None:
    def function(a: Any, b: Any) -> Any:
        a.append(a[0] * 2)
        return a, torch.stack(b)

    fast, items = turbotx.optimize(function, backend="aten"), [torch.ones(2)]
    for _ in range(2):
        with pytest.raises(InputError, match="passed in 2 places"):
            fast(items, items)
    assert len(items) == 1
    came = fast(items, list(items))
    assert came[0] is items and len(items) == 2 and came[1].shape == (1, 2)


@needs_compiler
def test_a_saved_file_fills_them_too(tmp_path: Path) -> None:
    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            batch["y"] = self.linear(batch["x"]).relu()
            return batch

    model = Filling().eval()
    fast = turbotx.optimize(model)
    fast({"x": torch.ones(2, 4)})
    turbotx.save(fast, tmp_path / "filling.ttx")
    loaded = turbotx.load(tmp_path / "filling.ttx")
    given = {"x": torch.randn(3, 4)}
    assert loaded(given) is given
    assert torch.allclose(given["y"], model({"x": given["x"]})["y"], atol=1e-5)
