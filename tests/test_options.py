"""Options: what editors are told of them is what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import get_args, get_type_hints

from torch import nn

import turbotx
from turbotx.options import CHOICES, OptionArguments, Options


def test_what_editors_are_told_of_options_is_what_there_is() -> None:
    assert list(get_type_hints(OptionArguments)) == [f.name for f in fields(Options)]
    assert all(getattr(Options(), name) in choices for name, choices in CHOICES.items())
    words = {f.name for f in fields(Options) if isinstance(getattr(Options(), f.name), str)}
    assert words == {*CHOICES}


def test_the_docstring_of_optimize_lists_every_option() -> None:
    words = re.findall(r"\w+", turbotx.optimize.__doc__ or "")
    assert {f.name for f in fields(Options)} <= set(words)


def test_the_optimized_class_takes_a_models_class_in_annotations() -> None:
    shown = turbotx.OptimizedModule[nn.Linear]
    assert get_args(shown) == (nn.Linear,)
    assert isinstance(turbotx.optimize(nn.Linear(2, 2)), turbotx.OptimizedModule)
