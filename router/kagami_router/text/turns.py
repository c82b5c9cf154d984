"""Turns at something that serves one at a time: small ones first, and a share for each caller.

Start-time fair queueing: a turn costs its size, and the caller whose next turn would end first, had
each been served by itself, goes first. Within a caller the smallest goes first. So a small turn
waits for the one that runs and for few others, and a large one is passed by no more than its size.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import NamedTuple

from kagami_proto.errors import Overloaded


class _Waiting(NamedTuple):
    size: int
    number: int
    place: asyncio.Future[None]


class Turns:
    """Hands out turns; `what` names in an error what they are for.

    `max_waiting` turns, and `max_size` of them together, may wait for one caller; eight times as
    many for all. What waits holds its request's memory.
    """

    _CALLERS = 8

    def __init__(self, what: str, *, max_waiting: int, max_size: int) -> None:
        self._what = what
        self._max_waiting = max_waiting
        self._max_size = max_size
        self._numbers = count()
        self._lines: dict[str, list[_Waiting]] = {}
        # Where each caller's last turn ends, in sizes; the present is where the running one began.
        self._ends: dict[str, int] = {}
        self._now = 0
        self._is_taken = False

    @asynccontextmanager
    async def turn(self, caller: str, size: int) -> AsyncIterator[None]:
        """Wait for a turn of `size`, and hold it; raises `Overloaded` where too many wait."""
        await self.take(caller, size)
        try:
            yield
        finally:
            self.pass_on()

    async def take(self, caller: str, size: int) -> None:
        """As `turn`, for who ends it with `pass_on`."""
        if self._is_taken:
            await self._wait(caller, size)
        else:
            self._is_taken = True
            self._begin(caller, size)

    async def _wait(self, caller: str, size: int) -> None:
        self._check_room(caller, size)
        waiting = _Waiting(size, next(self._numbers), asyncio.get_running_loop().create_future())
        if caller not in self._lines:
            self._lines[caller] = []
            self._ends[caller] = max(self._now, self._ends.get(caller, 0))
        heapq.heappush(self._lines[caller], waiting)
        try:
            await waiting.place
        except asyncio.CancelledError:
            self._leave(caller, waiting)
            if not waiting.place.cancelled():
                self.pass_on()  # it was this one's turn already
            raise

    def _check_room(self, caller: str, size: int) -> None:
        own = self._lines.get(caller, ())
        everybody = [waiting for line in self._lines.values() for waiting in line]
        for who, line, times in (("you", own, 1), ("all", everybody, self._CALLERS)):
            total = sum(waiting.size for waiting in line)
            if len(line) >= self._max_waiting * times or (
                line and total + size > self._max_size * times
            ):
                raise Overloaded(
                    f"{len(line)} {self._what} of {who} wait already, {total} bytes;"
                    f" {self._max_waiting * times} and {self._max_size * times} bytes may"
                )

    def pass_on(self) -> None:
        """End a turn; the next begins."""
        while self._lines:
            caller = min(self._lines, key=self._next_end)
            waiting = self._lines[caller][0]
            is_wanted = not waiting.place.cancelled()
            if is_wanted:
                self._begin(caller, waiting.size)
                waiting.place.set_result(None)
            self._leave(caller, waiting)
            if is_wanted:
                return
        self._is_taken = False
        self._ends.clear()
        self._now = 0

    def _next_end(self, caller: str) -> tuple[int, int]:
        first = self._lines[caller][0]
        return self._ends[caller] + first.size, first.number

    def _begin(self, caller: str, size: int) -> None:
        begin = self._ends.get(caller, self._now)
        self._now = max(self._now, begin)
        # Whoever ended in the past begins anew: kept is only who waits or has had a future.
        self._ends = {
            one: end for one, end in self._ends.items() if end > self._now or one in self._lines
        }
        self._ends[caller] = begin + size

    def _leave(self, caller: str, waiting: _Waiting) -> None:
        line = self._lines.get(caller, [])
        if waiting in line:
            line.remove(waiting)
            heapq.heapify(line)
            if not line:
                del self._lines[caller]
