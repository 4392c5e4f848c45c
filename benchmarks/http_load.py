"""An open-loop HTTP client: sends at the trace's times, whatever comes back.

In: host and port of a server, requests with their arrival times, their bodies. Out: the status and
latency of each, counted from when it was due, so that a slow server is not spared::

    load = asyncio.run(send_trace("127.0.0.1", 8080, trace, bodies)); load.summary()["p99_ms"]
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from turbotx.serving import Request


@dataclass
class Load:
    """Per request, in the trace's order: status (0: no answer) and ms since it was due."""

    statuses: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        statuses, latency = np.array(self.statuses), np.array(self.latency_ms)
        done, refused = latency[statuses == 200], latency[statuses == 429]
        found: dict[str, Any] = {
            "sent": len(statuses),
            "answered": len(done),
            "refused": len(refused),
            "other": int(((statuses != 200) & (statuses != 429)).sum()),
            "seconds": self.seconds,
            "per_s": len(done) / self.seconds,
        }
        for name, values in (("", done), ("refused_", refused)):
            for q in (50, 99) if len(values) else ():
                found[f"{name}p{q}_ms"] = float(np.percentile(values, q))
        if len(done):
            found["mean_ms"] = float(done.mean())
        return found


class Client:
    """HTTP/1.1 over kept connections, no more than a load test needs."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, path: str, body: bytes | None, headers: str = "") -> int:
        """The status of a POST, or of a GET where there is no body."""
        if body is None:
            head, body = f"GET {path} HTTP/1.1\r\nhost: {self.host}\r\n\r\n", b""
        else:
            head = f"POST {path} HTTP/1.1\r\nhost: {self.host}\r\n{headers}"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        while self._free:  # the server may have closed a kept connection: then try the next
            reader, writer = self._free.pop()
            try:
                return await self._exchange(reader, writer, head.encode() + body)
            except (OSError, asyncio.IncompleteReadError) as error:
                writer.close()
                if getattr(error, "partial", b""):
                    raise
        return await self._exchange(*await self._open(), head.encode() + body)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes
    ) -> int:
        writer.write(message)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer, re.I)
        await reader.readexactly(int(length[1]) if length else 0)
        if b"connection: close" in answer.lower():
            writer.close()
        else:
            self._free.append((reader, writer))
        return int(answer[9:12])

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    def close(self) -> None:
        for _, writer in self._free:
            writer.close()


async def send_trace(host: str, port: int, trace: list[Request], bodies: list[bytes]) -> Load:
    client, load = Client(host, port), Load()
    load.statuses, load.latency_ms = [0] * len(trace), [float("nan")] * len(trace)
    begin = time.perf_counter() + 0.1

    async def send(i: int) -> None:
        due = begin + trace[i].arrival_ms / 1e3
        try:
            load.statuses[i] = await client.send("/embed", bodies[i])
        except (OSError, asyncio.IncompleteReadError):
            load.statuses[i] = 0
        load.latency_ms[i] = (time.perf_counter() - due) * 1e3

    tasks = []
    for i, request in enumerate(trace):
        wait_s = begin + request.arrival_ms / 1e3 - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(send(i)))
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - begin
    client.close()
    return load
