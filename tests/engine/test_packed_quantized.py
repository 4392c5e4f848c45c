"""Packed batches of int8 models: each real token as in a call of its own text alone.

In: small encoders and a decoder of transformers, quantised, `padding="packed"`. Out: flat, padded
and saved calls beside the same module's int8 calls without padding, of any mixture of lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import turbotx
from tests.engine.test_packed import mask_of, model_of
from tests.kernels.cpp.cpp_probe import needs_compiler
from turbotx.engine.optimize import engine_of

pytestmark = needs_compiler
transformers = pytest.importorskip("transformers")
_made: dict[tuple[str, str], tuple[Any, Any]] = {}


def pair(family: str, how: Any) -> tuple[Any, Any]:
    """The module optimized for packed calls and for padded ones, of one model."""
    if (family, how) not in _made:
        model = model_of(family)[0]
        ways = ({"padding": "packed"}, {})
        _made[family, how] = tuple(turbotx.optimize(model, quantize=how, **w) for w in ways)  # type: ignore[call-overload,assignment]
    return _made[family, how]


@torch.no_grad()
def check(family: str, how: str, lengths: list[int]) -> None:
    packed, alone = pair(family, how)
    parts = [torch.randint(5, 60, (n,)) for n in lengths]
    found = packed.packed(input_ids=torch.cat(parts), lengths=lengths)
    width = max(1, *lengths)
    ids = torch.stack([F.pad(part, (0, width - len(part))) for part in parts])
    mask = mask_of("right", lengths, width)
    padded = packed(input_ids=ids, attention_mask=mask)
    assert torch.equal(padded[0][mask.bool()], found[0]), "the padded call runs the same tokens"
    assert not padded[0][~mask.bool()].any()
    for part, rows in zip(parts, found[0].split(lengths), strict=True):
        if len(part):
            given = {"input_ids": part[None], "attention_mask": torch.ones_like(part)[None]}
            torch.testing.assert_close(rows, alone(**given)[0][0], rtol=2e-5, atol=2e-5)


FAMILIES = ("bert", "modernbert", "t5", "llama")


@pytest.mark.parametrize(
    ("family", "how"), [*((name, "int8") for name in FAMILIES), ("bert", "int8-weights")]
)
def test_every_token_is_that_of_its_text_alone(family: str, how: str) -> None:
    check(family, how, [9, 1, 0, 17, 4])
    captures = pair(family, how)[0].stats()["captures"]
    for lengths in ([1], [0, 0, 3], [12] * 3):
        check(family, how, lengths)
    assert pair(family, how)[0].stats()["captures"] == captures


@settings(max_examples=10)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_any_mixture(lengths: list[int]) -> None:
    check("bert", "int8", lengths)


@torch.no_grad()
def test_launches_keep_the_rule_and_are_as_many_as_padded() -> None:
    packed, padded = pair("bert", "int8")
    ids, mask = torch.randint(5, 60, (3, 8)), mask_of("left", [8, 1, 5], 8)
    call = {"input_ids": ids, "attention_mask": mask}
    report = turbotx.explain(packed, **call)
    numerics = report.numerics(packed, **call)
    assert numerics.holds and numerics.likenesses[0].worst > 0.99
    names = [x.name for x in report.launches]
    assert sum("int8" in n for n in names) == 9, "four a layer, and the pooler"
    others = [x.name for x in turbotx.explain(padded, **call).launches]
    assert sum("int8" in n for n in others) == 9
    assert abs(len(names) - len(others)) <= 1, "the first tokens are taken apart"


@torch.no_grad()
@pytest.mark.parametrize("how", ["int8", "int8-weights"])
def test_a_saved_file_runs_packed(how: Any, tmp_path: Path) -> None:
    packed, _ = pair("bert", how)
    lengths, flat = [5, 0, 1, 9], torch.randint(5, 60, (15,))
    wanted = packed.packed(input_ids=flat, lengths=lengths)[0]
    turbotx.save(packed, tmp_path / "packed.ttx")
    loaded = turbotx.load(tmp_path / "packed.ttx")
    assert torch.equal(loaded.packed(input_ids=flat, lengths=lengths)[0], wanted)
    ids, mask = flat[None, :9].expand(2, 9).contiguous(), mask_of("right", [9, 3], 9)
    given = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(loaded(**given)[0], packed(**given)[0])


@torch.no_grad()
def test_floats_can_be_given_up() -> None:
    torch.manual_seed(1)
    model = transformers.BertModel(model_of("bert")[0].config).eval()
    fast = turbotx.optimize(model, quantize="int8", padding="packed", keep_weights=False)
    flat = torch.randint(5, 60, (7,))
    first = fast.packed(input_ids=flat, lengths=[3, 4])[0]
    assert torch.equal(fast.packed(input_ids=flat, lengths=[3, 4])[0], first)
    assert engine_of(fast).variants()
