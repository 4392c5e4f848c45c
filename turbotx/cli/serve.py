"""`turbotx serve`: the HTTP server, every one of its settings an option.

In: a model directory or `minilm`, where to listen. Out: a server until it is told to stop::

    turbotx serve minilm --port 8080 --policy aged --max-age-ms 2000
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from turbotx.cli.models import ModelError


def _option(panel: str, text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=True, **more)


PANELS = LISTEN, MODEL, BATCH, LIMIT, KEEP, WATCH = (
    "Listening", "Model", "Batching", "Limits", "Cache", "Observing"
)  # fmt: skip


def serve_command(
    model: Annotated[str, typer.Argument(help="A model directory, hf:PATH, or minilm.")] = "minilm",
    host: Annotated[str, _option(LISTEN, "Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, _option(LISTEN, "TCP port.")] = 8080,
    api_key: Annotated[
        list[str] | None,
        _option(
            LISTEN,
            "A key that clients must give, may be repeated. Arguments show in the list of "
            "processes: prefer the variable or a file.",
            envvar="TURBOTX_API_KEY",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, _option(LISTEN, "File of keys, one a line; # begins a comment.")
    ] = None,
    backend: Annotated[
        Literal["turbotx", "eager"], _option(MODEL, "What computes: turbotx, or PyTorch alone.")
    ] = "turbotx",
    device: Annotated[str, _option(MODEL, "PyTorch's name of it: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], _option(MODEL, "Of the weights.")
    ] = "float32",
    weights: Annotated[
        Path | None,
        _option(MODEL, "Weights from safetensors, .npz or a state dict instead.", metavar="FILE"),
    ] = None,
    max_length: Annotated[
        int | None, _option(MODEL, "Longest input in tokens; default: the model's.")
    ] = None,
    pooling: Annotated[
        Literal["mean", "cls", "max", "last"] | None,
        _option(MODEL, "Tokens to one vector; default: as the model's files say."),
    ] = None,
    normalize: Annotated[
        bool | None, _option(MODEL, "Vectors of length 1; default: as the model's files say.")
    ] = None,
    policy: Annotated[
        Literal["aged", "dp", "sort", "fifo", "single"], _option(BATCH, "Which batch runs next.")
    ] = "aged",
    max_batch: Annotated[int, _option(BATCH, "Sequences in a batch.")] = 32,
    max_batch_tokens: Annotated[
        int, _option(BATCH, "Padded tokens in a batch; 0: no limit.")
    ] = 16_384,
    lazy_ms: Annotated[
        float, _option(BATCH, "Wait this long for a batch to fill; 0: run when idle.")
    ] = 0.0,
    max_age_ms: Annotated[
        float, _option(BATCH, "Nobody waits longer; a third of it in work is admitted.")
    ] = 5_000.0,
    cost_folder: Annotated[
        Path | None, _option(BATCH, "Where measured costs are kept; default: turbotx's cache.")
    ] = None,
    max_queue: Annotated[int, _option(LIMIT, "Sequences that may wait.")] = 4_096,
    max_client_batch: Annotated[int, _option(LIMIT, "Inputs in one request.")] = 256,
    max_body_nbytes: Annotated[int, _option(LIMIT, "Bytes of a request's body.")] = 8 << 20,
    timeout_ms: Annotated[
        float, _option(LIMIT, "Longest time to answer one request, then 503.")
    ] = 30_000.0,
    tokenizer_threads: Annotated[int, _option(LIMIT, "Threads that tokenise.")] = 2,
    cache_nbytes: Annotated[
        int, _option(KEEP, "Bytes of answers kept; 0: no cache.")
    ] = 64 << 20,
    coalesce: Annotated[
        bool, _option(KEEP, "Compute identical inputs in flight once.")
    ] = True,
    otel: Annotated[bool, _option(WATCH, "Trace every request with OpenTelemetry.")] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _option(WATCH, "Of the JSON lines on stderr.")
    ] = "info",
) -> None:  # fmt: skip
    """Serve embeddings or classes over HTTP, variable lengths batched."""
    options = dict(locals())
    keys = tuple(options.pop("api_key") or ())
    key_file = options.pop("api_key_file")
    options["max_batch_tokens"] = max_batch_tokens or None
    serve_model(options.pop("model"), api_keys=keys, api_key_file=key_file, **options)


def serve_model(
    model: str, *, api_keys: tuple[str, ...], api_key_file: Path | None, **options: Any
) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises ModelError where the extra is not installed, a setting is out of range or the directory
    is no model.
    """
    try:
        from turbotx.serving.model_files import ModelFilesError
        from turbotx.serving.server import serve
        from turbotx.serving.settings import SettingsError, read_keys
    except ImportError as error:
        raise ModelError(f"serve needs {error.name}: pip install 'turbotx[serve]'") from error
    try:
        if api_key_file is not None:
            api_keys += read_keys(api_key_file)
        serve(model, api_keys=api_keys, **options)
    except (SettingsError, ModelFilesError) as error:
        raise ModelError(str(error)) from error
