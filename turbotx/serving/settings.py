"""Settings: all that an operator may set, as one frozen record.

In: keyword arguments, each with a default that suits a small CPU server. Out: a ``Settings``, its
limits checked, for example::

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
    """Limits and switches of one server. Times in ms, sizes in tokens, requests or bytes."""

    policy: str = "aged"
    padding: Padding = "auto"  # packed where the model allows: batches without padding
    max_batch: int = 32
    max_batch_tokens: int | None = 16_384  # padded, where batches are
    max_queue: int = 4_096  # sequences waiting
    max_age_ms: float = 5_000.0  # longest wait of a request; a third of it in work is admitted
    lazy_ms: float = 0.0  # 0: hungry; else wait this long for a batch to fill
    timeout_ms: float = 30_000.0  # of one HTTP request, from its first byte
    receive_timeout_ms: float = 10_000.0  # for a whole header, and between two parts of a body
    max_connections: int = 4_096  # fewer where the process may not open as many files
    max_client_batch: int = 256  # inputs in one HTTP request
    max_body_nbytes: int = 8 << 20
    auto_truncate: bool = False  # cut texts that are too long where a request does not say
    cache_nbytes: int = 64 << 20  # of response vectors; 0: off
    coalesce: bool = True  # compute identical requests in flight once
    tokenizer_threads: int = 2
    api_keys: tuple[str, ...] = ()  # any of them opens the door; none: everybody may ask
    cors_allow_origin: tuple[str, ...] = ()  # pages of these may ask; * for all, none: no header
    url_prefix: str = ""  # what every path begins with, for example /embeddings-of-mine
    cost_folder: Path | None = None  # where cost tables are kept; None: measure at every start
    otel: bool = False  # trace with OpenTelemetry, where it is installed

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise SettingsError(f"no policy {self.policy!r}: one of {', '.join(POLICIES)}")
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
        """Return the padding to load models with: policies that arrange it need it."""
        return self.padding if self.policy in TOKEN_POLICIES else "padded"


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys of a file, one a line; raise SettingsError where it has none.

    Blank lines and what follows a ``#`` at the start of a line are left out.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the API keys in {path}: {error}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise SettingsError(f"{path} holds no API key: write one a line")
    return keys
