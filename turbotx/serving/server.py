"""``turbotx serve``: load, measure, listen, and leave in good order.

In: the command line's arguments. Out: a server on host and port until it is told to stop; then it
answers what it has accepted and exits::

    serve("minilm", port=8080, policy="aged", api_keys=("secret",))
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from turbotx.serving.app import create_app
from turbotx.serving.cost import CostTable
from turbotx.serving.engine import Pooling
from turbotx.serving.logs import log_as_json
from turbotx.serving.model_files import DEFAULT_MODEL, LoadedModel, load_model
from turbotx.serving.service import Service
from turbotx.serving.settings import Settings


def serve(
    model: str = DEFAULT_MODEL,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    backend: str = "turbotx",
    device: str = "cpu",
    dtype: str = "float32",
    max_length: int | None = None,
    weights: Path | None = None,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    log_level: str = "info",
    **settings: Any,
) -> None:
    """Serve a model directory over HTTP until SIGINT or SIGTERM.

    ``settings`` are the fields of ``Settings``; costs are kept in turbotx's cache unless
    ``cost_folder`` says where. The others are those of ``load_model``. Raises ModelFilesError,
    SettingsError, WeightsError.
    """
    settings["cost_folder"] = settings.get("cost_folder") or cost_folder()
    checked = Settings(**settings)
    log_as_json(log_level)
    loaded = load_model(
        model, backend=backend, device=device, dtype=dtype, max_length=max_length, weights=weights,
        pooling=pooling, normalize=normalize,
    )  # fmt: skip
    run(loaded, checked, host=host, port=port)


def run(
    model: LoadedModel,
    settings: Settings,
    *,
    host: str,
    port: int,
    costs: CostTable | None = None,
) -> None:
    """Listen with a model that is already loaded. No ``costs``: measured at the start."""
    service = Service(model, settings, costs)
    config = uvicorn.Config(
        create_app(service), host=host, port=port, log_config=None, access_log=False,
        timeout_keep_alive=75, timeout_graceful_shutdown=math.ceil(settings.timeout_ms / 1e3),
    )  # fmt: skip
    GracefulServer(config, service).run()


class GracefulServer(uvicorn.Server):
    """Says so on ``/ready`` as soon as it is told to stop, and exits with 0 when it is done."""

    should_exit: bool
    force_exit: bool

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.leaving = True
        self.force_exit = self.should_exit  # the second signal does not wait
        self.should_exit = True


def cost_folder() -> Path:
    """Where measured costs are kept: beside turbotx's other caches."""
    base = os.environ.get("TURBOTX_CACHE_DIR")
    return (Path(base) if base else Path.home() / ".cache" / "turbotx") / "serving"
