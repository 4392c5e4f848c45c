"""What every service has: a state that `/ready` tells, a model to prepare, threads, bodies.

In: settings, the names of models, metrics. Out: the base of `Service` and `GenerationService`; a
subclass prepares its models in `start` and finishes what was accepted in `drain`::

    nbytes = await self.prepare(work)       # on a thread that who stops need not wait for
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
BODIES = 8  # of the largest size, arriving or being answered at a time
Result = TypeVar("Result")


class ModelFailed(TurbotxError):
    """The model was loaded, and cannot compute."""


class Served:
    """``start`` and all after it belong to one event loop."""

    def __init__(self, settings: Settings, names: Sequence[str], metrics: MetricsRegistry) -> None:
        """names: of the models, the first one answers where a request names none."""
        self.settings, self.names, self.metrics = settings, tuple(names), metrics
        self.state: State = "loading"
        self.url = ""  # where it listens, for the line that says that it is ready
        self.failure: ModelFailed | None = None
        self.preparing = False  # a thread runs a model for the first time
        self._prepared = names[0]  # the model that a failure is of
        self.left = asyncio.Event()  # told to stop: bodies that are half there are not waited for
        self.leaving = False  # told to stop: ready for nothing new, though still answering
        self.bodies = BodyMemory(BODIES * settings.max_body_nbytes)
        self._tokenizers = TokenizerPool(settings.tokenizer_threads, settings.max_body_nbytes)
        self._large = ThreadPoolExecutor(1, thread_name_prefix="turbotx-large")
        metrics.watch(self.figures)

    async def start(self) -> None:
        """Get ready for requests. Raises ModelFailed where that is not possible."""
        raise NotImplementedError

    async def drain(self) -> None:
        """Finish what was accepted."""
        raise NotImplementedError

    def figures(self) -> Mapping[str, float]:
        """Gauges for the metrics, by name."""
        raise NotImplementedError

    async def prepare(self, work: Callable[[], Result]) -> Result:
        """Run the models for the first time, on a thread that who stops need not wait for.

        Raises ModelFailed for whatever the work raises, with its first line; the state is failed.
        """

        def end() -> None:
            self.preparing = False

        self.preparing = True
        try:
            return await run_in_daemon_thread(work, end)
        except Exception as error:  # whatever the model raises
            said = str(error).strip().splitlines() or [""]
            if said[0].endswith(":"):  # what follows is the cause, as a compiler's first complaint
                said[0] = " ".join(said[:2])
            self.state = "failed"
            self.failure = ModelFailed(
                f"{self._prepared} cannot run: {type(error).__name__}: {said[0]}"
            )
            log.error(str(self.failure), exc_info=log.isEnabledFor(logging.DEBUG))
            raise self.failure from error

    def when_ready(self, worker: Result | None) -> Result:
        """Return what computes; raise NotReady while there is nothing that accepts."""
        if worker is None or self.state != "ready":
            raise NotReady(f"the server is {self.state}", retry_after_s=1.0)
        return worker

    async def stop(self) -> None:
        """Finish what was accepted, end the threads.

        Who is told to stop while a model is being prepared does not wait for it.
        """
        self.state = "draining"
        await self.drain()
        self._tokenizers.shutdown()
        self._large.shutdown(wait=True)

    async def apart(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Large bodies and answers, one at a time on a thread, so that the event loop goes on.

        The interpreter runs one of them at a time anyway; side by side they would only take turns
        away from everybody else.
        """
        return await asyncio.get_running_loop().run_in_executor(self._large, work, *arguments)

    async def tokenize(self, characters: int, work: Callable[[], Result]) -> Result:
        """Run work that reads so many characters in the tokenizers' threads. Raises Busy."""
        return await self._tokenizers.run(characters, work)
