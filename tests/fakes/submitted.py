"""One generation of a batching loop: iterated, or given to a sink."""

from types import TracebackType
from typing import Self

from kagami_router.request.values import ValidRequest
from kagami_router.serving.batching_loop import BatchingLoop
from kagami_router.serving.generation_stream import (
    CallEvents,
    CallStats,
    Events,
    GenerationStream,
    Sink,
)
from kagami_router.telemetry.metrics import Metrics


def refuse(index: int, events: Events) -> bool:
    """A sink that leaves everything to the iterator."""
    return False


class Submitted:
    """Leaving its context cancels the generation."""

    def __init__(self, loop: BatchingLoop, request: ValidRequest, sink: Sink = refuse) -> None:
        self._call = CallEvents(1, sink)
        stream = GenerationStream(self._call, 0, CallStats(0.0), Metrics())
        self._cancel = loop.submit(request, stream)

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

    async def __anext__(self) -> Events:
        """All events since the last time."""
        return tuple(event for _, events in await anext(self._call) for event in events)
