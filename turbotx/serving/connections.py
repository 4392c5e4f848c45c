"""Connection limits: closes connections that stall in sending or reading, and the most idle ones.

In: the parser that uvicorn would take, two limits. Out: a protocol class for ``uvicorn.Config`` and
what closes late ones, asked once a second::

    Config(app, http=make_protocol(limits)); limits.close_late(now_s)
"""

from __future__ import annotations

import asyncio
import logging
import re
import resource
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

log = logging.getLogger(__name__)
MOST_HEAD_NBYTES = 65_536  # of one header, and of what comes before its turn
# Java's client offers HTTP/2 with every first request; httptools then takes the body for HTTP/2.
OFFER = re.compile(rb"(?i)\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)")
TOO_LARGE_HEAD = (b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n"
                  b"connection: close\r\n\r\n")  # fmt: skip
SPARE_FILES = 64  # descriptors for everything but connections


@dataclass
class ConnectionLimits:
    """Of one server. ``receive_s``: for a whole header, and between two parts of a body."""

    receive_s: float
    most: int
    open: dict[Any, None] = field(default_factory=dict)  # who was silent longest comes first
    closed: int = 0  # by either limit

    def admit(self, connection: Any) -> None:
        """Count a new connection; beyond the limit the one that is silent longest goes."""
        self.open[connection] = None
        if len(self.open) <= self.most:
            return
        oldest = next((c for c in self.open if not c.busy), connection)
        if self.closed % 100 == 0:  # an attack must not fill the log too
            log.warning(
                "%d connections are open, the limit: the longest silent one is closed", self.most
            )
        self._close(oldest)

    def hear(self, connection: Any) -> None:
        """Record activity of a connection, which makes it the most recently active."""
        if self.open.pop(connection, connection) is None:
            self.open[connection] = None

    def close_late(self, now_s: float) -> None:
        """Close those whose header or next part of a body is overdue, or who do not read."""
        for connection in list(self.open):
            unread = connection.transport.get_write_buffer_size()
            if unread == 0 or unread < connection.unread or not connection.unread:
                connection.unread, connection.read_s = unread, now_s
            elif now_s - connection.read_s > self.receive_s:
                self._close(connection)
                continue
            since_s = connection.heard_s if connection.in_body else connection.head_since_s
            if since_s is not None and now_s - since_s > self.receive_s:
                self._close(connection)

    def refuse_head(self, connection: Any) -> None:
        """Say that a header is too large, and close."""
        self.closed += 1
        self.open.pop(connection, None)
        connection.transport.write(TOO_LARGE_HEAD)
        connection.transport.close()

    def _close(self, connection: Any) -> None:
        self.closed += 1
        self.open.pop(connection, None)
        connection.transport.abort()


def make_protocol(limits: ConnectionLimits) -> type[Any]:
    """Return uvicorn's HTTP protocol, whichever parser is installed, that keeps the times.

    Reads of uvicorn's what both of its protocols have: ``cycle`` with ``response_complete`` and
    ``more_body``, and ``transport``.
    """
    base: Any = AutoHTTPProtocol

    class LimitedProtocol(base):
        heard_s = 0.0
        unread, read_s = 0, 0.0  # bytes of answers when it was last seen to take some, and when
        head_since_s: float | None = None  # while a header is awaited or half there
        head_nbytes = 0  # of the one that is half there, or that comes while another is answered

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
            limits.hear(self)
            if self.head_since_s is None and not self.busy:
                self.head_since_s = self.heard_s
            answering = self.busy and not self.in_body
            if self.head_since_s is not None:
                head, end, rest = data.partition(b"\r\n\r\n")
                data = OFFER.sub(b"", head + end[:2]) + end[2:] + rest
            super().data_received(data)
            if self.busy:
                self.head_since_s = None
            if self.head_since_s is None and not answering:
                self.head_nbytes = 0
                return
            self.head_nbytes += len(data)
            if self.head_nbytes > MOST_HEAD_NBYTES:
                limits.refuse_head(self)

        def connection_lost(self, error: Exception | None) -> None:
            limits.open.pop(self, None)
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
