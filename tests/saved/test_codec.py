"""Codec: an executable comes back from JSON as it was; what is no program is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import turbotx
from tests.saved.test_saved import Model, ids
from turbotx.engine.optimize import engine_of
from turbotx.errors import SavedFileError, SaveError
from turbotx.ir.sizes import Sizes
from turbotx.program.executable import TokenRange
from turbotx.saved.codec import Decoder, decode_program, encode
from turbotx.saved.describe import describe_call

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    fast = turbotx.optimize(Model().eval())
    fast(ids(2, 5))
    return describe_call(engine_of(fast).variants()[0])


def test_what_comes_back_is_what_was_written(described: dict[str, Any]) -> None:
    executable, rules, floats, decisions = decode_program(json.loads(json.dumps(described)), CPU)
    assert encode(executable) == described["executable"]
    assert encode(rules) == described["sizes"] and floats == ()
    assert decisions is None
    assert executable.dims == ("batch", "seq") == rules.dims


def test_ranges_keep_their_sets() -> None:
    tokens, dims = Sizes(("batch * seq",)), ("batch", "seq")
    served = TokenRange(tokens, dims, frozenset({16, 64}), (16, 32, 64))
    again = Decoder(CPU, ("batch", "seq")).decode(json.loads(json.dumps(encode(served))))
    assert again == served
    assert again.holds((2, 8)) and not again.holds((4, 8)) and again.holds((1000, 1))


@pytest.mark.parametrize(
    ("dims", "text"),
    [(["x=print"], "x"), (["seq"], "batch"), (["seq"], "print(seq)"), (["seq"], "seq.real"),
     (["seq"], "(lambda: 1)()"), (["seq"], "seq +"), (["seq"], "[seq][0]"), (["seq"], "1, 2")],
)  # fmt: skip
def test_sizes_that_are_no_arithmetic(described: dict[str, Any], dims: Any, text: str) -> None:
    changed = copy.deepcopy(described)
    changed["executable"]["dims"] = dims
    changed["executable"]["values"] = {"sizes": [text]}
    with pytest.raises(SavedFileError, match=r"not arithmetic|not names"):
        decode_program(changed, CPU)


def test_what_no_program_has(described: dict[str, Any]) -> None:
    changed = copy.deepcopy(described)
    changed["executable"]["leaves"] = [{"is": "Popen", "args": "true"}]
    with pytest.raises(SavedFileError, match="refers to Popen"):
        decode_program(changed, CPU)
    changed["executable"]["leaves"] = [{"op": "aten.nothing.default"}]
    with pytest.raises(SavedFileError, match=r"has no op aten\.nothing"):
        decode_program(changed, CPU)
    with pytest.raises(SaveError, match="PyTorch has no op of that name"):
        encode(print)
    with pytest.raises(SaveError, match="keys are not strings"):
        encode({1: 2})
