"""A second start takes the first one's program, and compiles what that lacks."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

from tests.serving.tiny_models import bert, save  # noqa: E402
from turbotx.errors import InputError  # noqa: E402
from turbotx.serving.model_files import load_model  # noqa: E402
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
    second = load_model(str(folder), programs=kept).engine
    assert second.module.loaded
    assert (second.run(ROWS) == wanted).all() and (second.run(ROWS[:1]) == wanted[:1]).all()
    monkeypatch.undo()

    other = load_model(str(folder), programs=kept, pooling="cls").engine  # another program
    assert not other.module.loaded
    written = path.stat().st_mtime_ns
    second.keep()  # came from there: not written again
    assert path.stat().st_mtime_ns == written

    def refuse(**inputs):
        raise InputError("the file holds no call of this kind")

    second.module.optimized = refuse
    assert (second.run(ROWS[:1]) == wanted[:1]).all() and not second.module.loaded
    path.write_bytes(b"damaged")
    third = load_model(str(folder), programs=kept).engine
    assert not third.module.loaded and (third.run(ROWS) == wanted).all()
