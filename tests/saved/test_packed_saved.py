"""Packed modules in a file: padded calls, flat ones and lists, in a process without a compiler.

In: a BERT of two layers, `padding="packed"`, saved. Out: the bits of the optimized module, whatever
the mixture; a file that packs otherwise than its program is refused.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import turbotx
from turbotx.errors import InputError, SavedFileError, TrainingError
from turbotx.saved.codec import decode_packing
from turbotx.saved.container import read_container

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

LENGTHS = [3, 9, 1]


def ids(lengths: list[int]) -> torch.Tensor:
    return torch.randint(0, 60, (sum(lengths),))


@pytest.fixture(scope="module")
def fast() -> Any:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    torch.manual_seed(0)
    fast = turbotx.optimize(transformers.BertModel(config).eval(), padding="packed")
    with torch.no_grad():
        fast.packed(input_ids=ids([2, 4]), lengths=[2, 4])
    return fast


@pytest.fixture(scope="module")
def path(fast: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.ttx"
    turbotx.save(fast, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [4, 0, 6], [12] * 5])
def test_the_same_bits_for_any_mixture(fast: Any, path: Path, lengths: list[int]) -> None:
    loaded, flat = turbotx.load(path), ids(lengths)
    assert loaded.packs
    ours, expected = (m.packed(input_ids=flat, lengths=lengths) for m in (loaded, fast))
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(ours.pooler_output, expected.pooler_output)
    listed = loaded.packed(input_ids=list(flat.split(lengths))).last_hidden_state
    assert torch.equal(torch.cat(listed), expected.last_hidden_state)
    width = max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()  # on the left
    call = {"input_ids": torch.randint(0, 60, mask.shape), "attention_mask": mask}
    assert torch.equal(loaded(**call).last_hidden_state, fast(**call).last_hidden_state)


def test_a_fresh_process_needs_no_compiler_no_tracing_and_no_algebra(
    fast: Any, path: Path, tmp_path: Path
) -> None:
    flat = ids(LENGTHS)
    with torch.no_grad():
        expected = fast.packed(input_ids=flat, lengths=LENGTHS).last_hidden_state
    torch.save((flat, expected), tmp_path / "call.pt")
    code = (
        "import sys, torch, turbotx\n"
        f"flat, expected = torch.load({str(tmp_path / 'call.pt')!r})\n"
        f"made = turbotx.load({str(path)!r}).packed(input_ids=flat, lengths={LENGTHS})\n"
        "assert torch.equal(made['last_hidden_state'], expected)\n"
        "print(sorted({'sympy', 'triton', 'transformers', 'turbotx.capture.trace'}"
        " & set(sys.modules)))\n"
    )
    environment = {"PATH": "", "PYTHONPATH": str(Path(turbotx.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_calls_that_the_file_does_not_serve(path: Path) -> None:
    loaded = turbotx.load(path)
    with pytest.raises(InputError, match="no call of this kind"):
        loaded.packed(input_ids=ids([2]), token_type_ids=ids([2]), lengths=[2])
    with pytest.raises(InputError, match="takes no attention_mask"):
        loaded.packed(input_ids=ids([2]), attention_mask=ids([2]), lengths=[2])
    with pytest.raises(TrainingError, match="requires grad"):
        loaded.packed(input_ids=torch.ones(2, requires_grad=True), lengths=[2])


@torch.no_grad()
def test_a_file_without_packing_says_so(fast: Any, tmp_path: Path) -> None:
    plain = turbotx.optimize(copy.copy(turbotx.engine.drop_in.original_of(fast)))
    plain(input_ids=torch.ones(2, 3, dtype=torch.long))
    turbotx.save(plain, tmp_path / "plain.ttx")
    with pytest.raises(InputError, match=r'not saved of a module of optimize\(padding="packed"\)'):
        turbotx.load(tmp_path / "plain.ttx").packed(input_ids=ids([2]), lengths=[2])


@pytest.mark.parametrize("field", ["batch", "seq", "inputs"])
def test_packing_unlike_its_program_is_refused(path: Path, field: str) -> None:
    (program,) = json.loads(read_container(path)[1]["programs.json"])
    assert decode_packing(program, torch.device("cpu")) is not None
    wrong = program["packing"][field]
    program["packing"][field] = wrong[1:] if field == "inputs" else "other"
    with pytest.raises(SavedFileError, match="unlike its program"):
        decode_packing(program, torch.device("cpu"))
