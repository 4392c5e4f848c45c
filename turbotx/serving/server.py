"""``turbotx serve``: loads, measures, listens, and shuts down gracefully.

In: the command line's arguments. Out: a server on host and port until it is told to stop; then it
answers what it has accepted and exits::

    serve("minilm", port=8080, policy="aged", api_keys=("secret",))
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from turbotx.serving.app import create_app
from turbotx.serving.connections import ConnectionLimits, connection_limit, make_protocol
from turbotx.serving.cost import CostTable
from turbotx.serving.logs import log_as_json
from turbotx.serving.model_files import DEFAULT_MODEL, LoadedModel, load_model
from turbotx.serving.service import Service
from turbotx.serving.settings import Settings, SettingsError

log = logging.getLogger(__name__)
SWITCH_S = 0.001  # the event loop waits this long for other threads' Python at each of its turns


def serve(
    models: str | Sequence[str] = DEFAULT_MODEL,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    backend: str = "turbotx",
    device: str = "cpu",
    dtype: str = "float32",
    weights: Path | None = None,
    max_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    default_prompt: str | None = None,
    default_prompt_name: str | None = None,
    served_model_name: Sequence[str] = (),
    log_level: str = "info",
    **settings: Any,
) -> None:
    """Serve model directories over HTTP until SIGINT or SIGTERM.

    ``settings`` are the fields of ``Settings``; costs are kept in turbotx's cache unless
    ``cost_folder`` says where. The others are those of ``load_model``; of several models each has
    its name of ``served_model_name`` or its directory's, and what their files say: what is said
    about one model is refused. Raises ModelFilesError, SettingsError, WeightsError.
    """
    settings["cost_folder"] = settings.get("cost_folder") or cost_folder()
    checked = Settings(**settings)
    log_as_json(log_level)
    if not checked.api_keys and host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("no API key is asked for, and %s may be reached by others", host)
    choices: dict[str, Any] = {
        "weights": weights, "max_length": max_length, "pooling": pooling, "normalize": normalize,
        "default_prompt": default_prompt, "default_prompt_name": default_prompt_name,
    }  # fmt: skip
    models = [models] if isinstance(models, str) else models
    names = check_models(models, served_model_name, choices)
    # The pool has threads of its own; tokenizers' would take the engine's cores too.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    listener = open_port(host, port)  # before the model is loaded, which takes much longer
    loaded = [
        load_model(
            model, backend=backend, device=device, dtype=dtype, programs=checked.cost_folder,
            padding=checked.wanted_padding, served_model_name=name, **choices,
        )
        for model, name in zip(models, names, strict=True)
    ]  # fmt: skip
    run(loaded, checked, host=host, port=port, listener=listener)


def run(
    model: LoadedModel | Sequence[LoadedModel],
    settings: Settings,
    *,
    host: str,
    port: int,
    costs: CostTable | None = None,
    listener: socket.socket | None = None,
) -> None:
    """Listen with a model that is already loaded. No ``costs``: measured at the start.

    Raises ModelFailed where the model cannot run, SettingsError where the port is taken.
    """
    listener = listener or open_port(host, port)
    service = Service(model, settings, costs)
    shown = f"[{host}]" if ":" in host else host
    service.url = f"http://{shown}:{listener.getsockname()[1]}{settings.url_prefix}"
    limits = ConnectionLimits(
        settings.receive_timeout_ms / 1e3, connection_limit(settings.max_connections)
    )
    config = uvicorn.Config(
        create_app(service), host=host, port=port, log_config=None, access_log=False,
        timeout_keep_alive=75, timeout_graceful_shutdown=math.ceil(settings.timeout_ms / 1e3),
        http=make_protocol(limits), ws="none",
    )  # fmt: skip
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        GracefulServer(config, service, limits).run([listener])
    finally:
        sys.setswitchinterval(before_s)
    if service.failure is not None:
        raise service.failure
    if service.preparing:  # its thread cannot be stopped, and no request was answered yet
        logging.shutdown()
        os._exit(0)


def check_models(
    models: Sequence[str], names: Sequence[str], choices: Mapping[str, Any]
) -> Sequence[str | None]:
    """Return a name for each model, None where its directory gives it. Raises SettingsError."""
    if not models:
        raise SettingsError("no model: name a directory, or minilm")
    if names and len(names) != len(models):
        raise SettingsError(
            f"{len(names)} served_model_name for {len(models)} models: one for each"
        )
    said = [name for name, value in choices.items() if value is not None]
    if said and len(models) > 1:
        raise SettingsError(f"{', '.join(said)} is of one model: serve several as their files say")
    return names or [None] * len(models)


def open_port(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; it does not listen yet. Raises SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"cannot listen on {host} port {port}: {error}") from error
    return opened


class GracefulServer(uvicorn.Server):
    """Says so on ``/ready`` as soon as it is told to stop, and exits with 0 when it is done.

    It also stops where the model turns out not to run: nothing would ever be answered.
    """

    should_exit: bool
    force_exit: bool

    def __init__(self, config: uvicorn.Config, service: Service, limits: ConnectionLimits) -> None:
        super().__init__(config)
        self._service, self._limits = service, limits
        self._frozen = False

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            self._limits.close_late(asyncio.get_running_loop().time())
        if self._service.state == "ready" and not self._frozen:
            # The model's millions of objects stay: no collection need ever look at them again.
            self._frozen = True
            gc.collect()
            gc.freeze()
        if self.should_exit:
            self._service.left.set()
        return await super().on_tick(counter) or self._service.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests and finish those that are there; a second signal ends at once."""
        self._service.leaving = True
        self.force_exit = self.should_exit  # the second signal does not wait
        self.should_exit = True


def cost_folder() -> Path:
    """Where measured costs are kept: beside turbotx's other caches."""
    base = os.environ.get("TURBOTX_CACHE_DIR")
    return (Path(base) if base else Path.home() / ".cache" / "turbotx") / "serving"
