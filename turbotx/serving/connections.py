"""Connection limits: closes connections that stall while sending or reading, then the most idle.

In: limits of time and bytes. Out: a protocol class for ``uvicorn.Config``, and a method that closes
overdue connections, called once a second::

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
MOST_HEAD_NBYTES = 65_536  # of one header, and of pipelined data that waits
# Upgrade headers are removed: none is supported, and httptools would parse the body after Java's
# "Upgrade: h2c" (sent with its first request) as HTTP/2.
OFFER = re.compile(rb"(?i)\r\nupgrade:[^\r\n]*(?=\r\n)")
TOO_LARGE_HEAD = (b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n"
                  b"connection: close\r\n\r\n")  # fmt: skip
SPARE_FILES = 64  # file descriptors reserved for everything but connections
FRAMING = 8  # most wire bytes per byte of body: one-byte chunks take 6


@dataclass
class ConnectionLimits:
    """Connection limits of one server.

    ``receive_s``: seconds for a whole header, and between two parts of a body. ``nbytes``: the most
    bytes of a body; all unread answers together may have 8 times as many.
    """

    receive_s: float
    most: int
    nbytes: int = 8 << 20
    open: dict[Any, None] = field(default_factory=dict)  # ordered by last activity, oldest first
    closed: int = 0  # number closed by these limits

    def admit(self, connection: Any) -> None:
        """Register a new connection; above the limit, close the one idle for longest."""
        self.open[connection] = None
        if len(self.open) <= self.most:
            return
        oldest = next((c for c in self.open if not c.busy), connection)
        if self.closed % 100 == 0:  # limits the size of the log under attack
            log.warning(
                "%d connections are open, the limit: the longest silent one is closed", self.most
            )
        self.close(oldest)

    def hear(self, connection: Any) -> None:
        """Record activity of a connection: it becomes the most recently active."""
        if self.open.pop(connection, connection) is None:
            self.open[connection] = None

    def close_late(self, now_s: float) -> None:
        """Close connections whose header or next part of a body is overdue or who read no answer;
        and, if all unread answers exceed the limit, the connection with the most unread bytes."""
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
        """Answer 431 to a header that is too large, and close the connection."""
        self.closed += 1
        self.open.pop(connection, None)
        connection.transport.write(TOO_LARGE_HEAD)
        connection.transport.close()

    def close(self, connection: Any) -> None:
        """Close a connection at once; what is not sent yet is discarded."""
        self.closed += 1
        self.open.pop(connection, None)
        connection.leave()
        connection.transport.abort()


_BASE: Any = AutoHTTPProtocol


class LimitedProtocol(_BASE):
    """uvicorn's HTTP protocol that keeps limits; see `make_protocol`."""

    limits: ConnectionLimits
    heard_s = 0.0
    unread, read_s = 0, 0.0  # unread answer bytes at the last progress, and its time
    head_since_s: float | None = None  # when the wait for a header began; None: no wait
    head_nbytes = 0  # bytes of the incomplete header, or received while a request is answered
    body_nbytes = 0  # bytes of the body on the wire, chunk framing included
    heads_over = False  # header callbacks from now on are trailers of a body
    running: Any = None  # the request being answered; ``cycle`` is the last one received

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def in_body(self) -> bool:
        """Whether a body is being received."""
        return self.busy and self.cycle.more_body

    def connection_made(self, transport: Any) -> None:
        """Register the connection when asyncio opens it."""
        super().connection_made(transport)
        self.heard_s = self.head_since_s = asyncio.get_running_loop().time()
        self.limits.admit(self)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; close the connection if a header or body exceeds its limit."""
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
        """Unregister the connection when asyncio closes it."""
        self.limits.open.pop(self, None)
        self.leave()
        super().connection_lost(error)

    def leave(self) -> None:
        """Mark the request being answered as disconnected; uvicorn marks only the last one
        received."""
        for cycle in (self.running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    # Callbacks of httptools only. It reports trailers of a body as headers, in unlimited number.

    def on_message_begin(self) -> None:
        """Reset the state for a new request."""
        self.heads_over = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Record that further headers are trailers."""
        self.heads_over = True
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Pass a header on; trailers are dropped."""
        if not self.heads_over:
            super().on_header(name, value)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)


def make_protocol(limits: ConnectionLimits) -> type[Any]:
    """Return a subclass of uvicorn's HTTP protocol, for whichever parser is installed, that
    enforces the limits.

    Reads attributes that both of uvicorn's protocols have: ``cycle`` with ``response_complete`` and
    ``more_body``, and ``transport``.
    """
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})


def connection_limit(wanted: int) -> int:
    """Return the number of connections to allow: `wanted`, or fewer if the process cannot open that
    many files. Raises the soft limit of open files to the hard one first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + SPARE_FILES and soft != resource.RLIM_INFINITY:
        unlimited = hard == resource.RLIM_INFINITY
        soft = wanted + SPARE_FILES if unlimited else min(wanted + SPARE_FILES, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(min(wanted, soft - SPARE_FILES), 1)
