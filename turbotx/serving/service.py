"""A loaded model, its tokenizer threads and its dispatcher: everything but HTTP.

In: texts or token ids. Out: vectors, and the state that ``/ready`` tells::

    service = Service(load_model("minilm"), Settings())
    await service.start()                 # measures costs, then state == "ready"
    rows = await service.encode(["hello"]); vectors = await service.compute(rows, scope)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from turbotx.errors import TurbotxError
from turbotx.serving.cache import ResponseCache
from turbotx.serving.cost import CostTable
from turbotx.serving.dispatcher import Dispatcher
from turbotx.serving.engine import SleepEngine, TorchEngine
from turbotx.serving.measure import cost_file, describe_device, load_or_measure, warm_up
from turbotx.serving.metrics import Metrics
from turbotx.serving.model_files import LoadedModel
from turbotx.serving.policies import POLICIES, Aged
from turbotx.serving.refusals import NotReady, TooLarge
from turbotx.serving.scheduler import Hungry, Lazy, Scheduler
from turbotx.serving.schemas import Token
from turbotx.serving.settings import Settings
from turbotx.serving.tokenizer_pool import TokenizerPool
from turbotx.serving.tokens import CHARACTERS_PER_TOKEN, TokenRow

State = Literal["loading", "ready", "draining", "failed"]
log = logging.getLogger(__name__)
MOST_TOKENS = 32_768  # described in one answer: about 2 MB of JSON


class ModelFailed(TurbotxError):
    """The model was loaded, and cannot compute."""


@dataclass
class Facts:
    """What one HTTP request was found to be while it was answered; times in s."""

    characters: int = 0
    tokens: int = 0
    tokenizing_s: float = 0.0
    queueing_s: float = 0.0  # the longest of its rows
    inference_s: float = 0.0

    def headers(self, took_s: float, device: str) -> dict[str, str]:
        """text-embeddings-inference's headers; times in ms."""
        seconds = {"total-time": took_s, "compute-time": took_s, "queue-time": self.queueing_s,
                   "tokenization-time": self.tokenizing_s, "inference-time": self.inference_s}  # fmt: skip  # noqa: E501
        found = {f"x-{name}": str(round(value * 1e3)) for name, value in seconds.items()}
        kind = "gpu+optimized" if device.startswith("cuda") else "cpu"
        return {"x-compute-type": kind, "x-compute-characters": str(self.characters),
                "x-compute-tokens": str(self.tokens), **found}  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """Of one HTTP request: when it is due and how urgent it is."""

    deadline_ms: float = math.inf
    priority: int = 0
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True)
class Reading:
    """How one request's texts are cut."""

    truncate: bool | None = None  # cut what is too long, or refuse it; None: as the settings say
    keep_end: bool = False  # cut at the beginning


class Service:
    """One model behind one queue. ``start`` and everything after it belong to one event loop."""

    def __init__(
        self, model: LoadedModel, settings: Settings, costs: CostTable | None = None
    ) -> None:
        self.model, self.settings = model, settings
        self.metrics = Metrics()
        self.state: State = "loading"
        self.url = ""  # where it listens, for the line that says that it is ready
        self.failure: ModelFailed | None = None
        self.preparing = False  # a thread runs the model for the first time
        self.left = asyncio.Event()  # the same: bodies that are half there are not waited for
        self.leaving = False  # told to stop: ready for nothing new, though still answering
        self._costs = costs
        self._dispatcher: Dispatcher | None = None
        self._tokenizers = TokenizerPool(settings.tokenizer_threads, settings.max_body_nbytes)
        self.metrics.watch(self.figures)

    @property
    def dispatcher(self) -> Dispatcher:
        """Raises NotReady while there is none that accepts."""
        if self._dispatcher is None or self.state != "ready":
            raise NotReady(f"the server is {self.state}", retry_after_s=1.0)
        return self._dispatcher

    async def start(self) -> None:
        """Measure the costs (once per model and device where they are kept), accept requests.

        Raises ModelFailed.
        """
        try:
            costs = await self._in_thread(self._prepare)
        except Exception as error:  # whatever the model raises
            said = str(error).strip().splitlines() or [""]
            self.state = "failed"
            self.failure = ModelFailed(
                f"{self.model.info.name} cannot run: {type(error).__name__}: {said[0]}"
            )
            log.error(str(self.failure), exc_info=log.isEnabledFor(logging.DEBUG))
            raise self.failure from error
        cache = ResponseCache(self.settings.cache_nbytes)
        self._dispatcher = Dispatcher(
            self.model.engine,
            self._scheduler(costs),
            cache,
            self.metrics,
            revision=self.model.info.revision,
            coalesce=self.settings.coalesce,
        )
        self._dispatcher.start()
        self.state = "ready"
        info, policy = self.model.info, self.settings.policy
        what = f"{info.name} by {info.backend} in {info.dtype} on {info.device}, policy {policy}"
        log.info("ready: %s%s", what, f", {self.url}" if self.url else "")

    async def _in_thread(self, work: Callable[[], CostTable]) -> CostTable:
        """Run it in a thread that does not keep the process: a capture takes a while."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[CostTable] = loop.create_future()

        def finish(found: CostTable | None, error: BaseException | None) -> None:
            self.preparing = False
            if done.done():
                return
            if error is None:
                done.set_result(found)  # type: ignore[arg-type]
            else:
                done.set_exception(error)

        def run() -> None:
            found, error = None, None
            try:
                found = work()
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop was left meanwhile
                loop.call_soon_threadsafe(finish, found, error)

        self.preparing = True
        threading.Thread(target=run, name="turbotx-start", daemon=True).start()
        return await done

    async def stop(self) -> None:
        """Answer all that was accepted, keep what was learnt about costs, end the threads.

        Who is told to stop while the model is being prepared does not wait for it.
        """
        self.state = "draining"
        if self._dispatcher is not None:
            await self._dispatcher.drain()
            path = self._cost_path()
            if path is not None:
                with contextlib.suppress(OSError):  # a read-only folder costs a measurement
                    self._dispatcher.scheduler.costs.save(path, model=self.model.info.name)
        self._tokenizers.shutdown()

    async def encode(
        self,
        texts: Sequence[str | tuple[str, str]],
        scope: Scope | None = None,
        reading: Reading | None = None,
    ) -> list[TokenRow]:
        """Tokenise in the pool, one task for all of a request's texts. Raises Busy."""
        scope, reading = scope or Scope(), reading or Reading()
        said = reading.truncate
        truncate = self.settings.auto_truncate if said is None else said
        characters = sum(len(t) if isinstance(t, str) else sum(map(len, t)) for t in texts)

        def work() -> list[TokenRow]:
            encode = self.model.tokenizer.encode
            return [encode(text, truncate=truncate, keep_end=reading.keep_end) for text in texts]

        begin = time.perf_counter()
        rows = await self._tokenizers.run(characters, work)
        facts = scope.facts
        facts.tokenizing_s = time.perf_counter() - begin
        facts.characters += characters
        self.metrics.tokenizing.observe(facts.tokenizing_s)
        return rows

    async def describe(self, texts: Sequence[str], special: bool) -> list[list[Token]]:
        """Each text's tokens, for ``/tokenize``. Raises TooLarge where they would be too many."""
        most = max(MOST_TOKENS, self.model.info.max_length)

        def work() -> list[list[Token]]:
            found: list[list[Token]] = []
            left = most
            try:
                for text in texts:
                    describe = self.model.tokenizer.describe
                    found.append(describe(text, left, add_special_tokens=special))
                    left -= len(found[-1])
            except TooLarge:
                found.clear()  # the error keeps this frame until the collector comes by
                raise
            return found

        return await self._tokenizers.run(sum(map(len, texts)), work)

    def check_batch(self, count: int) -> None:
        if count > self.settings.max_client_batch:
            raise TooLarge(
                f"{count} inputs in one request, at most {self.settings.max_client_batch}: "
                "send them in several requests"
            )

    async def compute(self, rows: Sequence[TokenRow], scope: Scope) -> list[NDArray[np.float32]]:
        facts = scope.facts
        facts.tokens = sum(map(len, rows))
        vectors, facts.queueing_s, facts.inference_s = await self.dispatcher.compute_timed(
            rows, deadline_ms=scope.deadline_ms, priority=scope.priority
        )
        return vectors

    async def decode(self, rows: Sequence[Sequence[int]], skip_special: bool) -> list[str]:
        """The text of each row of token ids, in the tokenizers' threads."""
        texts = self.model.tokenizer.texts_of
        return await self._tokenizers.run(
            sum(map(len, rows)) * CHARACTERS_PER_TOKEN, lambda: texts(rows, skip_special)
        )

    def figures(self) -> dict[str, float]:
        """Gauges for the metrics: the queue, the cache, the engine's memory and plans."""
        found = {"ready": float(self.state == "ready")}
        if self._dispatcher is not None:
            cache, scheduler = self._dispatcher.cache, self._dispatcher.scheduler
            found["backlog_ms"] = scheduler.backlog_ms
            found["cache_nbytes"] = float(cache.nbytes)
            found["cache_entries"] = float(len(cache))
            found["cost_observations"] = float(scheduler.costs.observations)
        found.update({f"engine_{k}": v for k, v in self.model.engine.figures().items()})
        return found

    def _scheduler(self, costs: CostTable) -> Scheduler:
        settings = self.settings
        policy = POLICIES[settings.policy]()
        if isinstance(policy, Aged):
            policy = replace(policy, max_age_ms=settings.max_age_ms)
        lazy = Lazy(settings.lazy_ms, settings.max_batch, settings.max_batch_tokens)
        return Scheduler(
            costs,
            policy,
            lazy if settings.lazy_ms else Hungry(),
            max_batch=settings.max_batch,
            max_batch_tokens=settings.max_batch_tokens,
            max_queue=settings.max_queue,
            max_age_ms=settings.max_age_ms,
        )

    def _prepare(self) -> CostTable:
        """Run the engine once, so that no request waits for a capture, and know its costs."""
        engine, path = self.model.engine, self._cost_path()
        if isinstance(engine, SleepEngine):
            return self._costs or engine.costs
        token = min(100, self.model.tokenizer.vocabulary - 1)  # any of the model's will do
        warm_up(engine, self.model.info.max_length, token)
        if self._costs is not None:
            return self._costs
        table = load_or_measure(
            path,
            engine,
            max_length=self.model.info.max_length,
            max_batch=self.settings.max_batch,
            max_tokens=self.settings.max_batch_tokens,
            token=token,
        )
        if path is not None:
            with contextlib.suppress(OSError):
                table.save(path, model=self.model.info.name)
        if isinstance(engine, TorchEngine):
            engine.keep()
        return table

    def _cost_path(self) -> Path | None:
        folder, info = self.settings.cost_folder, self.model.info
        if folder is None or isinstance(self.model.engine, SleepEngine):
            return None
        return cost_file(
            folder,
            info.name,
            info.revision,
            describe_device(info.device),
            f"{info.backend}-{info.dtype}",
        )
