"""Bodies of requests, read in bounds: of bytes, of parts, of time, of memory for all of them.

In: Starlette's request, the settings. Out: the body's bytes, inflated; what would become too many
objects is refused while it arrives, and when all bodies together grow too large the largest goes::

    with memory.hold() as held:
        text = await read_body(request, settings, left, memory, held)
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from turbotx.serving.refusals import BadInput, Busy, NotReady, TimedOut, TooLarge, Unsupported
from turbotx.serving.settings import Settings

INFLATERS = {"gzip": 31, "x-gzip": 31, "deflate": 47}  # zlib's wbits; 47 finds the header itself
SMALL_NBYTES = 65_536  # decoded within a millisecond, whatever is in it
PIECE_NBYTES = 262_144  # inflated at a time, in less than a millisecond


@dataclass(eq=False)
class Held:
    """What one request holds of the memory for bodies."""

    nbytes: int = 0
    reading: asyncio.Future[bytes] | None = None  # while it arrives


@dataclass
class BodyMemory:
    """At most ``most`` bytes of bodies, from their first byte to their answer."""

    most: int
    nbytes: int = 0
    _held: set[Held] = field(default_factory=set)

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Hold nothing yet; what is charged to it is given back at the end of the block."""
        held = Held()
        self._held.add(held)
        try:
            yield held
        finally:
            self._held.discard(held)
            self.nbytes -= held.nbytes

    def charge(self, held: Held, nbytes: int) -> None:
        """Count more bytes. Where they are too many, the largest body that still arrives goes."""
        held.nbytes += nbytes
        self.nbytes += nbytes
        while self.nbytes > self.most:
            arriving = [h for h in self._held if h.reading is not None and h.nbytes]
            if not arriving:
                return
            largest = max(arriving, key=lambda h: h.nbytes)
            assert largest.reading is not None
            largest.reading.cancel()
            self.nbytes -= largest.nbytes
            largest.nbytes, largest.reading = 0, None


class Shape:
    """Counts the parts of a JSON text as it arrives; what stands between quotes is not counted."""

    def __init__(self, most_items: int, most_numbers: int) -> None:
        """most_items: inputs of one request, most_numbers: token ids of all of them."""
        self._items = most_items
        self._quotes = 2 * (16 * most_items + 64)
        self._nested = 2 * most_items + 16
        self._commas = most_numbers + most_items * 16
        self._quoted, self._tail = False, b""

    def count(self, part: bytes) -> None:
        """Raise TooLarge for what would become too many objects, without making them."""
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
                f"the body has far more parts than {self._items} inputs: send several requests"
            )


async def read_body(
    request: Request, settings: Settings, left: asyncio.Event, memory: BodyMemory, held: Held,
    shape: Shape,
) -> bytes:  # fmt: skip
    """Return the whole body, inflated. Raises TooLarge at once, Unsupported, BadInput, Busy.

    A body that is not there within ``timeout_ms``, or when the server has been told to stop
    (``left``), is not waited for: NotReady, TimedOut.
    """
    reading = asyncio.ensure_future(_read(request, settings, memory, held, shape))
    leaving = asyncio.ensure_future(left.wait())
    held.reading = reading
    try:
        await asyncio.wait(
            {reading, leaving}, timeout=settings.timeout_ms / 1e3, return_when="FIRST_COMPLETED"
        )
        if reading.cancelled():
            raise Busy("the bodies of too many requests are arriving", retry_after_s=1.0)
        if reading.done():
            return reading.result()
        if leaving.done():
            raise NotReady("the server is shutting down")
        raise TimedOut(f"the body was not there within {settings.timeout_ms:.0f} ms")
    finally:
        held.reading = None
        for task in (reading, leaving):
            task.cancel()
        await asyncio.gather(reading, leaving, return_exceptions=True)


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
            if inflater is not None:  # little on the wire may be much here: others take turns
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
        if inflater.unused_data:  # it is kept, however much comes
            raise BadInput(f"the body is not {coding}: more follows its end")
        if part:
            yield part
        packed = inflater.unconsumed_tail
        if not packed and len(part) < PIECE_NBYTES:
            return


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"the body exceeds {most} bytes")
