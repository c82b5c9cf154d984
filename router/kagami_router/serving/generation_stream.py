"""Carries the events of a call from the batching loop to the code that started the call.

The loop first pushes: it gives the events of a step directly to the call's sink, without waking a
task. Events that the sink refuses go into a backlog. Iterating over the call returns the backlog,
in order. No event is pushed while the backlog is not empty or the consumer still handles it. The
backlog has an end: a client that is too far behind loses its call.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol, Self

from kagami_proto.panics import exception_of
from kagami_router.request.values import End, StreamEvent
from kagami_router.telemetry.metrics import GenerationStats, Metrics

Events = tuple[StreamEvent, ...]
"""The events of one step for one generation"""

# A token waits as 0.4 to 1.4 KB. A client that reads at all is behind by what a connection holds.
MAX_BACKLOG = 4096
"""Steps of its generations that a client may be behind"""


class Sink(Protocol):
    """Where the events of a call go."""

    def __call__(self, index: int, events: Events, /) -> bool:
        """Take events of the generation with this index, or refuse them: False. Never waits."""

    def give_up(self) -> None:
        """End the call: its client is too far behind."""


@dataclass(slots=True, eq=False)
class CallStats:
    """Counts and times of one call until now, over all generations; times are monotonic seconds."""

    received: float
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None


class CallEvents:
    """The events of all generations of one call: pushed to a sink, or read as a backlog."""

    __slots__ = ("_backlog", "_error", "_num_open", "_sink", "_waiter")

    def __init__(self, num_generations: int, sink: Sink) -> None:
        self._num_open = num_generations
        self._sink = sink
        self._backlog: list[tuple[int, Events]] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        """Set while the consumer waits; None while it handles a backlog"""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[int, Events]]:
        """All events that the sink refused since the last call, with their generation's index.

        Ends after the last event of every generation. Raises `GenerationFailed` or `ShardLost` if
        one of them fails, and any error that the sink raised.
        """
        while not self._backlog:
            if self._error is not None:
                raise self._error
            if not self._num_open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        backlog, self._backlog = self._backlog, []
        return backlog

    def put(self, index: int, events: Events) -> None:
        """Add events; only `GenerationStream` calls it. After an error they are dropped."""
        if self._error is not None:
            return
        if events[-1].end is not None:
            self._num_open -= 1
        # A consumer that was woken or cancelled may write the last bytes of its response. Bytes
        # that are pushed behind them would stand in the client's next response.
        waiter = self._waiter
        if waiter is not None and not waiter.done() and not self._backlog:
            try:
                is_taken = self._sink(index, events)
            # A border: a bug in writing one answer must not stop the steps of others.
            except BaseException as error:
                self.fail(exception_of(error))
                return
            if is_taken:
                if not self._num_open:
                    self._wake()
                return
        self._backlog.append((index, events))
        if len(self._backlog) == MAX_BACKLOG:
            self._sink.give_up()
        self._wake()

    def fail(self, error: Exception) -> None:
        """End with `error`; only `GenerationStream` calls it. The backlog is still delivered."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class GenerationStream:
    """The batching loop puts the events of one generation here; counts them for the metrics."""

    __slots__ = ("_call", "_index", "_last", "_metrics", "_stats")

    def __init__(self, call: CallEvents, index: int, stats: CallStats, metrics: Metrics) -> None:
        self._call = call
        self._index = index
        self._stats = stats
        self._metrics = metrics
        self._last = 0.0

    def put(self, events: Events) -> None:
        """Add the events of one step; the event with `end` is the last of the generation."""
        now, stats = time.monotonic(), self._stats
        if self._last:
            self._metrics.tokens_arrived(now - self._last, len(events))
        else:
            self._metrics.first_token_arrived(now - stats.received)
            if stats.first_token is None:
                stats.first_token = now
        stats.generated_tokens += len(events)
        self._last = now
        self._call.put(self._index, events)
        if (end := events[-1].end) is not None:
            self._metrics.generation_finished(_stats_of(end, stats.received))

    def fail(self, error: Exception) -> None:
        """End the generation with an error, without a last event."""
        self._call.fail(error)


def _stats_of(end: End, received: float) -> GenerationStats:
    timings = end.timings
    return GenerationStats(
        total_s=timings.finished - received,
        validation_s=timings.submitted - received,
        queue_s=timings.scheduled - timings.submitted,
        inference_s=timings.finished - timings.scheduled,
        generated_tokens=end.num_generated,
    )
