"""report.html in a real browser: click, search, zoom, slide, and look at what the page then shows.

In: reports of a small BERT and of functions that are refused. Out: the DOM, against the report's
own numbers; a page that logs an error or asks for anything over a network fails. Needs Chromium
with its driver, and skips without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod

import turbotx
from tests.report.browser import Open, one, tab, text
from turbotx.ir.expr import compile_evaluator, dim, to_javascript
from turbotx.report import Report


def type_search(page: Any, words: str) -> None:
    one(page, "#search").send_keys(words)


def slide(page: Any, name: str, size: int) -> None:
    page.execute_script("setDim(arguments[0], arguments[1])", name, size)


def test_the_graph_has_a_box_for_every_launch(open_page: Open, report: Report) -> None:
    page = open_page(report)
    drawn = page.execute_script("return data.boxes.list.flatMap((b) => b.launches)")
    assert sorted(drawn) == sorted(x.name for x in report.launches)
    boxes = page.find_elements("css selector", "#canvas .box")
    assert len(boxes) == len(page.execute_script("return data.boxes.list"))
    assert len(page.find_elements("css selector", ".band")) == 2
    assert f"{len(report.ops)} ops became {len(report.launches)} launches" in text(
        page, "#headline"
    )
    assert f"{len(report.ops)} captured ops became {len(report.launches)} launches" in str(report)
    assert len(page.find_elements("css selector", "#after div")) == len(report.launches)


def test_a_click_opens_source_code_traffic_resources_and_numerics(
    open_page: Open, report: Report
) -> None:
    page = open_page(report)
    region = next(r for r in report.regions if r.kernels == ("fused_add_gelu_0",))
    one(page, f'.box[data-name="{region.name}"] .face').click()
    shown = text(page)
    launch = next(x for x in report.launches if x.name == region.launches[0])
    (place,) = {report.where("gelu").source}
    assert Path(place).name in shown and "gelu" in shown
    assert launch.traffic.read_formula in shown and launch.traffic.written_formula in shown
    assert "Against float64" in shown and "holds" in shown
    assert "sm_90" in shown and "333" in shown and "measured here" in shown
    triton, cpp = page.find_elements("css selector", ".pair pre")
    assert ("tl.load" in triton.text and "#include" in cpp.text) or "void" in cpp.text
    assert triton.find_elements("css selector", ".k, .kn") and cpp.find_elements(
        "css selector", ".kt, .k"
    )
    assert abs(triton.rect["y"] - cpp.rect["y"]) < 2  # side by side
    one(page, ".box.chosen")


def test_search_finds_ops_modules_and_files(open_page: Open, report: Report) -> None:
    page = open_page(report)
    type_search(page, "layer.1 gelu")
    (hit,) = page.find_elements("css selector", ".box.hit")
    assert text(page, "#found") == "1"
    type_search(page, "\ue007")  # Enter
    assert hit.get_attribute("data-name") in text(page, "#title")
    type_search(page, "\ue00c")  # Escape
    assert page.find_elements("css selector", ".box.hit") == []
    type_search(page, "modeling_bert.py")
    assert int(text(page, "#found")) > 10
    type_search(page, " nowhere")
    assert text(page, "#found") == "0"


def test_wheel_drag_fit_and_keys_move_the_graph(open_page: Open, report: Report) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    page = open_page(report)
    canvas = one(page, "#canvas")

    def view() -> list[float]:
        return list(page.execute_script("return [graph.x, graph.y, graph.scale]"))

    start = view()
    ActionChains(page).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, -200).perform()
    zoomed = view()
    assert zoomed[2] > start[2]
    ActionChains(page).move_to_element_with_offset(
        canvas, -150, 40
    ).click_and_hold().move_by_offset(30, 50).release().perform()
    moved = view()
    assert moved[2] == zoomed[2] and moved[1] > zoomed[1] + 40
    one(page, "#fit").click()
    height = page.execute_script("return data.boxes.height * graph.scale")
    assert height <= canvas.rect["height"]
    canvas.send_keys("\ue015\ue015")  # down, down
    second = page.execute_script("return data.boxes.list.filter((b) => b.launches.length)[1].name")
    assert page.execute_script("return graph.chosen") == second


@pytest.mark.parametrize("planner", ["symbolic", "greedy"])
def test_the_sliders_plan_memory_as_the_planner_does(
    open_page: Open, report: Report, planner: str
) -> None:
    if planner != report.planner:
        report = turbotx.explain(
            turbotx.optimize(Mlp().eval(), backend="aten", planner=planner), torch.randn(2, 5, 8)
        )
    page = open_page(report)
    tab(page, "memory")
    names = [d for d in report.dims if "_d" not in d]
    for sizes in ((1, 1), (3, 17), (16, 64)):
        chosen = dict(zip(names, sizes, strict=False))
        if planner != "symbolic":
            chosen = dict(list(chosen.items())[:1])  # planned beforehand along each slider
            chosen[names[0]] = {3: 2}.get(sizes[0], sizes[0])
        memory = report.at(**chosen).memory
        for name, size in chosen.items():
            slide(page, name, size)
        found = page.execute_script("return planAt(shape.dims)")
        assert found["offsets"] == [b.offset for b in memory.buffers]
        assert found["peak"] == memory.peak_nbytes
        assert max(found["live"]) == memory.lower_bound_nbytes
        assert page.execute_script("return pytorchPeak()") == memory.pytorch.peak_nbytes
    rects = page.find_elements("css selector", "#memory-chart .buffer")
    assert len(rects) == len(report.memory.buffers)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.down(torch.nn.functional.gelu(self.up(x))) + x)


def test_a_real_slider_moves_every_number(open_page: Open, report: Report) -> None:
    page = open_page(report)
    before = text(page)
    tab(page, "memory")
    picture = one(page, "#memory-chart .live").get_attribute("points")
    slider = one(page, "#dim-seq")
    slider.send_keys("\ue014" * 60)  # right
    size = int(text(page, "#dims label:nth-child(2) output"))
    assert size > 7
    assert one(page, "#memory-chart .live").get_attribute("points") != picture
    tab(page, "overview")
    assert f"seq {size}" in text(page) and text(page) != before
    tab(page, "roofline")
    assert f"seq {size}" in text(page)


def test_growing_plays_and_comes_back(open_page: Open, report: Report) -> None:
    page = open_page(report)
    tab(page, "memory")
    one(page, "#play").click()
    assert "stop" in text(page, "#play")
    one(page, "#play").click()
    assert page.execute_script("return shape.dims") == list(report.dims.values())


def test_traffic_is_the_reports_at_any_shape(open_page: Open, report: Report) -> None:
    page = open_page(report)
    slide(page, "batch", 5)
    slide(page, "seq", 33)
    found = page.execute_script(
        "return data.launches.map((l) => [number(l.reads), number(l.writes), number(l.flops)])"
    )
    expected = report.at(batch=5, seq=33).launches
    assert found == [
        [x.traffic.read_nbytes, x.traffic.written_nbytes, x.traffic.flops] for x in expected
    ]


def choose_device(page: Any, name: str) -> None:
    found = [o for o in page.find_elements("css selector", "#device option") if name in o.text]
    found[0].click()


def test_the_roofline_stands_on_its_device(open_page: Open, report: Report) -> None:
    page = open_page(report)
    tab(page, "roofline")
    choose_device(page, "H100")
    dots = page.find_elements("css selector", "#roofline-chart .dot")
    assert len(dots) >= len(report.kernels)
    least = page.execute_script("return sum(data.launches.map(leastUs))")
    choose_device(page, "H200")  # its memory is faster
    assert page.execute_script("return sum(data.launches.map(leastUs))") < least


def test_the_roofline_shows_what_was_measured(open_page: Open, report: Report) -> None:
    page = open_page(report)
    tab(page, "roofline")
    found = {
        name: us
        for names, us in page.execute_script("return groupLaunches().map((g) => [g.names, g.us])")
        for name in names
    }
    times = report.findings.times_us()
    assert found.keys() == times.keys()
    assert sum(found.values()) == pytest.approx(sum(times.values()))
    # No launch is above the roofs, which are the best of all launches.
    assert page.execute_script(
        "return data.launches.every((l) => data.times[l.name] >= leastUs(l) * 0.999)"
    )
    assert "Where the time went" in text(page)
    slide(page, "seq", 33)  # nothing was measured there
    assert "Where the time must go" in text(page)


def test_light_and_dark_by_preference_and_by_hand(open_page: Open, report: Report) -> None:
    page = open_page(report)

    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def background() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    prefer("light")
    light = background()
    prefer("dark")
    dark = background()
    assert light == "rgb(255, 255, 255)" and dark != light
    one(page, "#theme").click()
    assert background() == light
    one(page, "#theme").click()
    assert background() == dark
    prefer("")


def test_what_was_refused_says_why(open_page: Open) -> None:
    def refused(x: torch.Tensor) -> torch.Tensor:
        ordered = torch.sort(x, -1)[0]
        return ordered.softmax(-1).sum(0, keepdim=True) + ordered

    report = turbotx.explain(turbotx.optimize(refused, backend="aten"), torch.randn(3, 4))
    page = open_page(report)
    tab(page, "refused")
    (extern,) = report.externs
    assert extern.op in text(page) and extern.reason in text(page)
    split = [r for r in report.regions if r.reason]
    assert split and split[0].reason in text(page)
    drawn = page.execute_script("return data.boxes.list.flatMap((b) => b.launches)")
    assert sorted(drawn) == sorted(x.name for x in report.launches)  # the sort has a box, too
    page.find_elements("css selector", "#pane td .link")[0].click()
    assert one(page, "#tabs [aria-selected=true]").text == "Selected"


def test_numerics_are_listed_or_said_to_be_missing(open_page: Open, report: Report) -> None:
    page = open_page(report)
    tab(page, "numerics")
    assert text(page).count("holds") >= len(report.launches)
    page = open_page(report.at(seq=9))  # measured at another shape
    tab(page, "numerics")
    assert "--verify" in text(page)


def test_formulas_mean_the_same_in_javascript(browser: Any) -> None:
    batch, seq = dim("batch"), dim("seq")
    values = [
        3 * batch * seq + 7, FloorDiv(seq + 15, 16) * batch, Mod(seq, 7), sympy.Max(batch, seq, 3),
        sympy.Min(batch * seq, 100), (batch + seq) ** 2, -batch + 2 * seq,
        FloorDiv(FloorDiv(seq, 2) + batch, 3),
    ]  # fmt: skip
    source = f"return [{', '.join(map(to_javascript, values))}]"
    python = compile_evaluator(values, ["batch", "seq"])
    for sizes in ((1, 1), (3, 50), (64, 4096)):
        call = f"return new Function('batch', 'seq', {source!r})(...arguments)"
        assert browser.execute_script(call, *sizes) == list(python(*sizes))


def test_a_link_leads_to_its_box_or_tab(open_page: Open, report: Report) -> None:
    page = open_page(report)
    address = page.current_url
    page.get(f"{address}#fused_add_gelu_1")
    page.refresh()
    assert "fused_add_gelu_1" in text(page, "#title")
    page.get(f"{address}#memory")
    page.refresh()
    assert one(page, "#memory-chart .live")


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), ()])
@pytest.mark.parametrize("what", ["nothing", "a view", "a sum"])
def test_small_and_empty_models_have_pages_too(
    open_page: Open, what: str, shape: tuple[int, ...]
) -> None:
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nothing": lambda x: x, "a view": lambda x: x.mT if x.dim() else x.view(1, 1),
        "a sum": lambda x: x.sum(),
    }  # fmt: skip
    function = turbotx.optimize(functions[what], backend="aten")
    page = open_page(turbotx.explain(function, torch.ones(shape)))
    for name in ("selected", "memory", "roofline", "refused", "numerics", "origin", "overview"):
        tab(page, name)
        assert "NaN" not in text(page) and "undefined" not in text(page)


def test_names_are_never_markup(open_page: Open) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + 1  # </script><b>

    Odd.__name__ = "<i>&'\""
    page = open_page(turbotx.explain(turbotx.optimize(Odd().eval(), backend="aten"), torch.ones(2)))
    assert page.title.startswith("<i>&'\"")
    one(page, ".box.region").click()
    assert "x.relu() + 1" in text(page)
