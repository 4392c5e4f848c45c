"""Settings: the server's options as one frozen record.

In: keyword arguments, with defaults for a small CPU server. Out: a validated ``Settings``::

    Settings(max_batch=32, policy="aged", api_keys=("secret",))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from turbotx.errors import TurbotxError
from turbotx.serving.engine import Padding
from turbotx.serving.policies import POLICIES
from turbotx.serving.token_policies import TOKEN_POLICIES


class SettingsError(TurbotxError, ValueError):
    """A setting is out of its range."""


@dataclass(frozen=True)
class Settings:
    """Options of one server. Times in ms, sizes in tokens, requests or bytes."""

    policy: str = "aged"
    padding: Padding = "auto"  # "auto": batches without padding if the model allows it
    max_batch: int = 32
    max_batch_tokens: int | None = 16_384  # including padding, if batches are padded
    max_queue: int = 4_096  # waiting sequences
    max_age_ms: float = 5_000.0  # bound of a request's wait; a third of it in work is admitted
    lazy_ms: float = 0.0  # how long to wait for a batch to fill; 0: do not wait
    timeout_ms: float = 30_000.0  # of one HTTP request, from its first byte on
    receive_timeout_ms: float = 10_000.0  # for a whole header, and between two parts of a body
    max_connections: int = 4_096  # fewer if the process may not open as many files
    max_client_batch: int = 256  # inputs in one HTTP request
    max_body_nbytes: int = 8 << 20
    auto_truncate: bool = False  # truncate long texts unless a request says otherwise
    cache_nbytes: int = 64 << 20  # of the response cache; 0: off
    coalesce: bool = True  # compute identical requests in flight once
    tokenizer_threads: int = 2
    api_keys: tuple[str, ...] = ()  # accepted keys; empty: no authentication
    cors_allow_origin: tuple[str, ...] = ()  # allowed origins, * for all; empty: no header
    url_prefix: str = ""  # prefix of every path, such as /embeddings
    cost_folder: Path | None = None  # saves cost tables; None: measure at every start
    otel: bool = False  # trace with OpenTelemetry; an error if not installed

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise SettingsError(f"no policy {self.policy!r}: use one of {', '.join(POLICIES)}")
        if self.padding == "packed" and self.policy not in TOKEN_POLICIES:
            raise SettingsError(
                f"the policy {self.policy!r} arranges padding, and padding 'packed' has none: take "
                f"one of {', '.join(TOKEN_POLICIES)}, or padding 'padded'"
            )
        for name in ("max_batch", "max_queue", "max_client_batch", "max_body_nbytes",
                     "tokenizer_threads", "max_age_ms", "timeout_ms", "receive_timeout_ms",
                     "max_connections"):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be above zero, got {getattr(self, name)}")
        if self.cache_nbytes < 0 or not 0 <= self.lazy_ms < math.inf:
            raise SettingsError("cache_nbytes and lazy_ms must not be negative")
        if self.max_batch_tokens is not None and self.max_batch_tokens <= 0:
            raise SettingsError(f"max_batch_tokens must be above zero, got {self.max_batch_tokens}")
        if self.url_prefix and not (self.url_prefix[0] == "/" != self.url_prefix[-1]):
            raise SettingsError(f"url_prefix begins with / and ends without, got {self.url_prefix}")
        if not all(key.strip() == key and key for key in self.api_keys):
            raise SettingsError("an API key is empty or has blanks round it: leave it out, trim it")

    @property
    def wanted_padding(self) -> Padding:
        """The padding to load models with: "padded" for policies that need padded batches."""
        return self.padding if self.policy in TOKEN_POLICIES else "padded"


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys of a file, one per line; raise SettingsError if there is none.

    Blank lines and lines that start with ``#`` are ignored.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the API keys in {path}: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise SettingsError(f"{path} has no API key: write one per line")
    return keys
