"""DecodeWorker: the thread that runs the model, one turn at a time.

In: sequences, from any thread. Out: their pieces, those of a turn together, by `post`. Sequences
join, leave or are preempted between turns. Where the model's calls return before they have
computed, tokens become text, and are sent, while the next step runs::

    worker = DecodeWorker(batch, scheduler, metrics, post); worker.start()
    worker.submit([sequence])                    # post([(sequence, Piece(...))]), and so on
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence

from turbotx.serving.generation.batch import DecodeBatch
from turbotx.serving.generation.metrics import GenerationMetrics
from turbotx.serving.generation.scheduler import GenerationScheduler
from turbotx.serving.generation.sequence import GeneratedSequence, Piece
from turbotx.serving.generation.step_logits import StepLogits
from turbotx.serving.refusals import BackendFailed, NotReady, Refusal

log = logging.getLogger(__name__)
Told = list[tuple[GeneratedSequence, Piece | Exception]]


class DecodeWorker:
    """The worker; `submit` and `cancel` may be called from any thread."""

    def __init__(
        self, batch: DecodeBatch, scheduler: GenerationScheduler, metrics: GenerationMetrics,
        post: Callable[[Told], None],
    ) -> None:  # fmt: skip
        """post: called on the worker's thread with what is to be told."""
        self.batch, self._scheduler, self._metrics = batch, scheduler, metrics
        self._post = post
        self._due: list[tuple[GeneratedSequence, Exception | None]] = []
        """Who has chosen a token, or failed, that is not told yet."""
        self._changed = threading.Condition()
        self._cancelled: set[GeneratedSequence] = set()
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="turbotx-decode", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, sequences: Sequence[GeneratedSequence]) -> None:
        """Queue the sequences of a request. Raises Busy, NotReady."""
        with self._changed:
            if self._draining:
                raise NotReady("the server is shutting down")
            self._scheduler.submit(sequences)
            self._changed.notify()

    def cancel(self, sequences: Sequence[GeneratedSequence]) -> None:
        """Cancel sequences; their cache blocks are released after the current turn."""
        with self._changed:
            self._cancelled.update(s for s in sequences if not s.finished)
            self._changed.notify()

    def drain(self) -> None:
        """Finish all sequences and end the thread; blocks until then."""
        with self._changed:
            self._draining = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.batch.close()

    def figures(self) -> dict[str, float]:
        """Return gauges for the metrics."""
        with self._changed:
            scheduler, batch = self._scheduler, self.batch
            return {
                "sequences_waiting": float(len(scheduler.waiting)),
                "sequences_running": float(len(scheduler.running) + len(scheduler.reading)),
                "preemptions": float(scheduler.preemptions),
                "cache_positions_used": float(sum(e.count for e in batch.slots.rows)),
                "cache_blocks_used": float(batch.layer_blocks),
                "cache_blocks_most": float(scheduler.limits.max_blocks * batch.layers),
                "cache_blocks_cached": float(batch.prefixes.idle * batch.layers),
                "cache_blocks_evicted": float(batch.prefixes.evicted * batch.layers),
                "cache_nbytes": float(batch.nbytes()),
            }

    # --- the thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                while not len(self._scheduler) and not self._draining:
                    self._changed.wait()
                if not len(self._scheduler):
                    return
            self._turn()

    def _turn(self) -> None:
        with self._changed:
            self._forget_cancelled()
            while gone := self._scheduler.give_way(self.batch):
                for sequence in gone:
                    self.batch.leave(sequence)
            turn = self._scheduler.next(self.batch)
        if turn.begin is not None:
            self.batch.begin(turn.begin)
            for row in turn.begin.rows:
                self._metrics.prefix_hits.inc(row.cached)
                for key in row.keys:
                    assert isinstance(key, GeneratedSequence)
                    key.note_cached(row.cached)
        for work, concerned in ((self._read, turn.read), (self._step, turn.step)):
            try:
                if concerned:
                    work()
            except Exception as error:  # any of the model: waiting requests get it
                log.exception("a turn failed")
                self._fail(error, reading=work == self._read)
        if not (self.batch.overlaps and self._scheduler.running):
            self._tell()

    def _read(self) -> None:
        """Prefill a piece of the prompts; at the end sample first tokens and join the batch."""
        reading = self.batch.reading
        assert reading is not None
        begin, columns = time.perf_counter(), reading.next - reading.done
        found = self.batch.read()
        self._tell()
        found.wait()
        self._metrics.count_read(columns * len(reading.rows), time.perf_counter() - begin)
        if not found.places:
            return
        tokens: dict[Hashable, int] = {}
        for sequence, place in found.places.items():
            assert isinstance(sequence, GeneratedSequence)
            if self._choose(sequence, found, place):
                tokens[sequence] = sequence.tokens[-1]
        if tokens:
            self.batch.join(tokens)
        with self._changed:
            self._scheduler.have_read()

    def _step(self) -> None:
        """Decode one token of every running sequence."""
        begin = time.perf_counter()
        found = self.batch.step()
        self._tell()
        found.wait()
        self._metrics.count_step(len(found.places), time.perf_counter() - begin)
        for sequence, place in found.places.items():
            assert isinstance(sequence, GeneratedSequence)
            if self._choose(sequence, found, place):
                self.batch.push(sequence, sequence.tokens[-1])

    def _choose(self, sequence: GeneratedSequence, logits: StepLogits, place: int) -> bool:
        """Sample a sequence's next token; return whether it continues."""
        right = True
        try:
            sequence.choose(logits, place)
            self._due.append((sequence, None))
        except ValueError as error:
            self._end(sequence, BackendFailed(str(error)))
            right = False
        if sequence.finished:
            self.batch.leave(sequence, right)
            with self._changed:
                self._scheduler.drop(sequence)
        return not sequence.finished

    def _tell(self) -> None:
        """Make the texts of the tokens chosen last, and tell them all at once."""
        due, self._due = self._due, []
        told: Told = []
        for sequence, error in due:
            try:
                told.append((sequence, error or sequence.piece()))
            except Exception as failure:  # of the tokenizer: the others go on
                log.exception("a text failed")
                self.cancel([sequence])
                said = f"the tokenizer failed: {type(failure).__name__}"
                told.append((sequence, BackendFailed(said)))
        if told:
            self._post(told)

    def _end(self, sequence: GeneratedSequence, error: Exception) -> None:
        sequence.finished = True
        self._due.append((sequence, error))

    def _forget_cancelled(self) -> None:
        """Remove cancelled sequences."""
        for sequence in self._cancelled:
            self._scheduler.drop(sequence)
            self.batch.leave(sequence)
            sequence.finished = True
        self._cancelled.clear()

    def _fail(self, error: Exception, reading: bool) -> None:
        """Fail and remove the prefilling (`reading`) or the decoding sequences."""
        said = str(error).partition("\n")[0]
        refusal = error if isinstance(error, Refusal) else BackendFailed(
            f"the model failed: {type(error).__name__}: {said}"
        )  # fmt: skip
        with self._changed:
            queue = self._scheduler.reading if reading else self._scheduler.running
            for sequence in list(queue):
                assert isinstance(sequence, GeneratedSequence)
                self._scheduler.drop(sequence)
                self.batch.leave(sequence, keep=False)
                self._end(sequence, refusal)
