"""`turbotx serve`: the HTTP server, its options as the server's own.

In: a model directory or `minilm`, where to listen. Out: a server until it is told to stop::

    turbotx serve minilm --port 8080
"""

from __future__ import annotations

from typing import Any

from turbotx.cli.models import ModelError


def serve_model(model: str, **options: Any) -> None:
    """Serve until SIGINT or SIGTERM; raise ModelError where the extra is not installed."""
    try:
        from turbotx.serving.server import serve
    except ImportError as error:
        raise ModelError(f"serve needs {error.name}: pip install 'turbotx[serve]'") from error
    serve(model, **options)
