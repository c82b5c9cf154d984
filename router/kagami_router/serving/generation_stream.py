"""The events of one generation on their way from the batching loop to whoever asked for it."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from kagami_router.request.values import StreamEvent
from kagami_router.serving.step_events import Sink


class GenerationStream:
    """The events of one request: an async context manager and an async iterator.

    Leaving the context before the end cancels the generation.
    """

    __slots__ = ("_cancel", "_error", "_events", "_has_ended", "_sink", "_waiter")

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._events: list[StreamEvent] = []
        self._sink: Sink[tuple[StreamEvent, ...]] | None = None
        self._error: Exception | None = None
        self._has_ended = False
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[StreamEvent, ...]:
        """All events since the last turn; raises `GenerationFailed`, `ShardLost`, a sink's bug."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._has_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events = tuple(self._events)
        self._events.clear()
        return events

    def divert(self, sink: Sink[tuple[StreamEvent, ...]]) -> None:
        """Hand events to `sink` as they come, as long as none waits to be iterated."""
        self._sink = sink

    def put(self, event: StreamEvent) -> None:
        """For the loop: one more event; the one with `end` is the last."""
        is_last = self._has_ended = event.end is not None
        is_taken = False
        if self._sink is not None and not self._events:
            try:
                is_taken = self._sink((event,))
            # A border: a bug in one answer's words must not stop the others' steps.
            except Exception as error:
                self._sink, is_taken = _take_nothing_more, True
                self.fail(error)
        if not is_taken:
            self._events.append(event)
        if is_last or not is_taken:
            self._notify()

    def fail(self, error: Exception) -> None:
        """For the loop: no more events; what is there already is still delivered."""
        self._error = error
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _take_nothing_more(turn: tuple[StreamEvent, ...]) -> bool:
    """The sink of a stream whose own has failed: nothing may follow what it left out."""
    return True
