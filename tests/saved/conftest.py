"""What tests of files for GPUs have in common: stand-ins for cubins, a place for the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.saved.stand_in_cubins import Cubins


@pytest.fixture
def cubins(monkeypatch: pytest.MonkeyPatch) -> Cubins:
    from tests.saved.stand_in_cubins import Cubins  # it needs Triton, as these tests do

    return Cubins(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.ttx"
