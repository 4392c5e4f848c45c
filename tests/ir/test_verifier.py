"""Each checker rejects corrupted input, a test per rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.graphs import captured_graph, node
from turbotx import ir
from turbotx.errors import VerifyError
from turbotx.ir import fx_nodes as g
from turbotx.ir.expr import ZERO, dim
from turbotx.ir.matmul_kernels import GemmKernel
from turbotx.ir.verifier import (
    check_graph,
    check_inputs,
    check_kernel,
    check_launches,
    check_region,
)
from turbotx.kernels.fusion.fuse import fuse
from turbotx.passes.canonicalize import canonicalize
from turbotx.passes.partition import find_hoisted, partition


@pytest.fixture(scope="module")
def graph():
    found = captured_graph(lambda x, w: ((x.exp() + 1) @ w).softmax(-1), *[torch.randn(4, 4)] * 2)
    canonicalize(found)
    return found


@pytest.fixture(scope="module")
def kernel(graph) -> ir.Kernel:
    softmax = partition(graph, find_hoisted(graph))[-1]
    return fuse(softmax).kernels[0].kernel


def test_what_the_stages_make_passes(graph, kernel) -> None:
    check_graph(graph)
    check_kernel(kernel)


def test_a_node_without_a_value(graph) -> None:
    exp = node(graph, "exp")
    value = exp.meta.pop("val")
    try:
        with pytest.raises(VerifyError, match=r"exp .* has no value"):
            check_graph(graph)
    finally:
        exp.meta["val"] = value


def test_a_region_that_is_not_convex(graph) -> None:
    exp, softmax = node(graph, "exp"), node(graph, "softmax")
    with pytest.raises(VerifyError, match="comes back at softmax"):
        check_region([exp, softmax], [softmax])


def test_an_output_that_is_not_in_the_region(graph) -> None:
    with pytest.raises(VerifyError, match="softmax is not in the region"):
        check_region([node(graph, "exp")], [node(graph, "softmax")])


def without(kernel: ir.Kernel, kind: type, count: int = 1) -> ir.Kernel:
    body = list(kernel.body)
    for s in [s for s in body if isinstance(s, kind)][:count]:
        body.remove(s)
    return replace(kernel, body=tuple(body))


def test_a_value_used_before_it_is_made(kernel) -> None:
    with pytest.raises(VerifyError, match="before it is made"):
        check_kernel(without(kernel, ir.Load))


def test_a_value_made_twice(kernel) -> None:
    load = next(s for s in kernel.body if isinstance(s, ir.Load))
    with pytest.raises(VerifyError, match="made twice"):
        check_kernel(replace(kernel, body=(load, *kernel.body)))


def test_an_output_that_is_never_stored(kernel) -> None:
    with pytest.raises(VerifyError, match="never stored"):
        check_kernel(without(kernel, ir.Store))


def test_a_load_from_an_output(kernel) -> None:
    flipped = tuple(replace(p, role="out") for p in kernel.params)
    with pytest.raises(VerifyError, match="is no in param"):
        check_kernel(replace(kernel, params=flipped))


def test_an_unknown_axis(kernel) -> None:
    with pytest.raises(VerifyError, match="no axis is called"):
        check_kernel(replace(kernel, axes=kernel.axes[:-1]))


def test_an_unknown_primitive(kernel) -> None:
    body = tuple(replace(s, op="magic") if isinstance(s, ir.Compute) else s for s in kernel.body)
    with pytest.raises(VerifyError, match="magic"):
        check_kernel(replace(kernel, body=body))


def test_mixed_dtypes(kernel) -> None:
    body = tuple(
        replace(s, dtype=torch.float64) if isinstance(s, ir.Load) else s for s in kernel.body
    )
    with pytest.raises(VerifyError, match="mixes"):
        check_kernel(replace(kernel, body=body))


def test_a_reduction_without_a_row_axis(kernel) -> None:
    rows = tuple(replace(a, kind=ir.PARALLEL) for a in kernel.axes)
    with pytest.raises(VerifyError, match="no row axis"):
        check_kernel(replace(kernel, axes=rows))


def launches():
    shape = (dim("batch"),)
    tensors = {
        n: ir.Tensor(n, kind, torch.float32, shape)
        for n, kind in (("x", "input"), ("h", "intermediate"), ("y", "output"))
    }
    operands = {n: ir.Operand(n, torch.float32, shape, (ZERO,), ZERO) for n in tensors}
    first = launch_of("first", (operands["x"],), operands["h"])
    second = launch_of("second", (operands["h"],), operands["y"])
    return tensors, first, second


def launch_of(name, reads, out, **more) -> ir.AtenLaunch:
    call = ir.AtenCall(torch.ops.aten.clone.default, reads, {}, (out,))
    return ir.AtenLaunch(call, name=name, **more)


def test_launches_in_order_pass() -> None:
    tensors, first, second = launches()
    check_launches(tensors, [first, second], ["y"])


def test_a_read_before_the_write() -> None:
    tensors, first, second = launches()
    with pytest.raises(VerifyError, match="second reads 'h' before"):
        check_launches(tensors, [second, first], ["y"])


def test_an_output_that_nobody_writes() -> None:
    tensors, first, _ = launches()
    with pytest.raises(VerifyError, match="'y' is never written"):
        check_launches(tensors, [first], ["y"])


def test_a_write_to_the_callers_memory() -> None:
    tensors, first, second = launches()
    tensors["h"] = replace(tensors["h"], kind="input")
    with pytest.raises(VerifyError, match="first writes 'h'"):
        check_launches(tensors, [first, second], ["y"])


def test_a_read_of_what_does_not_exist() -> None:
    tensors, first, second = launches()
    del tensors["x"]
    with pytest.raises(VerifyError, match="'x', which does not exist"):
        check_launches(tensors, [first, second], ["y"])


def test_pairs_of_one_thing_written_and_one_read_pass() -> None:
    tensors, first, second = launches()
    check_launches(tensors, [first, replace(second, inplace=(("y", "h"),))], ["y"])


@pytest.mark.parametrize(
    ("pair", "again", "words"),
    [
        (("y", "x"), None, "does not write the one or read the other"),
        (("h", "h"), None, "does not write the one or read the other"),
        (("y", "h"), ZERO, "'h' is shown 2 times"),
        (("y", "h"), dim("batch"), "'h' is shown 2 times"),
    ],
)
def test_a_pair_that_is_more_than_that(pair, again, words) -> None:
    tensors, first, second = launches()
    (h,), (y,) = second.call.args, second.call.writes
    extra = () if again is None else (replace(h, offset=again),)
    second = launch_of("second", (h, *extra), y, inplace=(pair,))
    with pytest.raises(VerifyError, match=words):
        check_launches(tensors, [first, second], ["y"])


def test_a_pair_of_two_dtypes() -> None:
    tensors, first, second = launches()
    tensors["h"] = replace(tensors["h"], dtype=torch.int32)
    h = replace(first.call.writes[0], dtype=torch.int32)
    first = launch_of("first", first.call.args, h)
    second = launch_of("second", (h,), second.call.writes[0])
    with pytest.raises(VerifyError, match="of another dtype"):
        check_launches(tensors, [first, replace(second, inplace=(("y", "h"),))], ["y"])


def test_an_input_whose_size_was_fixed_is_found(graph) -> None:
    sizes = [g.shape(n) for n in graph.nodes if n.op == "placeholder"]
    check_inputs(graph, sizes)
    with pytest.raises(VerifyError, match="fixed a size to the example's"):
        check_inputs(graph, [(dim("other"), *sizes[0][1:]), *sizes[1:]])


def test_a_launch_of_another_dtype_than_its_tensor() -> None:
    tensors, first, second = launches()
    tensors["h"] = replace(tensors["h"], dtype=torch.bfloat16)
    with pytest.raises(VerifyError, match=r"first takes 'h' for torch\.float32"):
        check_launches(tensors, [first, second], ["y"])


def test_a_product_of_two_dtypes() -> None:
    tensors, first, second = launches()
    tensors["h"] = replace(tensors["h"], dtype=torch.bfloat16)
    (x,), (h,) = first.call.args, first.call.writes
    out, one = replace(h, dtype=torch.bfloat16), dim("batch")
    mixed = ir.GemmLaunch(GemmKernel(), x, x, None, out, None, one, one, first.call, name="mixed")
    with pytest.raises(VerifyError, match="computes in one dtype"):
        check_launches(tensors, [mixed, second], ["y"])
