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
# Java's client offers HTTP/2 with every first request; httptools then takes the body for HTTP/2,
# and that of any other offer, none of which is taken here.
OFFER = re.compile(rb"(?i)\r\nupgrade:[^\r\n]*(?=\r\n)")
TOO_LARGE_HEAD = (b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n"
                  b"connection: close\r\n\r\n")  # fmt: skip
SPARE_FILES = 64  # descriptors for everything but connections
FRAMING = 8  # bytes on the wire for each that a body may have: chunks of one byte take 6


@dataclass
class ConnectionLimits:
    """Of one server.

    ``receive_s``: for a whole header, and between two parts of a body. ``nbytes``: the most that a
    body may have, and an eighth of what all answers may have that are not read yet.
    """

    receive_s: float
    most: int
    nbytes: int = 8 << 20
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
        self.close(oldest)

    def hear(self, connection: Any) -> None:
        """Record activity of a connection, which makes it the most recently active."""
        if self.open.pop(connection, connection) is None:
            self.open[connection] = None

    def close_late(self, now_s: float) -> None:
        """Close those whose header or next part of a body is overdue, or who do not read; and who
        has most unread, where that is too much of all together."""
        waiting: list[tuple[int, int, Any]] = []
        for k, connection in enumerate(list(self.open)):
            unread = connection.transport.get_write_buffer_size()
            waiting += [(unread, k, connection)] * (unread > 0)
            if unread == 0 or unread < connection.unread or not connection.unread:
                connection.unread, connection.read_s = unread, now_s
            elif now_s - connection.read_s > self.receive_s:
                self.close(connection)
                continue
            since_s = connection.heard_s if connection.in_body else connection.head_since_s
            if since_s is not None and now_s - since_s > self.receive_s:
                self.close(connection)
        left = sum(unread for unread, _, _ in waiting)
        for unread, _, connection in sorted(waiting, reverse=True):
            if left <= 8 * self.nbytes:
                break
            left -= unread
            self.close(connection)

    def refuse_head(self, connection: Any) -> None:
        """Say that a header is too large, and close."""
        self.closed += 1
        self.open.pop(connection, None)
        connection.transport.write(TOO_LARGE_HEAD)
        connection.transport.close()

    def close(self, connection: Any) -> None:
        """Close a connection at once, whatever it is still sent."""
        self.closed += 1
        self.open.pop(connection, None)
        connection.leave()
        connection.transport.abort()


_BASE: Any = AutoHTTPProtocol


class LimitedProtocol(_BASE):
    """uvicorn's HTTP protocol that keeps limits; see `make_protocol`."""

    limits: ConnectionLimits
    heard_s = 0.0
    unread, read_s = 0, 0.0  # bytes of answers when it was last seen to take some, and when
    head_since_s: float | None = None  # while a header is awaited or half there
    head_nbytes = 0  # of the one that is half there, or that comes while another is answered
    body_nbytes = 0  # of a body, as it came over the wire
    heads_over = False  # what is said of headers now is what stands behind a body
    running: Any = None  # what is answered; ``cycle`` is the last that was asked

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def in_body(self) -> bool:
        """Whether a body is being received."""
        return self.busy and self.cycle.more_body

    def connection_made(self, transport: Any) -> None:
        """Count the connection, as asyncio opens it."""
        super().connection_made(transport)
        self.heard_s = self.head_since_s = asyncio.get_running_loop().time()
        self.limits.admit(self)

    def data_received(self, data: bytes) -> None:
        """Parse bytes, within the limits of headers and bodies."""
        self.heard_s = asyncio.get_running_loop().time()
        self.limits.hear(self)
        if self.head_since_s is None and not self.busy:
            self.head_since_s = self.heard_s
        answering = self.busy and not self.in_body
        self.body_nbytes = self.body_nbytes + len(data) if self.in_body else 0
        if self.body_nbytes > FRAMING * self.limits.nbytes + MOST_HEAD_NBYTES:
            self.limits.close(self)
            return
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
            self.limits.refuse_head(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the connection, as asyncio closes it."""
        self.limits.open.pop(self, None)
        self.leave()
        super().connection_lost(error)

    def leave(self) -> None:
        """Have what is answered written to nobody: uvicorn tells the last request alone."""
        for cycle in (self.running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    # httptools' alone. It gives the trailers of a body as headers, of which there is no end.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self.heads_over = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that further headers are trailers."""
        self.heads_over = True
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers are left out."""
        if not self.heads_over:
            super().on_header(name, value)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)


def make_protocol(limits: ConnectionLimits) -> type[Any]:
    """Return uvicorn's HTTP protocol, whichever parser is installed, that keeps the limits.

    Reads of uvicorn's what both of its protocols have: ``cycle`` with ``response_complete`` and
    ``more_body``, and ``transport``.
    """
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})


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
