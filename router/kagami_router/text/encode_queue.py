"""Runs the encoding of prompts on threads: short texts first, one long text at a time.

Encoding a megabyte takes a second and 300 MB. So only one long text is encoded at once, which
bounds the memory. The other threads are left to short texts, which pass all long ones that wait.
A text is not encoded in pieces: where it may be cut without a change of its tokens is not known
for every tokenizer.
"""

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

LONG_CHARACTERS = 65_536
# A text counts as if it had come so much later, some ten times what it costs: the order is
# shortest first among those that come together, and nobody waits for ever.
_DELAY_S = 2e-6  # for each character

T = TypeVar("T")


@dataclass(slots=True, order=True)
class _Turn:
    """A text that waits; ordered by when it is due."""

    due: float
    number: int
    is_long: bool = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)


class EncodeQueue:
    """Hands out the threads of an executor. Used from one event loop."""

    def __init__(self, threads: Executor, num_threads: int) -> None:
        self._threads = threads
        self._num_free = num_threads
        self._is_long_running = False
        self._short: list[_Turn] = []
        self._long: list[_Turn] = []
        self._numbers = count()

    async def run(self, num_characters: int, work: Callable[[], T]) -> T:
        """The result of `work` on a thread, in its turn. Raises what it raises.

        A caller that is cancelled leaves the queue. Work that runs keeps its thread to the end.
        """
        loop = asyncio.get_running_loop()
        is_long = num_characters > LONG_CHARACTERS
        due = loop.time() + num_characters * _DELAY_S
        turn = _Turn(due, next(self._numbers), is_long, loop.create_future())
        heapq.heappush(self._long if is_long else self._short, turn)
        self._grant()
        try:
            await turn.granted
        except asyncio.CancelledError:
            if turn.granted.done() and not turn.granted.cancelled():
                self._give_back(turn)
            raise
        job = loop.run_in_executor(self._threads, work)
        job.add_done_callback(lambda _: self._give_back(turn))
        return await asyncio.shield(job)

    def _grant(self) -> None:
        while self._num_free and (turn := self._next()) is not None:
            self._num_free -= 1
            self._is_long_running |= turn.is_long
            turn.granted.set_result(None)

    def _next(self) -> _Turn | None:
        """Takes the next one that may run from its queue."""
        for queue in (self._short, self._long):
            while queue and queue[0].granted.done():  # cancelled
                heapq.heappop(queue)
        allowed = [self._short, [] if self._is_long_running else self._long]
        best = min((queue for queue in allowed if queue), default=None, key=lambda each: each[0])
        return None if best is None else heapq.heappop(best)

    def _give_back(self, turn: _Turn) -> None:
        self._num_free += 1
        if turn.is_long:
            self._is_long_running = False
        self._grant()
