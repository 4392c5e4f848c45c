"""A second start takes the first one's program, and compiles what that lacks; with padding or
without it, as the model allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from tests.serving.tiny_models import bert, save  # noqa: E402
from turbotx.errors import InputError, PackError  # noqa: E402
from turbotx.serving import transformer_files  # noqa: E402
from turbotx.serving.model_files import ModelFilesError, load_model  # noqa: E402
from turbotx.serving.tokens import TokenRow  # noqa: E402

ROWS = [TokenRow((2, 5, 6, 3)), TokenRow((2, 7, 3))]


def test_a_second_start_captures_nothing(tmp_path, monkeypatch):
    folder, kept = save(tmp_path / "model", bert()), tmp_path / "kept"
    first = load_model(str(folder), programs=kept).engine
    wanted = first.run(ROWS)
    assert not first.module.loaded
    first.keep()
    (path,) = kept.iterdir()

    monkeypatch.setattr("turbotx.serving.kept_program.compiled", None)  # must not be needed
    assert first.packs
    second = load_model(str(folder), programs=kept).engine
    assert second.module.loaded
    assert (second.run(ROWS) == wanted).all() and (second.run(ROWS[:1]) == wanted[:1]).all()
    monkeypatch.undo()

    other = load_model(str(folder), programs=kept, pooling="cls").engine  # another program
    assert not other.module.loaded
    written = path.stat().st_mtime_ns
    second.keep()  # came from there: not written again
    assert path.stat().st_mtime_ns == written

    class Refusing:
        def packed(self, **inputs):
            raise InputError("the file holds no call of this kind")

    second.module.optimized = Refusing()
    assert (second.run(ROWS[:1]) == wanted[:1]).all() and not second.module.loaded
    path.write_bytes(b"damaged")
    third = load_model(str(folder), programs=kept).engine
    assert not third.module.loaded and (third.run(ROWS) == wanted).all()


class Mixed(torch.nn.Module):
    """Looks at the neighbours of each token: cannot be packed."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.mixing = torch.nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return {"last_hidden_state": self.mixing(hidden.mT).mT}


def test_a_model_that_does_not_pack_is_served_padded_and_says_why(tmp_path, monkeypatch, caplog):
    folder, kept = save(tmp_path / "model", bert()), tmp_path / "kept"

    def load_mixed(*arguments):
        found = transformer_files.load_module(*arguments)
        found.module.transformer = Mixed(found.module.transformer).eval()
        return found

    monkeypatch.setattr("turbotx.serving.model_files.load_module", load_mixed)
    with caplog.at_level("INFO", "turbotx.serving"):
        first = load_model(str(folder), programs=kept).engine
        wanted = first.run(ROWS)
    assert not first.packs
    (line,) = [r.getMessage() for r in caplog.records if "served padded" in r.getMessage()]
    assert "cannot pack SentenceModel: conv" in line
    first.keep()
    second = load_model(str(folder), programs=kept)
    assert second.engine.module.loaded and second.padding == "padded"
    with pytest.raises(PackError, match="conv"):
        load_model(str(folder), padding="packed").engine.run(ROWS)
    padded = load_model(str(folder), padding="padded").engine
    assert not padded.packs and wanted.shape == padded.run(ROWS).shape


@pytest.mark.parametrize("pooling", ["mean", "cls+max", "weightedmean", "lasttoken", "none"])
def test_packed_answers_are_the_padded_ones(tmp_path, pooling):
    folder = save(tmp_path / "model", bert())
    backend = (
        "turbotx" if pooling == "mean" else "eager"
    )  # which is as padded, and compiles nothing
    ways = ({"padding": "packed"}, {"padding": "padded", "backend": backend})
    engines = [load_model(str(folder), pooling=pooling, **way).engine for way in ways]
    rows = [*ROWS, TokenRow((2, 9, 8, 7, 6, 3), (0, 0, 0, 1, 1, 1)), TokenRow((2,))]
    for packed, padded in zip(*(engine.run(rows) for engine in engines), strict=True):
        np.testing.assert_allclose(packed, padded, rtol=1e-5, atol=2e-6)
    assert [engine.packs for engine in engines] == [True, False]


def test_pytorch_alone_is_padded(tmp_path):
    folder = str(save(tmp_path / "model", bert()))
    assert load_model(folder, backend="eager").padding == "padded"
    with pytest.raises(ModelFilesError, match="needs backend turbotx"):
        load_model(folder, backend="eager", padding="packed")


@pytest.mark.parametrize("quantize", ["int8", "int8-weights"])
def test_quantised_models_are_packed_and_their_programs_kept_apart(tmp_path, quantize):
    folder, kept = str(save(tmp_path / "model", bert())), tmp_path / "kept"
    plain = load_model(folder, programs=kept).engine
    narrow = load_model(folder, programs=kept, quantize=quantize)
    wanted, found = plain.run(ROWS), narrow.engine.run(ROWS)
    assert narrow.padding == "packed" and narrow.info.dtype == f"float32-{quantize}"
    assert (wanted != found).any()
    assert (np.sum(wanted * found, 1) > 0.99).all()  # of length 1
    plain.keep(), narrow.engine.keep()
    assert len([*kept.iterdir()]) == 2
    second = load_model(folder, programs=kept, quantize=quantize).engine
    assert second.module.loaded and (second.run(ROWS) == found).all()
    padded = load_model(folder, quantize=quantize, padding="padded").engine
    np.testing.assert_allclose(padded.run(ROWS), found, rtol=0, atol=1e-5)
    with pytest.raises(ModelFilesError, match="needs backend turbotx"):
        load_model(folder, quantize=quantize, backend="eager")
