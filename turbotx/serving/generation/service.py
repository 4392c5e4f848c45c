"""Generation service: a model with its worker; requests are streams of pieces.

In: token ids and a request's options. Out: pieces of every text as they are generated. If the
client disconnects, its cache blocks are released at once::

    async for index, piece in service.generate([ids], asked, priority=0): ...
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from turbotx.serving.generation.batch import DecodeBatch
from turbotx.serving.generation.metrics import GenerationMetrics
from turbotx.serving.generation.model import Generator
from turbotx.serving.generation.scheduler import GenerationLimits, GenerationScheduler
from turbotx.serving.generation.sequence import Asked, GeneratedSequence, Piece
from turbotx.serving.generation.slots import BLOCK
from turbotx.serving.generation.worker import DecodeWorker, Told
from turbotx.serving.interruption import Interruption
from turbotx.serving.refusals import TimedOut
from turbotx.serving.served import Served
from turbotx.serving.settings import Settings

log = logging.getLogger(__name__)
Arrived = tuple[int, Piece | Exception]  # the prompt's index, and what came of it


class GenerationService(Served):
    """One model and its worker. All methods run on one event loop."""

    metrics: GenerationMetrics

    def __init__(
        self, generator: Generator, settings: Settings, limits: GenerationLimits,
        max_cache_nbytes: int,
    ) -> None:  # fmt: skip
        """limits: max_blocks is replaced by the number that fits max_cache_nbytes."""
        super().__init__(settings, [generator.name], GenerationMetrics())
        self.generator = generator
        self._limits, self._nbytes = limits, max_cache_nbytes
        self._worker: DecodeWorker | None = None
        self.scheduler = GenerationScheduler(limits)

    @property
    def worker(self) -> DecodeWorker:
        """The worker. Raises NotReady while the service does not accept requests."""
        return self.when_ready(self._worker)

    async def start(self) -> None:
        """Run the model once, then accept requests. Raises ModelFailed."""
        generator, piece = self.generator, self._limits.prefill_tokens
        batch = DecodeBatch.of(generator.model, generator.module, generator.device, piece)
        token = min(generator.vocabulary, 100) - 1
        reuse = self._limits.prefix_cache
        await self.prepare(lambda: batch.prepare(token, generator.context, reuse))
        blocks = batch.most_blocks = batch.count_room(self._nbytes)
        limits = replace(
            self._limits, max_blocks=blocks, context=generator.context,
            prefix_cache=batch.no_prefixes is None,
        )  # fmt: skip
        self.scheduler = GenerationScheduler(limits)
        loop = asyncio.get_running_loop()

        def post(told: Told) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has been closed
                loop.call_soon_threadsafe(_tell_all, told)

        self._worker = DecodeWorker(batch, self.scheduler, self.metrics, post)
        self._worker.start()
        self.state = "ready"
        log.info(
            "ready: %s by turbotx in %s on %s, room for %d blocks of %d positions, %s%s",
            generator.name, generator.dtype, generator.device, blocks, BLOCK,
            f"no prefix cache: {batch.no_prefixes}" if batch.no_prefixes else "prefix cache",
            f", {self.url}" if self.url else "",
        )  # fmt: skip

    async def drain(self) -> None:
        """Finish all running and waiting texts."""
        if self._worker is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._worker.drain)

    async def generate(
        self, prompts: Sequence[Sequence[int]], asked: Sequence[Asked], priority: int = 0
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield the pieces of every prompt's text as they come, with the prompt's index.

        Closing the iterator cancels the remaining texts. Raises TooLarge, Busy, NotReady, TimedOut
        if the first token is late, BackendFailed.
        """
        for prompt, wanted in zip(prompts, asked, strict=True):
            self.scheduler.check(len(prompt), len(prompt) + wanted.max_tokens)
        arrived = asyncio.Queue[Arrived]()

        def teller(index: int) -> Callable[[Piece | Exception], None]:
            return lambda piece: arrived.put_nowait((index, piece))

        backend = self.generator.tokenizer.backend_tokenizer
        sequences = [
            GeneratedSequence(prompt, wanted, backend, teller(i), priority)
            for i, (prompt, wanted) in enumerate(zip(prompts, asked, strict=True))
        ]
        worker = self.worker
        worker.submit(sequences)
        begin, before = time.perf_counter(), [math.nan] * len(sequences)
        left = len(sequences)
        try:
            while left:
                first = all(map(math.isnan, before))
                index, piece = await (self._first(arrived) if first else arrived.get())
                if isinstance(piece, Exception):
                    raise piece
                now = time.perf_counter()
                if math.isnan(before[index]):
                    self.metrics.first_token.observe(now - begin)
                else:
                    self.metrics.token.observe(now - before[index])
                before[index] = now
                left -= piece.finish is not None
                yield index, piece
        finally:
            if left:
                self.metrics.cancelled.inc()
                worker.cancel(sequences)

    async def _first(self, arrived: asyncio.Queue[Arrived]) -> Arrived:
        """Return a request's first piece. Raises TimedOut."""
        late = f"no token within {self.settings.timeout_ms:.0f} ms"
        limit_s = self.settings.timeout_ms / 1e3
        with Interruption() as waiting:
            waiting.end_after(limit_s, TimedOut(late, retry_after_s=limit_s))
            return await arrived.get()

    def figures(self) -> dict[str, float]:
        """Return gauges of sequences, the cache, and the module's statistics."""
        found = {"ready": float(self.state == "ready")}
        if self._worker is not None:
            found.update(self._worker.figures())
        stats = getattr(self.generator.module, "stats", None)
        if callable(stats):
            found.update({f"engine_{name}": float(value) for name, value in stats().items()})
        return found


def _tell_all(told: Told) -> None:
    for sequence, piece in told:
        sequence.tell(piece)
