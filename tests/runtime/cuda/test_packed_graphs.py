"""Packed calls on a GPU: any mixture right, plainly, captured and replayed, by few graphs.

In: small encoders, every kernel in Triton's interpreter; or a stand-in that only writes down. Out:
what the models give for each token, zeros in padding, and how many graphs a stream takes.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

pytest.importorskip("triton", reason="Triton is for Linux only")

import turbotx
from tests.engine.test_packed import FAMILIES, NAMES, mask_of
from tests.runtime.cuda.stand_in_device import InterpretedDevice, RecordingDevice, bind_to
from turbotx.errors import DeviceError, InputError
from turbotx.runtime.cuda.packed_graphs import FEW, TILE, room_for

transformers = pytest.importorskip("transformers")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
MASKS = [("right", [9, 1, 4, 0], 9), ("left", [9, 1, 4, 0], 9), ("holes", [9, 1, 4, 0], 9),
         ("right", [1], 1), ("right", [0, 0], 3), ("right", [12, 11], 12)]  # fmt: skip


def make_model(family: str) -> nn.Module:
    sizes = {name: 1 if name in LAYERS else n for name, n in FAMILIES[family].items()}
    config = transformers.AutoConfig.for_model(family, **sizes)
    torch.manual_seed(1)
    made = getattr(transformers, NAMES.get(family, "AutoModel"))
    model: nn.Module = made(config) if family in NAMES else made.from_config(config)
    return model.eval()


@torch.no_grad()
def leaves(call: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    return pytree.tree_leaves(call(*args, **kwargs))


def check_masked(model: nn.Module, fast: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    shown = mask.to(torch.bool)
    given = {"input_ids": ids, "attention_mask": mask}
    for a, b in zip(leaves(fast, **given), leaves(model, **given), strict=True):
        assert a.shape == b.shape
        if a.ndim == 3:
            assert not a[~shown].any()
            a, b = a[shown], b[shown]
        else:
            a, b = a[shown.any(1)], b[shown.any(1)]
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_any_mask_plainly_captured_and_replayed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = make_model(family), InterpretedDevice()
    fast = bind_to(device, model, monkeypatch, padding="packed")
    for kind, rows, width in MASKS:
        ids = torch.randint(5, 60, (len(rows), width))
        check_masked(model, fast, ids, mask_of(kind, rows, width))
    stats = fast.stats()
    assert stats["captures"] == 1 and 0 < stats["graph_captures"] <= 2
    assert sum(graph.replays for graph in device.graphs) > len(device.graphs)


def test_int8_rows_plainly_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = make_model("bert"), InterpretedDevice()
    how: Any = {"quantize": "int8", "padding": "packed"}
    fast, cpu = bind_to(device, model, monkeypatch, **how), turbotx.optimize(model, **how)
    for kind, rows, width in MASKS[:4]:
        given = {
            "input_ids": torch.randint(5, 60, (len(rows), width)),
            "attention_mask": mask_of(kind, rows, width),
        }
        for a, b in zip(leaves(fast, **given), leaves(cpu, **given), strict=True):
            # The same integers but where a kernel's last bit rounds to another one.
            torch.testing.assert_close(a, b, rtol=0, atol=2e-2)
    assert any("int8" in name for name in device.names("launch"))
    assert 0 < fast.stats()["graph_captures"] <= 2


def test_flat_rows_and_lengths_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("bert")
    fast = bind_to(InterpretedDevice(), model, monkeypatch, padding="packed")
    lengths, flat = [5, 0, 9, 1], torch.randint(5, 60, (15,))
    on_device = torch.tensor(lengths)
    monkeypatch.setattr("turbotx.runtime.token_inputs._is_on_gpu", lambda x: x is on_device)
    calls = [{"lengths": lengths}] * 3 + [{"lengths": on_device, "longest": 9}]
    for given in calls:
        hidden, pooled = leaves(fast.packed, input_ids=flat, **given)
        assert hidden.shape[0] == 15 and pooled.shape[0] == 4
        for k, ids in enumerate(flat.split(lengths)):
            if ids.numel():
                alone = leaves(model, ids[None], torch.ones_like(ids)[None])
                own = hidden[sum(lengths[:k]) :][: lengths[k]]
                torch.testing.assert_close(own, alone[0][0], rtol=3e-5, atol=3e-5)
                torch.testing.assert_close(pooled[k], alone[1][0], rtol=3e-5, atol=3e-5)
    assert fast.stats()["graph_captures"] == 1


@torch.no_grad()
def test_lengths_on_the_device_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = RecordingDevice()
    fast = bind_to(device, make_model("bert"), monkeypatch, padding="packed")
    monkeypatch.setattr(
        "turbotx.runtime.token_inputs._is_on_gpu", lambda x: isinstance(x, torch.Tensor)
    )
    flat = torch.randint(5, 60, (15,))
    for wrong in ([5, 1, 1], [16, -1], [2, 13]):
        fast.packed(input_ids=flat, lengths=torch.tensor(wrong), longest=12)
        with pytest.raises(InputError, match="an earlier call of packed"):
            fast.packed(input_ids=flat, lengths=torch.tensor([7, 8]), longest=12)
    with pytest.raises(InputError, match="whole numbers"):
        fast.packed(input_ids=flat, lengths=torch.tensor([7.0, 8.0]), longest=12)
    device.users_capture = True
    with pytest.raises(DeviceError, match="lengths on the host would be the graph's"):
        fast.packed(input_ids=flat, lengths=[7, 8])
    with pytest.raises(DeviceError, match="once its mask is read"):
        fast(input_ids=flat.view(3, 5), attention_mask=torch.ones(3, 5, dtype=torch.int64))


@torch.no_grad()
def test_a_thousand_mixtures_replay_a_few_dozen_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = bind_to(RecordingDevice(), make_model("bert"), monkeypatch, padding="packed")
    numbers = random.Random(0)
    ids = torch.randint(5, 60, (32 * 64,))
    for _ in range(1000):
        lengths = [numbers.randint(0, 64) for _ in range(numbers.randint(1, 32))]
        fast.packed(input_ids=ids[: sum(lengths)], lengths=lengths)
    stats = fast.stats()
    assert stats["captures"] == 1 and stats["graph_captures"] <= 36
    assert stats["plans"] <= 40


def test_room_is_at_most_an_eighth() -> None:
    for tokens in [*range(1, 5000), 123_457, 10**7]:
        room = room_for(tokens)
        assert room >= tokens and room % TILE == 0
        assert room - tokens < TILE if tokens <= FEW else room - tokens <= tokens / 8
    assert len({room_for(n) for n in range(1, 16_001)}) <= 53


def test_inference_mode_and_its_absence_share_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server that runs under inference_mode, and whoever calls its module otherwise."""
    fast = bind_to(RecordingDevice(), make_model("bert"), monkeypatch, padding="packed")
    flat = torch.randint(5, 60, (15,))
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                fast.packed(input_ids=flat, lengths=[7, 8])
    assert fast.stats()["graph_captures"] == 1
