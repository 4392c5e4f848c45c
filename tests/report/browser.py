"""A browser over report.html: how the tests of the page click, read and open tabs.

In: pages as Selenium drives them. Out: for example::

    tab(page, "memory")
    text(page)  ->  "Memory of intermediates ..."
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from turbotx.report import Report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def start_browser() -> Any:
    """A headless browser, or a skip that says what is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}, and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1400,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(driver)
    return webdriver.Chrome(options=options, service=service)


Open = Callable[[Report], Any]


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def text(page: Any, selector: str = "#pane") -> str:
    return str(one(page, selector).text)


def tab(page: Any, name: str) -> None:
    one(page, f"#tabs [data-tab={name}]").click()
