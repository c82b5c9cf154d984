"""Runs generations: holds permits, streams events, collects whole answers.

Owns the permits of --max-concurrent-requests. Knows neither HTTP nor the scheduler: requests go to
the batching loop, events come back.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

from kagami_proto.errors import IncompleteGeneration, Overloaded, Unavailable
from kagami_router.request.values import End, PrefillToken, StreamEvent, Token, ValidRequest
from kagami_router.serving.generation_stream import (
    CallEvents,
    CallStats,
    Events,
    GenerationStream,
    Sink,
)
from kagami_router.telemetry.metrics import Metrics
from kagami_router.telemetry.request_trace import describe_request

# How many permits there are besides, of those that --max-concurrent-requests says, for callers that
# hold none while others hold them all.
SPARE_SHARE = 1 / 8


class Generator(Protocol):
    """The part of the batching loop that `Infer` uses."""

    def submit(self, request: ValidRequest, stream: GenerationStream) -> Callable[[], None]:
        """Start one generation; its events go to `stream`.

        Returns a function that cancels it; after its end the function does nothing.
        """
        ...


@dataclass(frozen=True, slots=True)
class Generation:
    """One whole answer."""

    request: ValidRequest
    tokens: tuple[Token, ...]
    top_tokens: tuple[tuple[Token, ...], ...]
    """One entry for each token if top tokens were asked for, else empty."""
    tails: tuple[str, ...]
    """The `tail` of each token's event."""
    end: End
    prefill: tuple[PrefillToken, ...]
    """The prompt's tokens if their logprobs were asked for, else empty."""

    @property
    def seed(self) -> int | None:
        """The seed that was used; None when greedy."""
        return self.request.sampling.seed if self.request.sampling.do_sample else None

    def tokens_with_alternatives(self) -> Iterator[tuple[Token, tuple[Token, ...]]]:
        """Each token with the top tokens at its position; they may be empty."""
        return zip(self.tokens, self.top_tokens or repeat(()), strict=False)

    @property
    def mean_logprob(self) -> float:
        """The mean of the tokens' logprobs; `best_of` compares it."""
        return math.fsum(token.logprob for token in self.tokens) / len(self.tokens)


class Infer:
    """Hands out permits and runs generations."""

    def __init__(self, loop: Generator, metrics: Metrics, *, max_concurrent_requests: int) -> None:
        self._loop = loop
        self._metrics = metrics
        self._free_permits = max_concurrent_requests
        self._max_permits = max_concurrent_requests
        self._held: Counter[str] = Counter()  # by whom
        self._deadlines: set[asyncio.Timeout] = set()
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def permits(self, count: int = 1, *, caller: str = "") -> Iterator[None]:
        """Hold `count` permits, one for each generation.

        Never waits. Raises `Overloaded` if fewer are free, `Unavailable` while draining. A caller
        that holds none may have one of `SPARE_SHARE` more: nobody can keep all others out.
        """
        if self._is_draining:
            raise Unavailable("The server is shutting down")
        spare = 0 if self._held[caller] else int(self._max_permits * SPARE_SHARE)
        if count > self._free_permits and (count > 1 or self._free_permits + spare < count):
            raise Overloaded("Model is overloaded")
        self._free_permits -= count
        self._held[caller] += count
        self._idle.clear()
        try:
            yield
        finally:
            self._free_permits += count
            self._held[caller] -= count
            if not self._held[caller]:
                del self._held[caller]
            if self._free_permits == self._max_permits:
                self._idle.set()

    @asynccontextmanager
    async def stream(
        self, requests: Sequence[ValidRequest], stats: CallStats, sink: Sink
    ) -> AsyncIterator[CallEvents]:
        """Run the generations of one call.

        Events go to `sink`; iterate over the result for the events that the sink refused. Leaving
        the context cancels generations that still run. Raises what `CallEvents` raises, and
        `IncompleteGeneration` if the server stops before the end.
        """
        events = CallEvents(len(requests), sink)
        try:
            async with asyncio.timeout(None) as deadline:
                self._deadlines.add(deadline)
                try:
                    with ExitStack() as stack:
                        for index, request in enumerate(requests):
                            stream = GenerationStream(events, index, stats, self._metrics)
                            stack.callback(self._submit(request, stats, stream))
                        yield events
                finally:
                    self._deadlines.discard(deadline)
        except TimeoutError:
            raise IncompleteGeneration("the server was stopped before the last token") from None

    def _submit(
        self, request: ValidRequest, stats: CallStats, stream: GenerationStream
    ) -> Callable[[], None]:
        describe_request(request)
        num_prompt_tokens = len(request.prompt_ids)
        stats.prompt_tokens += num_prompt_tokens
        self._metrics.request_validated(num_prompt_tokens, request.stopping.max_new_tokens)
        return self._loop.submit(request, stream)

    async def collect(self, requests: Sequence[ValidRequest], stats: CallStats) -> list[Generation]:
        """Run generations to their end; returns them in order. Raises the first failure of any."""
        collected = _Collected([[] for _ in requests])
        async with self.stream(requests, stats, collected) as call:
            async for backlog in call:
                for index, events in backlog:
                    collected(index, events)
        return [_generation(*each) for each in zip(requests, collected.events, strict=True)]

    async def drain(self, timeout_s: float, notify_timeout_s: float) -> None:
        """Refuse new work, wait for running calls, and end the rest after `timeout_s`.

        Calls that are ended get up to `notify_timeout_s` to send the error to their clients.
        """
        self._is_draining = True
        if await self._is_idle_within(timeout_s):
            return
        now = asyncio.get_running_loop().time()
        for deadline in self._deadlines:
            deadline.reschedule(now)
        await self._is_idle_within(notify_timeout_s)

    async def _is_idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class _Collected(NamedTuple):
    """The sink of a call that is answered in one piece."""

    events: list[list[StreamEvent]]

    def __call__(self, index: int, events: Events) -> bool:
        self.events[index].extend(events)
        return True

    def give_up(self) -> None:
        """Nobody is behind: the consumer only waits for the event loop."""


def _generation(request: ValidRequest, events: Sequence[StreamEvent]) -> Generation:
    end = events[-1].end
    assert end is not None, "a stream ends with its last event or with an error"
    return Generation(
        request=request,
        tokens=tuple(event.token for event in events),
        top_tokens=tuple(event.top_tokens for event in events) if request.top_n_tokens else (),
        tails=tuple(event.tail for event in events),
        end=end,
        prefill=events[0].prefill,
    )
