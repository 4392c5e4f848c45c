"""A batch over its tokens: every architecture as the padded call, any mask, any mixture.

In: encoders of transformers with small configs, `padding="packed"`. Out: what the model itself
gives for each token that the mask shows, zeros elsewhere; flat, nested and listed inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import turbotx
from turbotx.engine.optimize import engine_of
from turbotx.errors import InputError, PackError

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "mpnet": SIZES,
    "modernbert": SIZES | {"local_attention": 4, "pad_token_id": 0},
    "t5": {
        "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    },
    "llama": SIZES | {"num_key_value_heads": 2, "use_cache": False},
    "gpt2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False},
}  # fmt: skip
NAMES = {"t5": "T5EncoderModel"}
_made: dict[str, tuple[nn.Module, Any]] = {}


def model_of(family: str) -> tuple[nn.Module, Any]:
    if family not in _made:
        config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
        torch.manual_seed(1)
        made = getattr(transformers, NAMES.get(family, "AutoModel"))
        model = made(config) if family in NAMES else made.from_config(config)
        _made[family] = model.eval(), turbotx.optimize(model.eval(), padding="packed")
    return _made[family]


@torch.no_grad()
def check(family: str, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """What the mask shows is the model's own, up to rounding; what it hides is 0."""
    model, fast = model_of(family)
    with torch.no_grad():
        found = pytree.tree_leaves(fast(input_ids=ids, attention_mask=mask))
        eager = pytree.tree_leaves(model(input_ids=ids, attention_mask=mask))
    shown = mask.to(torch.bool)
    for a, b in zip(found, eager, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.ndim == 3:
            assert not a[~shown].any()
            a, b = a[shown], b[shown]
        else:
            a, b = a[shown.any(1)], b[shown.any(1)]
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def mask_of(kind: str, rows: list[int], width: int) -> torch.Tensor:
    columns, lengths = torch.arange(width), torch.tensor(rows)[:, None]
    if kind == "right":
        return (columns < lengths).long()
    if kind == "left":
        return (columns >= width - lengths).long()
    holes = torch.rand(len(rows), width) < 0.6
    return (holes | (columns == lengths - 1)).long() * (lengths > 0)


MIXTURES = st.tuples(
    st.sampled_from(["right", "left", "holes"]),
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.integers(0, 3),
)


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
@settings(max_examples=12)
@given(mixture=MIXTURES)
def test_any_mixture(family: str, mixture: tuple[str, list[int], int]) -> None:
    kind, rows, more = mixture
    width = max(1, *rows) + more
    check(family, torch.randint(5, 60, (len(rows), width)), mask_of(kind, rows, width))


@pytest.mark.parametrize("kind", ["right", "left", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, kind: str) -> None:
    rows = [9, 1, 4, 0]
    check(family, torch.randint(5, 60, (4, 9)), mask_of(kind, rows, 9))
    captures = model_of(family)[1].stats()["captures"]
    check(family, torch.randint(5, 60, (1, 1)), torch.ones(1, 1, dtype=torch.long))
    check(family, torch.randint(5, 60, (2, 17)), mask_of("holes", [17, 3], 17))
    assert model_of(family)[1].stats()["captures"] == captures


@torch.no_grad()
def test_a_batch_costs_its_tokens() -> None:
    """The bytes of a call's plan follow its tokens, not its longest row."""
    _, fast = model_of("bert")  # a bias by columns, T5's, would be there for few tokens too
    check("bert", torch.randint(5, 60, (2, 4)), torch.ones(2, 4, dtype=torch.long))
    compiled = engine_of(fast).variants()[-1]
    program = compiled.program
    few, many = (program.plan((8, 512, 8, tokens)).peak_nbytes for tokens in (512, 4096))
    assert 4 * few < many


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(60, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.inner(self.table(input_ids).mT).mT * attention_mask[:, :, None]


def test_what_mixes_tokens_is_refused() -> None:
    fast = turbotx.optimize(Mixing().eval(), padding="packed")
    with pytest.raises(PackError, match="cannot pack Mixing: conv"):
        fast(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5))


def test_other_masks_and_rows_are_refused() -> None:
    _, fast = model_of("bert")
    ids = torch.randint(5, 60, (2, 4))
    with pytest.raises(InputError, match="other values than 0 and 1"):
        fast(input_ids=ids, attention_mask=torch.full((2, 4), 2))
    with pytest.raises(PackError, match="has no attention_mask"):
        fast(input_ids=ids)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 9, 1], [4, 0, 6, 0], [1], [0, 0], [12] * 5])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_flat_nested_and_listed(family: str, lengths: list[int]) -> None:
    model, fast = model_of(family)
    parts = [torch.randint(5, 60, (n,)) for n in lengths]
    flat = torch.cat(parts)
    found = fast.packed(input_ids=flat, lengths=lengths).last_hidden_state
    assert found.shape == (sum(lengths), 32)
    for part, rows in zip(parts, found.split(lengths), strict=True):
        if len(part):
            alone = model(input_ids=part[None]).last_hidden_state[0]
            torch.testing.assert_close(rows, alone, rtol=2e-5, atol=2e-5)
    listed = fast.packed(input_ids=parts).last_hidden_state
    assert [len(x) for x in listed] == lengths and torch.equal(torch.cat(listed), found)
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    out = fast.packed(input_ids=nested).last_hidden_state
    assert out.is_nested and torch.equal(out.values(), found)


@torch.no_grad()
def test_inputs_are_given_in_different_forms() -> None:
    _, fast = model_of("bert")
    parts = [torch.randint(5, 60, (n,)) for n in (3, 1)]
    kinds = torch.tensor([0, 1, 1, 0])
    flat = fast.packed(input_ids=torch.cat(parts), token_type_ids=kinds, lengths=np.array([3, 1]))
    listed = fast.packed(input_ids=parts, token_type_ids=kinds)
    assert torch.equal(torch.cat(listed[0]), flat[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "turned", [{"input_ids"}, {"attention_mask"}, {"input_ids", "attention_mask"}]
)
def test_inputs_may_lie_in_another_order_in_memory(turned: set[str]) -> None:
    model, fast = model_of("bert")
    mask = mask_of("right", [4, 2, 6], 6)
    given = {"input_ids": torch.randint(5, 60, (3, 6)), "attention_mask": mask}
    wanted = model(**given)[0]
    found = fast(**{k: x.T.contiguous().T if k in turned else x for k, x in given.items()})[0]
    torch.testing.assert_close(found, wanted * mask[:, :, None], rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_hidden_states_are_by_token_too() -> None:
    config = transformers.AutoConfig.for_model("bert", **SIZES)
    model = transformers.AutoModel.from_config(config).eval()
    fast = turbotx.optimize(model, padding="packed")  # the first such call installs hooks
    parts = [torch.randint(5, 60, (n,)) for n in (2, 5)]
    for _ in range(2):
        found = fast.packed(input_ids=parts, output_hidden_states=True).hidden_states
    for n, part in enumerate(parts):
        alone = model(input_ids=part[None], output_hidden_states=True).hidden_states
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a[n], b[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "lengths", [[1.5, 2.5], [4.0], [float("nan")], "4", 4, torch.tensor(4), torch.tensor([[4]]),
                [True], [-1, 5], torch.tensor([2.0, 2.0]), torch.ones(2, device="meta").long()],
)  # fmt: skip
def test_lengths_are_whole_numbers(lengths: Any) -> None:
    _, fast = model_of("bert")
    with pytest.raises(InputError, match="one whole number of tokens, 0 or more, for each"):
        fast.packed(input_ids=torch.randint(5, 60, (4,)), lengths=lengths)


def test_packed_inputs_that_do_not_fit() -> None:
    _, fast = model_of("bert")
    ids = torch.randint(5, 60, (4,))
    with pytest.raises(InputError, match="token_type_ids has one row for each column"):
        fast.packed(input_ids=ids, token_type_ids=torch.zeros(3, dtype=torch.long), lengths=[3, 1])
    with pytest.raises(InputError, match="longest is a whole number"):
        fast.packed(input_ids=ids, lengths=[4], longest=4.5)
    with pytest.raises(InputError, match="on one device"):
        fast.packed(input_ids=[ids, ids.to("meta")])
    with pytest.raises(InputError, match="no input has 5 rows"):
        fast.packed(input_ids=ids, lengths=[2, 3])
    with pytest.raises(InputError, match="needs the lengths"):
        fast.packed(input_ids=ids)
    with pytest.raises(InputError, match="takes no attention_mask"):
        fast.packed(input_ids=ids, attention_mask=ids, lengths=[4])
    with pytest.raises(InputError, match="of the lengths"):
        fast.packed(input_ids=[ids], token_type_ids=[ids[:2], ids[:2]])
    with pytest.raises(InputError, match="made by optimize"):
        turbotx.optimize(model_of("bert")[0]).packed(input_ids=ids, lengths=[4])


def test_explained_and_verified() -> None:
    _, fast = model_of("t5")
    call = {
        "input_ids": torch.randint(5, 60, (3, 8)),
        "attention_mask": mask_of("right", [8, 2, 5], 8),
    }
    report = turbotx.explain(fast, **call)
    assert report.dims["tokens"] == 15 and report.at(batch=4).dims["tokens"] == 15
    assert any("packed_attention" in x.name for x in report.launches)
    assert report.numerics(fast, **call).holds
    assert "packed_attention" in report.to_html()


class LastColumn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (self.table(input_ids) * attention_mask[:, :, None])[:, -1]


@torch.no_grad()
def test_the_last_column_is_exact_and_no_flat_call_has_one() -> None:
    model = LastColumn().eval()
    fast = turbotx.optimize(model, padding="packed")
    ids, mask = torch.randint(0, 60, (3, 6)), mask_of("left", [2, 6, 1], 6)
    torch.testing.assert_close(fast(ids, mask), model(ids, mask))
    with pytest.raises(InputError, match="last column"):
        fast.packed(input_ids=ids.flatten(), lengths=[6, 6, 6])


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids) * attention_mask[:, :, None]
        return x * 2 if attention_mask.sum(1).amax() > 3 else x


@torch.no_grad()
def test_a_decision_by_values_is_that_of_the_call(tmp_path: Path) -> None:
    model = Deciding().eval()
    fast, ids = turbotx.optimize(model, padding="packed"), torch.randint(0, 60, (5,))
    calls = [([5], 2), ([2, 3], 1), ([1, 4], 2)]
    for lengths, factor in calls:
        found = fast.packed(input_ids=ids, lengths=lengths)
        assert torch.equal(found, model.table(ids) * factor)
    turbotx.save(fast, tmp_path / "deciding.tbtx", weights=True)
    loaded = turbotx.load(tmp_path / "deciding.tbtx")
    for lengths, factor in calls:
        found = loaded.packed(input_ids=ids, lengths=lengths)
        assert torch.equal(found, model.table(ids) * factor)
