"""Served: base class of the services: state for `/ready`, preparation, threads, body memory.

In: settings, the models' names, metrics. Out: the base of `Service` and `GenerationService`; a
subclass prepares its models in `start` and finishes accepted requests in `drain`::

    nbytes = await self.prepare(work)       # runs on a daemon thread
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from turbotx.errors import TurbotxError
from turbotx.serving.bodies import BodyMemory
from turbotx.serving.daemon_thread import run_in_daemon_thread
from turbotx.serving.metrics import MetricsRegistry
from turbotx.serving.refusals import NotReady
from turbotx.serving.settings import Settings
from turbotx.serving.tokenizer_pool import TokenizerPool

State = Literal["loading", "ready", "draining", "failed"]
log = logging.getLogger(__name__)
BODIES = 8  # memory for bodies, in bodies of the largest size
Result = TypeVar("Result")


class ModelFailed(TurbotxError):
    """The model was loaded but cannot run."""


class Served:
    """Base of services. `start` and all later calls belong to one event loop."""

    def __init__(self, settings: Settings, names: Sequence[str], metrics: MetricsRegistry) -> None:
        """names: the models' names; the first is the default."""
        self.settings, self.names, self.metrics = settings, tuple(names), metrics
        self.state: State = "loading"
        self.url = ""  # shown in the log when ready
        self.failure: ModelFailed | None = None
        self.preparing = False  # a thread is running a model for the first time
        self._prepared = names[0]  # the model named in a failure
        self.leaving = False  # shutting down: not ready, still answering
        self.bodies = BodyMemory(BODIES * settings.max_body_nbytes)
        self._tokenizers = TokenizerPool(settings.tokenizer_threads, settings.max_body_nbytes)
        self._large = ThreadPoolExecutor(1, thread_name_prefix="turbotx-large")
        metrics.watch(self.figures)

    async def start(self) -> None:
        """Prepare the models. Raises ModelFailed if one cannot run."""
        raise NotImplementedError

    async def drain(self) -> None:
        """Finish accepted requests."""
        raise NotImplementedError

    def figures(self) -> Mapping[str, float]:
        """Return gauges for the metrics, by name."""
        raise NotImplementedError

    async def prepare(self, work: Callable[[], Result]) -> Result:
        """Run `work`, the models' first run, on a daemon thread, which shutdown does not wait for.

        On any exception the state becomes "failed" and ModelFailed is raised with its first line.
        """

        def end() -> None:
            self.preparing = False

        self.preparing = True
        try:
            return await run_in_daemon_thread(work, end)
        except Exception as error:  # any exception of the model
            said = str(error).strip().splitlines() or [""]
            if said[0].endswith(":"):  # add the next line, such as a compiler's first error
                said[0] = " ".join(said[:2])
            self.state = "failed"
            self.failure = ModelFailed(
                f"{self._prepared} cannot run: {type(error).__name__}: {said[0]}"
            )
            log.error(str(self.failure), exc_info=log.isEnabledFor(logging.DEBUG))
            raise self.failure from error

    def when_ready(self, worker: Result | None) -> Result:
        """Return `worker`; raise NotReady if it is None or the service is not ready."""
        if worker is None or self.state != "ready":
            raise NotReady(f"the server is {self.state}", retry_after_s=1.0)
        return worker

    async def stop(self) -> None:
        """Finish accepted requests and end the threads, without waiting for a preparing thread."""
        self.state = "draining"
        await self.drain()
        self._tokenizers.shutdown()
        self._large.shutdown(wait=True)

    async def apart(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run work on large bodies and responses on one thread, so that the event loop stays free.

        One at a time: because of the GIL, more threads would only slow down the event loop.
        """
        return await asyncio.get_running_loop().run_in_executor(self._large, work, *arguments)

    async def tokenize(self, characters: int, work: Callable[[], Result]) -> Result:
        """Run work that reads this many characters in the tokenizers' threads. Raises Busy."""
        return await self._tokenizers.run(characters, work)
