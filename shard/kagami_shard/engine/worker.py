"""The loop that drives the engine on its one thread, fed by a queue.

It runs steps in the order they come and publishes results through a callback. What `Health` asks
for are attributes that only this loop writes and any thread may read.
"""

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from contextlib import suppress

from kagami_proto.errors import RankLost
from kagami_proto.panics import exception_of
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.launched import Launched, is_known_done
from kagami_shard.engine.step import Step, StepResult
from kagami_shard.engine.traces import SequenceTraces
from kagami_shard.machine.memory import is_out_of_memory

logger = logging.getLogger(__name__)

# A server without work for so long is idle, and not between two steps.
_IDLE_S = 0.1

Publish = Callable[[StepResult], None]


class Worker:
    """A context manager; while it is entered, its loop occupies the one thread of `thread`.

    The thread should be the one that loaded the model, and no other thread may compute: OpenMP
    keeps a team of threads for each thread that ever did. With more threads than cores it stops
    spinning between two operations (measured: 27 ms a step against 16, SmolLM2-135M, two cores).

    With `overlap` a step is launched before the last one is collected, if it has arrived by then
    and the device still works. On a CPU launching is computing, so overlap would only delay
    results. Ranks of one model may not overlap: the failures of a collected step must reach the
    next step on all ranks, but each rank would collect at another moment.
    """

    def __init__(
        self,
        engine: Engine,
        thread: Executor,
        *,
        overlap: bool,
        traces: SequenceTraces | None = None,
    ) -> None:
        self._engine = engine
        self.traces = traces or SequenceTraces()
        self._thread = thread
        self._overlap = overlap
        self._queue: queue.SimpleQueue[Callable[[], None] | tuple[Step, Publish] | None] = (
            queue.SimpleQueue()
        )
        self.ended: Future[None] = Future()
        """Done when the loop has ended; holds the exception if one ended it"""
        self._launched: tuple[Launched | StepResult, Step, Publish, int] | None = None
        self.last_step = 0
        self.last_step_ns = 0
        """`time.monotonic_ns()` when it finished"""
        self.busy_since_ns = 0
        """0 when idle"""

    def __enter__(self) -> "Worker":
        self.ended = self._thread.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        wait((self.ended,))

    def stop(self) -> None:
        """End the loop after everything that is queued."""
        self._queue.put(None)

    def run(self, step: Step, publish: Publish) -> None:
        """Queue a step; `publish` is called with its result on the worker's thread."""
        self._queue.put((step, publish))

    def call(self, function: Callable[[], None]) -> None:
        """Queue a call between steps, in order with them."""
        self._queue.put(function)

    def reset(self) -> None:
        """Forget every sequence; on the worker's thread."""
        self._engine.reset()
        self.traces.reset()

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            if isinstance(entry, tuple):
                self._step(*entry)
            else:
                self._collect()
                entry()
        self._collect()

    def _next(self) -> Callable[[], None] | tuple[Step, Publish] | None:
        """The next entry; a launched step is collected while there is none."""
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            self._collect()
            self.busy_since_ns = 0
        with suppress(queue.Empty):
            return self._queue.get(timeout=_IDLE_S)
        while self._engine.take_memory_ahead():
            with suppress(queue.Empty):
                return self._queue.get_nowait()
        return self._queue.get()

    def _step(self, step: Step, publish: Publish) -> None:
        self.busy_since_ns = time.monotonic_ns()
        started_ns = time.time_ns()
        self.traces.launched(step)
        # An idle device gains nothing if the launch comes first, and the client of the last step
        # would wait for the launch too (measured: two tokens every 28 ms, not one every 14).
        is_idle = self._launched is not None and is_known_done(self._launched[0])
        if is_idle or self._engine.reads_history(step):
            self._collect()
        try:
            launched = self._engine.launch(step)
        # A border: whatever a forward pass raises fails this step, and the shard goes on.
        except BaseException as raised:
            error = exception_of(raised)
            self._collect()
            failed = self._failed(step.number, error)
            self.traces.finished(step, failed, started_ns)
            _raise_if_parted(error)
            publish(failed)
            self._engine.recover(error)
            return
        self._collect()
        self._launched = (launched, step, publish, started_ns)
        if not self._overlap:
            self._collect()

    def _collect(self) -> None:
        if self._launched is None:
            return
        (launched, step, publish, started_ns), self._launched = self._launched, None
        try:
            result = self._engine.collect(launched)
        # A device reports a failed kernel when its results are read.
        except BaseException as raised:
            error = exception_of(raised)
            failed = self._failed(launched.number, error)
            self.traces.finished(step, failed, started_ns)
            _raise_if_parted(error)
            publish(failed)
            self._engine.recover(error)
            return
        self.last_step = result.number
        self.last_step_ns = time.monotonic_ns()
        publish(result)
        self.traces.finished(step, result, started_ns)

    def _failed(self, number: int, error: Exception) -> StepResult:
        logger.error("Step failed", exc_info=error, extra={"step": number})
        text = " ".join(str(error).split()) or type(error).__name__
        return StepResult(number=number, error=text, out_of_memory=is_out_of_memory(error))


def _raise_if_parted(error: Exception) -> None:
    """Ranks that are out of step stay so.

    No result is published: the router would still wait for the result of a rank that hangs. It
    hears the end of this rank's stream at once.
    """
    if isinstance(error, RankLost):
        raise error
