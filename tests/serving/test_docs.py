"""The page about serving says what the command's options and the measurements are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from turbotx.cli.serve import PANELS, serve_command

DOCS = Path(__file__).parents[2] / "docs"


def tables():
    spec = importlib.util.spec_from_file_location("serving_tables", DOCS / "serving_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_makes():
    text = (DOCS / "serving.md").read_text()
    assert tables().write_tables(text) == text, "run python docs/serving_tables.py"


def test_every_setting_is_an_option_and_every_option_is_on_the_page():
    from dataclasses import fields

    from turbotx.serving.settings import Settings

    options = set(serve_command.__annotations__) - {"return"}
    assert {f.name for f in fields(Settings)} - options == {"api_keys"}  # from the two of keys
    page = (DOCS / "serving.md").read_text()
    assert all(f"`--{name.replace('_', '-')}`" in page for name in options - {"models"})
    assert all(f"| {panel} |" in page for panel in PANELS)
