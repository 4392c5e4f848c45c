"""Connections that say nothing, or only half, are closed; so are the most idle beyond a limit.

In: the parser that uvicorn would take, two limits. Out: a protocol class for ``uvicorn.Config`` and
what closes late ones, asked once a second::

    Config(app, http=make_protocol(limits)); limits.close_late(now_s)
"""

from __future__ import annotations

import asyncio
import logging
import resource
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

log = logging.getLogger(__name__)
SPARE_FILES = 64  # descriptors for everything but connections


@dataclass
class ConnectionLimits:
    """Of one server. ``receive_s``: for a whole header, and between two parts of a body."""

    receive_s: float
    most: int
    open: set[Any] = field(default_factory=set)
    closed: int = 0  # by either limit

    def admit(self, connection: Any) -> None:
        """Count a new connection; beyond the limit the one that is silent longest goes."""
        self.open.add(connection)
        if len(self.open) <= self.most:
            return
        idle = [c for c in self.open if not c.busy]
        oldest = min(idle or [connection], key=lambda c: c.heard_s)
        if self.closed % 100 == 0:  # an attack must not fill the log too
            log.warning(
                "%d connections are open, the limit: the longest silent one is closed", self.most
            )
        self._close(oldest)

    def close_late(self, now_s: float) -> None:
        """Close those whose header or next part of a body is overdue."""
        for connection in list(self.open):
            since_s = connection.heard_s if connection.in_body else connection.head_since_s
            if since_s is not None and now_s - since_s > self.receive_s:
                self._close(connection)

    def _close(self, connection: Any) -> None:
        self.closed += 1
        self.open.discard(connection)
        connection.transport.abort()


def make_protocol(limits: ConnectionLimits) -> type[Any]:
    """Return uvicorn's HTTP protocol, whichever parser is installed, that keeps the times.

    Reads of uvicorn's what both of its protocols have: ``cycle`` with ``response_complete`` and
    ``more_body``, and ``transport``.
    """
    base: Any = AutoHTTPProtocol

    class LimitedProtocol(base):
        heard_s = 0.0
        head_since_s: float | None = None  # while a header is awaited or half there

        @property
        def busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        @property
        def in_body(self) -> bool:
            return self.busy and self.cycle.more_body

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.heard_s = self.head_since_s = asyncio.get_running_loop().time()
            limits.admit(self)

        def data_received(self, data: bytes) -> None:
            self.heard_s = asyncio.get_running_loop().time()
            if self.head_since_s is None and not self.busy:
                self.head_since_s = self.heard_s
            super().data_received(data)
            if self.busy:
                self.head_since_s = None

        def connection_lost(self, error: Exception | None) -> None:
            limits.open.discard(self)
            super().connection_lost(error)

    return LimitedProtocol


def connection_limit(wanted: int) -> int:
    """As many as wanted, or as there are descriptors for, once the process has taken all it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + SPARE_FILES and soft != resource.RLIM_INFINITY:
        unlimited = hard == resource.RLIM_INFINITY
        soft = wanted + SPARE_FILES if unlimited else min(wanted + SPARE_FILES, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(min(wanted, soft - SPARE_FILES), 1)
