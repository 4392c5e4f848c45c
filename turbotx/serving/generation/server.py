"""``turbotx serve --task generate``: loads a causal language model and listens.

In: the command line's arguments. Out: a server until SIGINT or SIGTERM; it then finishes accepted
texts and exits::

    serve_generation("path/to/llama", Settings(), GenerationLimits(), 2 << 30, host=..., port=8080)
"""

from __future__ import annotations

from typing import Any

from turbotx.serving.generation.app import create_generation_app
from turbotx.serving.generation.model import load_generator
from turbotx.serving.generation.scheduler import GenerationLimits
from turbotx.serving.generation.service import GenerationService
from turbotx.serving.listener import listen, open_port
from turbotx.serving.settings import Settings, SettingsError


def serve_generation(
    model: str, settings: Settings, limits: GenerationLimits, max_cache_nbytes: int, *, host: str,
    port: int, **choices: Any,
) -> None:  # fmt: skip
    """Serve one model until SIGINT or SIGTERM.

    max_cache_nbytes: of the key/value caches, with reserved space. choices: arguments of
    `load_generator`. Raises ModelFilesError, SettingsError, ModelFailed.
    """
    if max_cache_nbytes <= 0:
        raise SettingsError(f"max_cache_nbytes must be above zero, got {max_cache_nbytes}")
    listener = open_port(host, port)  # before the model is loaded, which takes much longer
    generator = load_generator(model, max_cache_nbytes=max_cache_nbytes, **choices)
    service = GenerationService(generator, settings, limits, max_cache_nbytes)
    listen(service, create_generation_app(service), host=host, port=port, listener=listener)
