"""The front desk: permits, streams of events, and whole answers collected from them.

Owns the permits of --max-concurrent-requests. Knows neither HTTP nor the scheduler: requests go to
the batching loop, events come back.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol, Self

from kagami_proto.errors import IncompleteGeneration, KagamiError, Overloaded, Unavailable
from kagami_router.request.values import End, PrefillToken, StreamEvent, Token, ValidRequest
from kagami_router.serving.step_events import Divertible, Sink
from kagami_router.telemetry.metrics import GenerationStats, Metrics
from kagami_router.telemetry.request_trace import describe_request

Events = tuple[StreamEvent, ...]


class Generator(Protocol):
    """What the desk needs of the batching loop."""

    def submit(self, request: ValidRequest) -> AbstractAsyncContextManager[AsyncIterator[Events]]:
        """Start one generation; leaving the context before its end cancels it."""
        ...


@dataclass(frozen=True, slots=True)
class Generation:
    """One whole answer."""

    request: ValidRequest
    tokens: tuple[Token, ...]
    top_tokens: tuple[tuple[Token, ...], ...]
    """One entry for each token where top tokens were asked for, else empty."""
    tails: tuple[str, ...]
    """For each token the `tail` of its event."""
    end: End
    prefill: tuple[PrefillToken, ...]
    """The prompt's tokens where their logprobs were asked for, else empty."""

    @property
    def seed(self) -> int | None:
        """The seed that was used; None when greedy."""
        return self.request.sampling.seed if self.request.sampling.do_sample else None

    def tokens_with_alternatives(self) -> Iterator[tuple[Token, tuple[Token, ...]]]:
        """Each token and the top tokens at its place, if there are any."""
        return zip(self.tokens, self.top_tokens or repeat(()), strict=False)

    @property
    def mean_logprob(self) -> float:
        """What `best_of` compares."""
        return math.fsum(token.logprob for token in self.tokens) / len(self.tokens)


@dataclass(slots=True, eq=False)
class Tally:
    """When one call came in, and what its generations have brought so far (monotonic seconds)."""

    received: float
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: float | None = None


class Infer:
    """Hands out permits and runs generations."""

    def __init__(self, loop: Generator, metrics: Metrics, *, max_concurrent_requests: int) -> None:
        self._loop = loop
        self._metrics = metrics
        self._free_permits = max_concurrent_requests
        self._max_permits = max_concurrent_requests
        self._deadlines: set[asyncio.Timeout] = set()
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def permits(self, count: int = 1) -> Iterator[None]:
        """Hold `count` permits; raises `Overloaded` at once when there are fewer."""
        if self._is_draining:
            raise Unavailable("The server is shutting down")
        if count > self._free_permits:
            raise Overloaded("Model is overloaded")
        self._free_permits -= count
        self._idle.clear()
        try:
            yield
        finally:
            self._free_permits += count
            if self._free_permits == self._max_permits:
                self._idle.set()

    @asynccontextmanager
    async def stream(
        self, request: ValidRequest, tally: Tally
    ) -> AsyncIterator[AsyncIterator[Events]]:
        """The events of one generation of the call that keeps `tally`.

        Each turn brings all events that are ready. Raises `GenerationFailed`, or
        `IncompleteGeneration` where the server stops before the end.
        """
        describe_request(request)
        tally.prompt_tokens += len(request.prompt_ids)
        self._metrics.request_validated(len(request.prompt_ids), request.stopping.max_new_tokens)
        try:
            async with asyncio.timeout(None) as deadline:
                self._deadlines.add(deadline)
                try:
                    async with self._loop.submit(request) as events:
                        yield _Observed(events, tally, self._metrics)
                finally:
                    self._deadlines.discard(deadline)
        except TimeoutError:
            raise IncompleteGeneration("the server was stopped before the last token") from None

    async def collect(self, request: ValidRequest, tally: Tally) -> Generation:
        """The whole of one generation."""
        collected: list[StreamEvent] = []
        async with self.stream(request, tally) as turns:
            async for events in turns:
                collected.extend(events)
        end = collected[-1].end
        assert end is not None, "a stream ends with its last event or with an error"
        return Generation(
            request=request,
            tokens=tuple(event.token for event in collected),
            top_tokens=tuple(event.top_tokens for event in collected)
            if request.top_n_tokens
            else (),
            tails=tuple(event.tail for event in collected),
            end=end,
            prefill=collected[0].prefill,
        )

    async def collect_all(self, requests: Sequence[ValidRequest], tally: Tally) -> list[Generation]:
        """Several generations at once, in their order; the first failure fails them all."""
        if len(requests) == 1:
            return [await self.collect(requests[0], tally)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.collect(one, tally)) for one in requests]
        except* KagamiError as failed:
            error: BaseException = failed
        else:
            return [task.result() for task in tasks]
        raise _first(error)

    @asynccontextmanager
    async def stream_all(
        self, requests: Sequence[ValidRequest], tally: Tally
    ) -> AsyncIterator[AsyncIterator[list[tuple[int, StreamEvent]]]]:
        """Several generations as one stream of (index of the request, event)."""
        if len(requests) == 1:
            async with self.stream(requests[0], tally) as turns:
                yield _Numbered(turns)
            return
        queue: asyncio.Queue[tuple[int, Events] | None] = asyncio.Queue()

        async def pump(index: int, request: ValidRequest) -> None:
            async with self.stream(request, tally) as turns:
                async for events in turns:
                    queue.put_nowait((index, events))
            queue.put_nowait(None)

        try:
            async with asyncio.TaskGroup() as group:
                for index, request in enumerate(requests):
                    group.create_task(pump(index, request))
                yield _merged(queue, len(requests))
        except BaseExceptionGroup as failed:
            error: BaseException = failed
        else:
            return
        raise _first(error)

    async def drain(self, timeout_s: float, last_words_s: float) -> None:
        """Refuse new work, wait for what runs, and end the rest when the time is over.

        What is ended so has `last_words_s` to tell its client.
        """
        self._is_draining = True
        if await self._is_idle_within(timeout_s):
            return
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            deadline.reschedule(now)
        await self._is_idle_within(last_words_s)

    async def _is_idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    @property
    def num_permits_held(self) -> int:
        """Generations that are admitted and not over."""
        return self._max_permits - self._free_permits


class _Observed:
    """Passes the events on and tells the metrics: one observation a turn, not one a token."""

    __slots__ = ("_events", "_last", "_metrics", "_tally")

    def __init__(self, events: AsyncIterator[Events], tally: Tally, metrics: Metrics) -> None:
        self._events = events
        self._tally = tally
        self._metrics = metrics
        self._last = 0.0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Events:
        turn = await anext(self._events)
        self._see(turn)
        return turn

    def divert(self, sink: Sink[Events]) -> None:
        """Hand over what the stream behind it can."""

        def observed(turn: Events) -> bool:
            if not sink(turn):
                return False
            self._see(turn)
            return True

        if isinstance(self._events, Divertible):
            self._events.divert(observed)

    def _see(self, turn: Events) -> None:
        now, tally = time.monotonic(), self._tally
        if self._last:
            self._metrics.tokens_arrived(now - self._last, len(turn))
        else:
            self._metrics.first_token_arrived(now - tally.received)
            if tally.first_token is None:
                tally.first_token = now
        tally.generated_tokens += len(turn)
        self._last = now
        if (end := turn[-1].end) is not None:
            self._metrics.generation_finished(_stats_of(end, tally.received))


def _stats_of(end: End, received: float) -> GenerationStats:
    timings = end.timings
    return GenerationStats(
        total_s=timings.finished - received,
        validation_s=timings.submitted - received,
        queue_s=timings.scheduled - timings.submitted,
        inference_s=timings.finished - timings.scheduled,
        generated_tokens=end.num_generated,
    )


class _Numbered:
    """The events of the only request, each with its index."""

    __slots__ = ("_turns",)

    def __init__(self, turns: AsyncIterator[Events]) -> None:
        self._turns = turns

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[tuple[int, StreamEvent]]:
        return _of_the_first(await anext(self._turns))

    def divert(self, sink: Sink[list[tuple[int, StreamEvent]]]) -> None:
        """Hand over what the stream behind it can."""
        if isinstance(self._turns, Divertible):
            self._turns.divert(lambda turn: sink(_of_the_first(turn)))


def _of_the_first(turn: Events) -> list[tuple[int, StreamEvent]]:
    return [(0, event) for event in turn]


async def _merged(
    queue: asyncio.Queue[tuple[int, Events] | None], num_open: int
) -> AsyncIterator[list[tuple[int, StreamEvent]]]:
    """All that is in the queue at once, until every producer has put its None."""
    while num_open:
        waiting = [await queue.get()]
        while not queue.empty():
            waiting.append(queue.get_nowait())
        num_open -= waiting.count(None)
        if ready := [(one[0], event) for one in waiting if one for event in one[1]]:
            yield ready


def _first(error: BaseException) -> BaseException:
    """The first leaf of a group: one request gets one answer."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
