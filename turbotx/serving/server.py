"""``turbotx serve``: loads, measures, listens, and shuts down gracefully.

In: the command line's arguments. Out: a server on host and port until SIGINT or SIGTERM; it then
finishes accepted requests and exits::

    serve("minilm", port=8080, policy="aged", api_keys=("secret",))
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbotx.kernels.build import cache_directory
from turbotx.serving.app import create_app
from turbotx.serving.cost import CostTable
from turbotx.serving.listener import listen, open_port
from turbotx.serving.logs import log_as_json
from turbotx.serving.model_files import DEFAULT_MODEL, LoadedModel, load_model
from turbotx.serving.service import Service
from turbotx.serving.settings import Settings, SettingsError

log = logging.getLogger(__name__)


def serve(
    models: str | Sequence[str] = DEFAULT_MODEL,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    backend: str = "turbotx",
    device: str = "cpu",
    dtype: str = "float32",
    quantize: str = "none",
    weights: Path | None = None,
    max_length: int | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    default_prompt: str | None = None,
    default_prompt_name: str | None = None,
    served_model_name: Sequence[str] = (),
    task: str = "embed",
    generation: Mapping[str, Any] | None = None,
    log_level: str = "info",
    **settings: Any,
) -> None:
    """Serve model directories over HTTP until SIGINT or SIGTERM.

    settings: the fields of ``Settings``; costs are saved in turbotx's cache unless ``cost_folder``
    is given. served_model_name: a name per model, by default its directory's. task: "embed", or
    "generate" for one causal language model, with ``generation``, fields of ``GenerationLimits``
    and max_cache_nbytes, by default 2 GiB. The other arguments are those of ``load_model``; choices
    for a single model, such as pooling, are errors with several. Raises ModelFilesError,
    SettingsError, WeightsError.
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
    # The pool has its own threads; the library's would compete with the engine.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if task == "generate":
        # A lazy import: an embedding server does not need it.
        from turbotx.serving.generation.scheduler import GenerationLimits
        from turbotx.serving.generation.server import serve_generation

        limits = dict(generation or {})
        max_cache_nbytes = limits.pop("max_cache_nbytes", 2 << 30)
        refuse_choices(models, {**choices, "backend": None if backend == "turbotx" else backend})
        serve_generation(
            models[0], checked, GenerationLimits(**limits), max_cache_nbytes, host=host, port=port,
            device=device, dtype=dtype, quantize=quantize, max_length=max_length,
            served_model_name=names[0],
        )  # fmt: skip
        return
    listener = open_port(host, port)  # before the model is loaded, which takes much longer
    loaded = [
        load_model(
            model, backend=backend, device=device, dtype=dtype, quantize=quantize,
            programs=checked.cost_folder, padding=checked.wanted_padding, served_model_name=name,
            **choices,
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
    """Serve loaded models. costs: None to measure at the start.

    Raises ModelFailed if a model cannot run, SettingsError if the port is taken.
    """
    listener = listener or open_port(host, port)
    service = Service(model, settings, costs)
    listen(service, create_app(service), host=host, port=port, listener=listener)


def refuse_choices(models: Sequence[str], choices: Mapping[str, Any]) -> None:
    """Raise SettingsError for choices that do not apply to task generate."""
    if len(models) > 1:
        raise SettingsError(f"{len(models)} models with task generate: it serves one model")
    said = [n for n, value in choices.items() if value is not None and n != "max_length"]
    if said:
        raise SettingsError(f"{', '.join(said)} is for task embed: leave it out with task generate")


def check_models(
    models: Sequence[str], names: Sequence[str], choices: Mapping[str, Any]
) -> Sequence[str | None]:
    """Return a name per model, None for its directory's. Raises SettingsError."""
    if not models:
        raise SettingsError("no model: name a directory, or minilm")
    if names and len(names) != len(models):
        raise SettingsError(
            f"{len(names)} served_model_name for {len(models)} models: one for each"
        )
    said = [name for name, value in choices.items() if value is not None]
    if said and len(models) > 1:
        raise SettingsError(f"{', '.join(said)} applies to one model: leave it out for several")
    return names or [None] * len(models)


def cost_folder() -> Path:
    """Return the folder of measured costs, in turbotx's cache."""
    return cache_directory() / "serving"
