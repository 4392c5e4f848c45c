"""Reads request bodies within limits of bytes, JSON elements, time and total memory.

In: Starlette's request and the settings. Out: the body's bytes, decompressed. A body that would
decode to too many objects is refused while it arrives; if all bodies together take too much memory,
the largest one that is still arriving is refused::

    with memory.hold() as held:
        text = await read_body(request, settings, memory, held, shape)
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from turbotx.serving.interruption import Interruption
from turbotx.serving.refusals import BadInput, Busy, NotReady, TimedOut, TooLarge, Unsupported
from turbotx.serving.settings import Settings

INFLATERS = {"gzip": 31, "x-gzip": 31, "deflate": 47}  # zlib's wbits; 47 finds the header itself
SMALL_NBYTES = 65_536  # any JSON of this size decodes within a millisecond
PIECE_NBYTES = 262_144  # decompressed at a time, in less than a millisecond


@dataclass(eq=False)
class Held:
    """One request's share of the memory for bodies, in bytes."""

    nbytes: int = 0
    reading: Interruption | None = None  # set while the body arrives


@dataclass
class BodyMemory:
    """Limits the bodies of all requests to ``most`` bytes, each from its first byte to its
    answer."""

    most: int
    nbytes: int = 0
    leaving: bool = False  # bodies that are not complete are refused
    _held: set[Held] = field(default_factory=set)

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Yield an empty share; the bytes charged to it are released when the context ends."""
        held = Held()
        self._held.add(held)
        try:
            yield held
        finally:
            self._held.discard(held)
            self.nbytes -= held.nbytes

    def charge(self, held: Held, nbytes: int) -> None:
        """Add bytes to a share. Over the limit, refuse the largest body that is still arriving:
        raises Busy if it is this one."""
        held.nbytes += nbytes
        self.nbytes += nbytes
        while self.nbytes > self.most:
            arriving = [h for h in self._held if h.reading is not None and h.nbytes]
            if not arriving:
                return
            largest = max(arriving, key=lambda h: h.nbytes)
            said = "the server holds too many request bodies: retry later"
            reading, refusal = largest.reading, Busy(said, retry_after_s=1.0)
            self.nbytes -= largest.nbytes
            largest.nbytes, largest.reading = 0, None
            if largest is held:
                raise refusal
            assert reading is not None
            reading.end(refusal)

    def leave(self) -> None:
        """Refuse bodies that are not complete, from now on."""
        self.leaving = True
        for held in self._held:
            if held.reading is not None:
                held.reading.end(_leaving())


class Shape:
    """Counts the elements of a JSON text while it arrives, without parsing it; strings are
    skipped."""

    def __init__(self, most_items: int, most_numbers: int) -> None:
        """most_items: inputs of one request, most_numbers: token ids of all of them."""
        self._items = most_items
        self._quotes = 2 * (16 * most_items + 64)
        self._nested = 2 * most_items + 16
        self._commas = most_numbers + most_items * 16
        self._quoted, self._tail = False, b""

    def count(self, part: bytes) -> None:
        """Count the elements in the next part of the text; raise TooLarge above the limit."""
        text = self._tail + part
        ending = len(text) - len(text.rstrip(b"\\"))
        text, self._tail = text[: len(text) - ending % 2], b"\\" * (ending % 2)
        bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
        quotes = bare.count(b'"')
        self._quotes -= quotes
        if self._quotes >= 0:
            outside = b"".join(bare.split(b'"')[self._quoted :: 2])
            self._quoted ^= bool(quotes % 2)
            self._nested -= outside.count(b"[") + outside.count(b"{")
            self._commas -= outside.count(b",")
        if min(self._quotes, self._nested, self._commas) < 0:
            raise TooLarge(
                f"the body has more elements than {self._items} inputs may have: "
                "send several requests"
            )


async def read_body(
    request: Request, settings: Settings, memory: BodyMemory, held: Held, shape: Shape
) -> bytes:
    """Return the whole body, decompressed.

    Raises TooLarge as soon as a limit is exceeded, Unsupported for an unknown Content-Encoding,
    BadInput for corrupt compressed data, Busy if the memory for all bodies is used up, TimedOut
    after ``timeout_ms``, NotReady if the server stops before the body is complete.
    """
    with Interruption() as reading:
        late = f"the body did not arrive within {settings.timeout_ms:.0f} ms"
        reading.end_after(settings.timeout_ms / 1e3, TimedOut(late))
        if memory.leaving:
            reading.end_after(0, _leaving())
        held.reading = reading
        try:
            return await _read(request, settings, memory, held, shape)
        finally:
            held.reading = None


async def _read(
    request: Request, settings: Settings, memory: BodyMemory, held: Held, shape: Shape
) -> bytes:
    most = settings.max_body_nbytes
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity", *INFLATERS):
        raise Unsupported(f"the body's encoding is {coding!r}: one of identity, gzip, deflate")
    inflater = zlib.decompressobj(INFLATERS[coding]) if coding in INFLATERS else None
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) >= 20 or int(said) > most):
        raise _too_large(most)
    parts: list[bytes] = []
    nbytes = counted = 0
    async for arrived in request.stream():
        for part in [arrived] if inflater is None else _inflate(inflater, arrived, coding):
            nbytes += len(part)
            if nbytes > most:
                raise _too_large(most)
            memory.charge(held, len(part))
            parts.append(part)
            while nbytes > SMALL_NBYTES and counted < len(parts):
                shape.count(parts[counted])
                counted += 1
            if inflater is not None:  # a small part may decompress to much: let other tasks run
                await asyncio.sleep(0)
    if inflater is not None and not inflater.eof:
        raise BadInput(f"the body is not {coding}: it ends too early")
    return b"".join(parts)


def _inflate(inflater: Any, packed: bytes, coding: str) -> Iterator[bytes]:
    while True:
        try:
            part = inflater.decompress(packed, PIECE_NBYTES)
        except zlib.error as error:
            raise BadInput(f"the body is not {coding}: {error}") from error
        if inflater.unused_data:  # zlib would keep all of it in memory
            raise BadInput(f"the body is not {coding}: more follows its end")
        if part:
            yield part
        packed = inflater.unconsumed_tail
        if not packed and len(part) < PIECE_NBYTES:
            return


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"the body exceeds {most} bytes")


def _leaving() -> NotReady:
    return NotReady("the server is shutting down")
