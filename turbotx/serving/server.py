"""``turbotx serve``: load, measure, listen, and leave in good order.

In: the command line's arguments. Out: a server on host and port until it is told to stop; then it
answers what it has accepted and exits::

    serve("minilm", port=8080, policy="aged", api_key="secret")
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import FrameType

import uvicorn

from turbotx.serving.app import create_app
from turbotx.serving.cost import CostTable
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
    policy: str = "aged",
    max_batch: int = 32,
    max_batch_tokens: int = 16_384,
    max_queue: int = 4_096,
    max_age_ms: float = 5_000.0,
    lazy_ms: float = 0.0,
    timeout_ms: float = 30_000.0,
    max_client_batch: int = 256,
    max_body_nbytes: int = 8 << 20,
    cache_nbytes: int = 64 << 20,
    tokenizer_threads: int = 2,
    api_key: str | None = None,
    otel: bool = False,
    log_level: str = "info",
) -> None:
    """Serve a model directory over HTTP until SIGINT or SIGTERM.

    ``api_key`` defaults to the environment variable TURBOTX_API_KEY. Raises ModelFilesError,
    SettingsError.
    """
    settings = Settings(
        policy=policy,
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        max_queue=max_queue,
        max_age_ms=max_age_ms,
        lazy_ms=lazy_ms,
        timeout_ms=timeout_ms,
        max_client_batch=max_client_batch,
        max_body_nbytes=max_body_nbytes,
        cache_nbytes=cache_nbytes,
        tokenizer_threads=tokenizer_threads,
        api_key=api_key or os.environ.get("TURBOTX_API_KEY") or None,
        cost_folder=cost_folder(),
        otel=otel,
    )
    log_as_json(log_level)
    loaded = load_model(
        model, backend=backend, device=device, dtype=dtype, max_length=max_length, weights=weights
    )
    run(loaded, settings, host=host, port=port)


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
