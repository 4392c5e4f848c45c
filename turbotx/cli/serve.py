"""`turbotx serve`: the HTTP server, with an option for every setting.

In: a model directory or `minilm`, where to listen. Out: a server that runs until it is stopped::

    turbotx serve minilm path/to/reranker --port 8080 --max-age-ms 2000
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from turbotx.errors import ModelError


def _option(panel: str, text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=True, **more)


PANELS = LISTEN, MODEL, BATCH, GENERATE, LIMIT, KEEP, WATCH = (
    "Listening", "Model", "Batching", "Generation", "Limits", "Cache", "Observing"
)  # fmt: skip


Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="Model directories, hf:PATH, or minilm; several share the engine, and requests "
        "name theirs.", show_default="minilm", metavar="[MODEL]...",
    ),
]  # fmt: skip
Host = Annotated[str, _option(LISTEN, "Address to listen on; 0.0.0.0 for all.")]
Port = Annotated[int, _option(LISTEN, "TCP port.")]
ApiKey = Annotated[
    list[str] | None,
    _option(
        LISTEN,
        "A key that clients must give, may be repeated. Arguments show in the list of "
        "processes: prefer the variable or a file.",
        envvar="TURBOTX_API_KEY",
    ),
]
ApiKeyFile = Annotated[
    Path | None, _option(LISTEN, "File of keys, one a line; # begins a comment.")
]
CorsAllowOrigin = Annotated[
    list[str] | None,
    _option(LISTEN, "Pages of this origin may ask, may be repeated; * for all.", metavar="ORIGIN"),
]
UrlPrefix = Annotated[str, _option(LISTEN, "What every path begins with.", metavar="/PREFIX")]
Backend = Annotated[Literal["turbotx", "eager"], _option(MODEL, "turbotx, or PyTorch alone.")]
Device = Annotated[str, _option(MODEL, "cpu, cuda, or cuda:1.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], _option(MODEL, "Dtype of the weights.")
]
Quantize = Annotated[
    Literal["none", "int8", "fp8", "int8-weights", "int4-weights"],
    _option(MODEL, "Products in int8 or fp8, or by int8 or int4 weights alone."),
]
Weights = Annotated[
    Path | None,
    _option(MODEL, "Weights from safetensors, .npz or a state dict instead.", metavar="FILE"),
]
MaxLength = Annotated[int | None, _option(MODEL, "Longest input in tokens; default: the model's.")]
Pooling = Annotated[
    str | None,
    _option(
        MODEL,
        "How tokens become one vector: cls, max, mean, mean_sqrt_len_tokens, weightedmean, "
        "lasttoken, or several joined with +; none: one vector per token; splade; default: the "
        "model's files decide.",
    ),
]
Normalize = Annotated[
    bool | None, _option(MODEL, "Vectors of length 1; default: the model's files decide.")
]
DefaultPrompt = Annotated[
    str | None, _option(MODEL, "Put before every text; default: the model's files decide.")
]
DefaultPromptName = Annotated[
    str | None,
    _option(MODEL, "Name of the model's prompt to put before every text.", metavar="NAME"),
]
ServedModelName = Annotated[
    list[str] | None,
    _option(MODEL, "Name of each model in answers; default: its directory."),
]
Task = Annotated[
    Literal["embed", "generate"],
    _option(
        MODEL,
        "embed: vectors, classes, ranks; generate: OpenAI's completions and chats by a causal "
        "language model.",
    ),
]
Policy = Annotated[
    Literal["aged", "dp", "sort", "fifo", "single"], _option(BATCH, "Which batch runs next.")
]
Padding = Annotated[
    Literal["auto", "packed", "padded"],
    _option(BATCH, "Whether rows are padded to their batch's longest; auto: only if the model "
            "or the policy needs it."),
]  # fmt: skip
MaxBatch = Annotated[int, _option(BATCH, "Sequences in a batch.")]
MaxBatchTokens = Annotated[
    int, _option(BATCH, "Tokens in a batch, including padding; 0: no limit.")
]
LazyMs = Annotated[float, _option(BATCH, "Wait this long for a batch to fill; 0: run when idle.")]
MaxAgeMs = Annotated[
    float, _option(BATCH, "Longest wait of a request; work for a third of it is admitted.")
]
CostFolder = Annotated[
    Path | None, _option(BATCH, "Where measured costs are stored; default: turbotx's cache.")
]
MaxSequences = Annotated[int, _option(GENERATE, "Sequences that decode together.")]
MaxCacheNbytes = Annotated[
    int, _option(GENERATE, "Bytes of keys and values, including room to grow.")
]
PrefillTokens = Annotated[
    int, _option(GENERATE, "Tokens of prompts read between two decoding steps.")
]
MaxWaiting = Annotated[int, _option(GENERATE, "Sequences that may wait; more get 429.")]
PrefixCache = Annotated[
    bool,
    _option(GENERATE, "Reuse keys and values for prompts that begin alike, while there is room."),
]  # fmt: skip
MaxQueue = Annotated[int, _option(LIMIT, "Sequences that may wait.")]
MaxClientBatch = Annotated[int, _option(LIMIT, "Inputs in one request.")]
MaxBodyNbytes = Annotated[int, _option(LIMIT, "Bytes of a request's body.")]
TimeoutMs = Annotated[float, _option(LIMIT, "Longest time to answer one request, then 503.")]
ReceiveTimeoutMs = Annotated[
    float, _option(LIMIT, "Longest time for a header, and between two parts of a body.")
]
MaxConnections = Annotated[
    int, _option(LIMIT, "Connections; beyond it the one silent longest is closed.")
]
TokenizerThreads = Annotated[int, _option(LIMIT, "Threads that tokenise.")]
AutoTruncate = Annotated[
    bool, _option(LIMIT, "Truncate long texts unless a request says otherwise.")
]
CacheNbytes = Annotated[int, _option(KEEP, "Bytes of answers kept; 0: no cache.")]
Coalesce = Annotated[bool, _option(KEEP, "Compute identical inputs in flight once.")]
Otel = Annotated[bool, _option(WATCH, "Trace every request with OpenTelemetry.")]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    _option(WATCH, "Level of the JSON lines on stderr."),
]


def serve_command(
    models: Models = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    cors_allow_origin: CorsAllowOrigin = None,
    url_prefix: UrlPrefix = "",
    backend: Backend = "turbotx",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    quantize: Quantize = "none",
    weights: Weights = None,
    max_length: MaxLength = None,
    pooling: Pooling = None,
    normalize: Normalize = None,
    default_prompt: DefaultPrompt = None,
    default_prompt_name: DefaultPromptName = None,
    served_model_name: ServedModelName = None,
    task: Task = "embed",
    policy: Policy = "aged",
    padding: Padding = "auto",
    max_batch: MaxBatch = 32,
    max_batch_tokens: MaxBatchTokens = 16_384,
    lazy_ms: LazyMs = 0.0,
    max_age_ms: MaxAgeMs = 5_000.0,
    cost_folder: CostFolder = None,
    max_sequences: MaxSequences = 16,
    max_cache_nbytes: MaxCacheNbytes = 2 << 30,
    prefill_tokens: PrefillTokens = 256,
    max_waiting: MaxWaiting = 128,
    prefix_cache: PrefixCache = True,
    max_queue: MaxQueue = 4_096,
    max_client_batch: MaxClientBatch = 256,
    max_body_nbytes: MaxBodyNbytes = 8 << 20,
    timeout_ms: TimeoutMs = 30_000.0,
    receive_timeout_ms: ReceiveTimeoutMs = 10_000.0,
    max_connections: MaxConnections = 4_096,
    tokenizer_threads: TokenizerThreads = 2,
    auto_truncate: AutoTruncate = False,
    cache_nbytes: CacheNbytes = 64 << 20,
    coalesce: Coalesce = True,
    otel: Otel = False,
    log_level: LogLevel = "info",
) -> None:  # fmt: skip
    """Serve embeddings, classes or generated texts over HTTP, variable lengths batched."""
    options = dict(locals())
    names = (
        "max_sequences", "max_cache_nbytes", "prefill_tokens", "max_waiting", "prefix_cache"
    )  # fmt: skip
    options["generation"] = {name: options.pop(name) for name in names}
    keys = tuple(options.pop("api_key") or ())
    key_file = options.pop("api_key_file")
    options["cors_allow_origin"] = tuple(cors_allow_origin or ())
    options["max_batch_tokens"] = max_batch_tokens or None
    options["served_model_name"] = tuple(served_model_name or ())
    named = options.pop("models") or ["minilm"]
    serve_models(named, api_keys=keys, api_key_file=key_file, **options)


def serve_models(
    models: list[str], *, api_keys: tuple[str, ...], api_key_file: Path | None, **options: Any
) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises ModelError if the extra is not installed, a setting is out of range, or the directory is
    not a model.
    """
    wait_briefly(os.environ)
    try:
        from turbotx.serving.model_files import ModelFilesError
        from turbotx.serving.server import serve
        from turbotx.serving.settings import SettingsError, read_keys
    except ImportError as error:
        raise ModelError(f"serve needs {error.name}: pip install 'turbotx[serve]'") from error
    saved = [model for model in models if model.endswith(".ttx")]
    if saved:
        raise ModelError(
            f"{saved[0]} holds no tokenizer: give the model's directory, whose compiled program "
            "the server keeps in turbotx's cache by itself"
        )
    if not os.environ.get("TURBOTX_API_KEY", "set").strip():
        raise ModelError("TURBOTX_API_KEY is empty, which would disable authentication: unset it")
    try:
        if api_key_file is not None:
            api_keys += read_keys(api_key_file)
        serve(models, api_keys=api_keys, **options)
    except (SettingsError, ModelFilesError) as error:
        raise ModelError(str(error)) from error


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Let idle OpenMP threads sleep soon, unless the user has configured how they wait.

    Otherwise they spin for milliseconds, and take the core that the thread they wait for needs as
    soon as anything else runs on the machine, such as the event loop: on two cores with twelve busy
    processes, a text of 10 tokens took 16 ms instead of 540. Must be called before torch is loaded,
    which reads the setting once.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")  # about 40 us
