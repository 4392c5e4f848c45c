"""``turbotx serve --task generate``: loads a causal language model and listens.

In: the command line's arguments. Out: a server until SIGINT or SIGTERM; it then finishes accepted
texts and exits::

    serve_generation("path/to/llama", Settings(), GenerationSettings(), host="127.0.0.1", port=8080)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turbotx.serving.generation.app import create_generation_app
from turbotx.serving.generation.model import load_generator
from turbotx.serving.generation.scheduler import GenerationLimits
from turbotx.serving.generation.service import GenerationService
from turbotx.serving.listener import listen, open_port
from turbotx.serving.settings import Settings, SettingsError


@dataclass(frozen=True)
class GenerationSettings:
    """Options of a generation server besides ``Settings``."""

    max_sequences: int = 16  # decoding together
    max_cache_nbytes: int = 2 << 30  # of the key/value caches, with reserved space
    prefill_tokens: int = 256  # prompt tokens between two decoding steps
    max_waiting: int = 128  # waiting sequences; above it requests get 429
    prefix_cache: bool = True  # reuse the blocks of earlier texts

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_cache_nbytes", "prefill_tokens", "max_waiting"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"{name} must be above zero, got {getattr(self, name)}")


def serve_generation(
    model: str, settings: Settings, generation: GenerationSettings, *, host: str, port: int,
    **choices: Any,
) -> None:  # fmt: skip
    """Serve one model until SIGINT or SIGTERM.

    choices: arguments of `load_generator`. Raises ModelFilesError, SettingsError, ModelFailed.
    """
    listener = open_port(host, port)  # before the model is loaded, which takes much longer
    generator = load_generator(model, max_cache_nbytes=generation.max_cache_nbytes, **choices)
    limits = GenerationLimits(
        max_sequences=generation.max_sequences,
        prefill_tokens=generation.prefill_tokens,
        max_waiting=generation.max_waiting,
        prefix_cache=generation.prefix_cache,
    )
    service = GenerationService(generator, settings, limits, generation.max_cache_nbytes)
    listen(service, create_generation_app(service), host=host, port=port, listener=listener)
