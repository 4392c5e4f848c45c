"""`turbotx.explain`: what a report says of a tiny BERT, at any shape, and that its numbers add up.

In: a random BERT of two layers. Out: the issue's promises about `to_dict`, one test each.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.errors import DumpError, InputError, TrainingError
from turbotx.report import Report
from turbotx.report.amounts import show_shape
from turbotx.report.draw import draw_svg, find_boxes
from turbotx.report.origin import reserve

LAYERS, HIDDEN = 2, 64


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.arange(14).reshape(2, 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def report(bert: nn.Module, inputs: dict[str, torch.Tensor]) -> Report:
    return turbotx.explain(turbotx.optimize(bert, backend="aten"), **inputs)


def small(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x + y)


def explain_small(batch: int = 3, seq: int = 5) -> Report:
    x, y = torch.randn(batch, seq, 8), torch.randn(batch, seq, 8)
    return turbotx.explain(turbotx.optimize(small, backend="aten"), x, y)


def test_to_dict_is_json_with_everything(report: Report) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert {"regions", "kernels", "launches", "gemms", "externs", "memory"} <= set(found)
    assert found["dims"] == {"batch": 2, "seq": 7, "attention_mask_d0": 2}
    assert set(found["regions"][0]) >= {"name", "nodes", "kernels", "reason"}
    kernel = next(k for k in found["kernels"] if k["kind"] == "kernel")
    assert {"cpp", "triton"} <= set(kernel["sources"])
    assert {"read_nbytes", "written_nbytes", "compulsory_nbytes"} <= set(kernel)
    assert set(found["launches"][0]) >= {"name", "kind", "module", "source"}
    assert set(found["memory"]["buffers"][0]) >= {"name", "nbytes", "lifetime", "offset"}


def test_every_launch_has_its_kernel(report: Report) -> None:
    names = {k.name for k in report.kernels}
    generated = [x for x in report.launches if x.kind in ("kernel", "attention")]
    assert {x.kernel for x in generated} == names
    assert sorted(n for k in report.kernels for n in k.launches) == sorted(
        x.name for x in generated
    )
    in_regions = [n for r in report.regions for n in r.launches]
    joined = [x.name for x in report.launches if x.kind == "gemm" and ", " in x.source]
    kernels = [x.name for x in report.launches if x.kind == "kernel"]
    assert sorted(in_regions) == sorted(kernels + joined) and "linear_gelu_0" in joined


def test_layers_share_kernels(report: Report) -> None:
    norm = next(k for k in report.kernels if k.name == "fused_add_layer_norm_0")
    assert len(norm.launches) == 2 * LAYERS
    assert len([x for x in report.launches if x.kind == "attention"]) == LAYERS


def test_gemms_name_the_weights_behind_them(report: Report) -> None:
    packed = [g for g in report.gemms if g.packed]
    assert len(packed) == LAYERS
    assert (packed[0].m, packed[0].k, packed[0].n) == (2 * 7, HIDDEN, 3 * HIDDEN)
    names = [w.rsplit(".", 2)[1] for w in packed[0].weights]
    assert names == ["query", "key", "value"]


def test_traffic_counts_each_element_once() -> None:
    report = explain_small(batch=3, seq=5)
    (kernel,) = report.kernels
    elements = 3 * 5 * 8
    assert kernel.read_nbytes == 2 * elements * 4
    assert kernel.written_nbytes == elements * 4
    assert kernel.compulsory_nbytes == 3 * elements * 4
    assert kernel.read_formula == "8*batch*seq*x_d2"


def test_a_gather_moves_what_it_picks_at_most_the_table() -> None:
    table = nn.Embedding(10, 6).eval()
    optimized = turbotx.optimize(table, backend="aten")
    report = turbotx.explain(optimized, torch.zeros(2, 3, dtype=torch.long))
    (kernel,) = report.kernels
    assert kernel.read_nbytes == 6 * 8 + 2 * 3 * 6 * 4
    assert report.at(batch=100).kernels[0].read_nbytes == 300 * 8 + 10 * 6 * 4


def test_at_another_shape_changes_numbers_only(report: Report) -> None:
    other = report.at(batch=8, seq=32)
    assert other.dims == {"batch": 8, "seq": 32, "attention_mask_d0": 8}
    assert [x.name for x in other.launches] == [x.name for x in report.launches]
    assert other.gemms[0].m == 8 * 32
    assert other.memory.peak_nbytes > report.memory.peak_nbytes


@pytest.mark.parametrize("dims", [{"length": 3}, {"seq": 0}, {"batch": -1}])
def test_at_refuses_unknown_dims_and_sizes(report: Report, dims: dict[str, int]) -> None:
    with pytest.raises(InputError):
        report.at(**dims)


def test_memory_lies_between_the_bound_and_pytorch(report: Report) -> None:
    memory = report.at(batch=4, seq=64).memory
    assert memory.lower_bound_nbytes <= memory.peak_nbytes
    assert memory.peak_nbytes <= memory.pytorch.peak_nbytes <= memory.pytorch.reserved_nbytes
    assert memory.peak_nbytes <= sum(nbytes for _, nbytes in memory.chunks)
    for buffer in memory.buffers:
        assert buffer.name in buffer.tensors
        assert buffer.offset + buffer.nbytes <= memory.peak_nbytes


def test_pytorch_memory_of_a_chain_is_two_buffers() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        return (((x + 1) * 2).tanh().view(-1) * 3).sigmoid() + 1

    x = torch.randn(4, 256)
    held = turbotx.explain(turbotx.optimize(chain, backend="aten"), x).memory.pytorch
    assert held.peak_nbytes == 2 * 4 * 256 * 4  # the view is no third, the result is the caller's
    assert held.allocations == 5
    assert held.reserved_nbytes == 2 * 2**20


def test_caching_allocator_reuses_splits_and_merges() -> None:
    mib = 2**20
    assert reserve([("a", 512), ("b", 512), ("a", -512), ("c", 512)]) == 2 * mib
    grown = [("a", 6 * mib), ("b", 6 * mib), ("a", -6 * mib), ("b", -6 * mib), ("c", 12 * mib)]
    assert reserve(grown) == 20 * mib
    assert reserve([("a", 12 * mib), ("b", 11 * mib)]) == 24 * mib


def test_where_every_op_went(report: Report) -> None:
    places = {n.name: report.where(n.name) for n in report.origin.nodes}
    calls = [n for n in report.origin.nodes if n.kind == "call_function"]
    linears = [n for n in calls if n.op == "linear"]
    packed = {
        places[n.name].launches for n in linears if n.module.endswith(("query", "key", "value"))
    }
    assert all(places[n.name].status == "gemm" for n in linears)
    assert len(packed) == LAYERS  # three ops, one launch a layer
    for name in ("gelu", "layer_norm", "tanh", "embedding"):
        assert places[name].status == "fused"
        assert places[name].launches[0].startswith(("fused_", f"linear_{name}"))
    attention = places["scaled_dot_product_attention"]
    assert attention.launches == ("attention_0",) and attention.source.endswith(tuple("0123456789"))


def test_a_place_is_a_sentence(report: Report) -> None:
    place = report.where("gelu")
    assert str(place).startswith("gelu: fused into linear_gelu_0 of encoder.layer.0.")
    assert repr(place) == f"<{place}>"


def test_a_dim_that_is_the_batch_again_is_not_shown() -> None:
    assert show_shape({"batch": 2, "seq": 7, "mask_d0": 2}) == "batch 2, seq 7"
    assert show_shape({"batch": 2, "seq": 7, "mask_d0": 1}) == "batch 2, seq 7, mask_d0 1"


def test_memory_in_all_is_weights_and_what_is_made_of_them_and_an_arena(
    report: Report, bert: nn.Module
) -> None:
    memory = report.memory
    own = sum(p.nbytes for p in bert.parameters())
    assert own <= memory.weights_nbytes <= own + 4096  # with the buffers of positions and types
    assert memory.arena_nbytes >= memory.peak_nbytes and memory.arena_nbytes % (2 << 20) == 0
    parts = (memory.weights_nbytes, memory.derived_nbytes, memory.packed_nbytes)
    assert memory.total_nbytes == sum(parts) + memory.arena_nbytes
    assert report.to_dict()["memory"]["total_nbytes"] == memory.total_nbytes


def test_where_and_back(report: Report) -> None:
    ops = {p.op for p in report.source_nodes("linear_0")}
    assert ops == {"linear"} and len(report.source_nodes("linear_0")) == 3
    gelu = report.where("gelu")
    assert "gelu" in {p.node for p in report.source_nodes(gelu.launches[0])}


def test_every_node_of_every_graph_has_its_place_and_every_launch_its_ops(report: Report) -> None:
    calls = {x.name for x in report.launches}
    regions = {r.name for r in report.regions}
    for node in report.graph.graph.nodes:
        place = report.where(node)
        assert set(place.launches) <= calls
        if node.op == "call_module":
            assert place.op == "region" and place.launches and place.node in regions
        elif node.op == "call_function" and place.status in ("fused", "gemm", "attention"):
            assert place.launches, node.name
    sources = {x.name: {p.node for p in report.source_nodes(x.name)} for x in report.launches}
    assert all(sources.values())
    for n in report.origin.nodes:
        place = report.where(n.name)
        assert all(n.name in sources[launch] for launch in place.launches)
        if place.status in ("fused", "gemm", "attention", "aten"):
            assert place.launches, n.name


def test_a_dim_that_follows_another_is_drawn_as_that_one(report: Report) -> None:
    shapes = {box.title: box.text for box in find_boxes(report)}
    assert shapes["input_ids"] == shapes["attention_mask"] == "(batch, seq)"


def test_every_launch_has_a_box_in_the_drawing() -> None:
    weight = torch.randn(6, 5)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        ordered = torch.sort(x, -1)[0].softmax(-1)
        return ordered.unsqueeze(2).expand(-1, -1, 3, -1).reshape(x.shape[0], -1, 6) @ weight

    report = turbotx.explain(turbotx.optimize(mixed, backend="aten"), torch.randn(2, 4, 6))
    boxes = find_boxes(report)
    regions = {r.name: r.launches for r in report.regions}
    drawn = [n for b in boxes for n in regions.get(b.name) or report.where(b.name).launches]
    assert sorted(drawn) == sorted(x.name for x in report.launches)
    assert len({b.kind for b in boxes} & {"region", "gemm", "other"}) == 3


def test_where_refuses_an_unknown_name(report: Report) -> None:
    with pytest.raises(InputError, match="nothing_of_the_sort"):
        report.where("nothing_of_the_sort")


def test_fused_graph_runs_as_the_model_does(
    report: Report, bert: nn.Module, inputs: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        expected = bert(**inputs)
        hidden, pooled = report.graph(*inputs.values())
    torch.testing.assert_close(hidden, expected.last_hidden_state)
    torch.testing.assert_close(pooled, expected.pooler_output)


def test_text_fits_and_names_the_kernels(report: Report) -> None:
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert (
        "fused_add_layer_norm_0" in text and "lower bound" in text and "3 packed into one" in text
    )


class _Balanced(HTMLParser):
    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("page", [True, False])
def test_html_stands_alone(report: Report, page: bool) -> None:
    text = report.to_html() if page else report._repr_html_()
    parser = _Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "fused_add_layer_norm_0" in text
    loaded = re.findall(r'(?:src|href)="(?!data:)([^#][^"]*)"|url\(|@import', text)
    assert loaded == []
    assert len(text) < 5_000_000


def test_dump_writes_every_stage(report: Report, tmp_path: Path) -> None:
    dumped = report.dump(tmp_path / "deep" / "out")
    names = {p.relative_to(dumped.folder).as_posix() for p in dumped.files}
    assert {"captured.txt", "fused.txt", "fused.dot", "fused.svg",
            "memory_plan.json", "memory_plan.svg", "report.json", "report.html",
            "kernels/fused_add_layer_norm_0.cpp",
            "kernels/fused_add_layer_norm_0.triton.py"} <= names  # fmt: skip
    assert "scaled_dot_product_attention" in (dumped.folder / "captured.txt").read_text()
    assert "call_module" in (dumped.folder / "fused.txt").read_text()
    compile(
        (dumped.folder / "kernels/fused_add_layer_norm_0.triton.py").read_text(), "kernel", "exec"
    )
    plan = json.loads((dumped.folder / "memory_plan.json").read_text())
    assert plan["peak_nbytes"] == report.memory.peak_nbytes


def test_the_picture_shows_every_box_and_arrow(report: Report) -> None:
    picture = ElementTree.fromstring(draw_svg(report))
    boxes = find_boxes(report)
    drawn = picture.findall(".//{*}rect[@class='box']")
    assert [r.find("{*}title").text for r in drawn] == [b.tip for b in boxes]
    assert len(picture.findall(".//{*}path")) == sum(len(b.sources) for b in boxes)
    width, height = map(float, picture.get("viewBox").split()[2:])
    for r in drawn:
        x, y, w, h = (float(r.get(k)) for k in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


def test_dump_refuses_a_folder_that_is_a_file(report: Report, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(DumpError, match="out"):
        report.dump(tmp_path / "out")


def test_explain_a_plain_module_a_function_and_an_optimized_class() -> None:
    class Tiny(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + 1

    x = torch.randn(2, 3)
    for target in (Tiny().eval(), turbotx.optimize(Tiny, backend="aten")().eval(), torch.sinh):
        assert len(turbotx.explain(target, x).launches) == 1


def test_an_optimized_class_is_measured_against_itself_as_it_was() -> None:
    class Softer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 3).softmax(-1)

    x = torch.randn(4, 9)
    model = turbotx.optimize(Softer, backend="aten")().eval()
    numerics = turbotx.explain(model, x).numerics(model, x)
    assert numerics.holds
    assert model.stats()["captures"] == 0  # neither explaining nor comparing is a call
    assert torch.equal(engine_of(model).run_eager((x,), {}), Softer()(x))


def test_a_watch_hears_of_every_launch_in_order() -> None:
    heard: list[tuple[str, int]] = []

    class Watch:
        def before(self, launch: int, state: object) -> None:
            heard.append(("before", launch))

        def after(self, launch: int, state: object) -> None:
            heard.append(("after", launch))

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    x = torch.randn(2, 4)
    program = turbotx.explain(turbotx.optimize(model, backend="aten"), x).compiled.program
    with torch.no_grad():
        (found,) = program.run(program.bind((2,)), [x], watch=Watch())
    torch.testing.assert_close(found, model(x).detach())
    count = len(program.executable.launches)
    assert heard == [(when, k) for k in range(count) for when in ("before", "after")]


def test_explain_refuses_what_cannot_be_explained() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TrainingError, match=r"eval\(\)"):
        turbotx.explain(model, torch.ones(1, 2))
    with pytest.raises(InputError, match="example inputs"):
        turbotx.explain(model.eval())
    with pytest.raises(InputError, match="instance"):
        turbotx.explain(nn.Linear, torch.ones(1, 2))


def test_externs_are_counted_with_the_reason() -> None:
    def sorts(x: torch.Tensor) -> torch.Tensor:
        return (torch.sort(x)[0] + 1).sort()[0]

    report = turbotx.explain(turbotx.optimize(sorts, backend="aten"), torch.randn(3, 4))
    (extern,) = report.externs
    assert extern.op.startswith("aten.sort") and extern.count == 2 and extern.reason
    assert "aten.sort" in str(report) and "aten.sort" in report.to_html()
