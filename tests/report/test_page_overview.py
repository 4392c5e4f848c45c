"""report.html for whoever is sent one: its origin, its times, its memory, on any screen.

In: the report of a small BERT in a real browser. Out: what the page says, against the report.
"""

from __future__ import annotations

import torch

import turbotx
from tests.report.browser import Open, one, tab, text
from turbotx.report import Report


def test_it_says_where_it_comes_from_and_what_a_call_takes(open_page: Open, report: Report) -> None:
    page = open_page(report)
    total = page.execute_script("return showUs(data.timed.total)")
    assert f"{total}\na call, at batch 2, seq 7" in text(page)
    held = page.execute_script("return showNbytes(arguments[0])", report.memory.total_nbytes)
    assert f"{held}\nin all" in text(page)
    assert len(page.find_elements("css selector", ".bars i")) > 4
    made = report.provenance
    assert made.device in text(page, "#origin") and made.date in text(page, "#origin")
    tab(page, "origin")
    for said in (made.command, "float32", torch.__version__, turbotx.__version__, "compiler"):
        assert said in text(page)
    page = open_page(report.at(seq=9))  # nothing was timed there
    assert "turbotx profile MODEL --shape batch=2,seq=9" in text(page)


def test_each_launch_says_why_it_stayed_apart(open_page: Open, report: Report) -> None:
    page = open_page(report)
    tab(page, "refused")
    apart = {x.apart for x in report.launches if x.kind == "kernel"}
    assert apart == {
        "epilogues=False was asked for",
        "it reads no matrix product that it could finish",
    }
    assert all(why in text(page) for why in apart)
    one(page, '.box[data-name="fused_add_gelu_0"] .face').click()
    assert "epilogues=False was asked for" in text(page)


def test_tabs_are_tabs_for_keys_and_readers(open_page: Open, report: Report) -> None:
    page = open_page(report)
    first, *_, last = page.find_elements("css selector", "#tabs [role=tab]")
    first.send_keys("\ue014")  # right
    assert one(page, "#tabs [aria-selected=true]").text == "Selected"
    assert page.switch_to.active_element.text == "Selected"
    page.switch_to.active_element.send_keys("\ue012\ue012")  # left, left
    assert last.get_attribute("aria-selected") == "true"
    last.send_keys("\ue011")  # home
    assert one(page, "#pane").get_attribute("aria-labelledby") == first.get_attribute("id")
    assert len(page.find_elements("css selector", '#tabs [tabindex="0"]')) == 1


def test_a_narrow_screen_shows_all_of_it(open_page: Open, report: Report) -> None:
    page = open_page(report)
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for name in page.execute_script("return TABS.map(([key]) => key)"):
            page.execute_script("openTab(arguments[0])", name)
            wide = "const p = document.getElementById('pane'); return p.scrollWidth - p.clientWidth"
            assert page.execute_script(wide) <= 0, name
            assert page.execute_script("return document.documentElement.scrollWidth") <= 400, name
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
