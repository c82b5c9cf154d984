"""How long a connection may stand still: what it waits for, and how many ticks it has waited.

Time is counted in ticks of one timer of the server. A tick that comes late counts once: time in
which this process did not run (stopped, or the machine asleep) is nobody's fault.

```
  first byte ─► head ─────► body ─────► handler ─────► answer ─────► next head …
      └ HEAD, HEAD ┘└─ BODY ─┘└─ no limit ─┘└─ ANSWER ──┘└─ IDLE ─┘
```
"""

from dataclasses import dataclass
from enum import Enum, auto

# What moves more slowly stands still: a byte now and then must not hold memory or a permit.
MIN_RATE = 500
"""Bytes in a second, on average over the time that is given"""
_TICK_S = 1.0
_TICKS_IN_A_LIMIT = 8


class Wait(Enum):
    """What a connection waits for."""

    HEAD = auto()
    """The head of a message that has begun, or of the first message"""
    BODY = auto()
    """The rest of a body that a handler wants"""
    HANDLER = auto()
    """This server"""
    ANSWER = auto()
    """The client, which has to take what was written"""
    IDLE = auto()
    """Another request"""


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Seconds that a client may take; the defaults are those of the flags."""

    head_s: float = 10.0
    """From the first byte of a message to the end of its head"""
    body_s: float = 30.0
    """For a body to come by `MIN_RATE`, again and again"""
    idle_s: float = 75.0
    """Between an answer and the next message; the proxies in front usually give up after 60 s"""
    answer_s: float = 60.0
    """For a client to take its answer by `MIN_RATE`, again and again"""

    @property
    def tick_s(self) -> float:
        """Seconds between two looks at a connection."""
        shortest = min(self.head_s, self.body_s, self.idle_s, self.answer_s)
        return min(_TICK_S, shortest / _TICKS_IN_A_LIMIT)

    def of(self, wait: Wait) -> float | None:
        """The limit of this wait; None = there is none."""
        return {
            Wait.HEAD: self.head_s,
            Wait.BODY: self.body_s,
            Wait.ANSWER: self.answer_s,
            Wait.IDLE: self.idle_s,
        }.get(wait)


class Patience:
    """Counts how long one connection has waited for one thing without progress."""

    __slots__ = ("_limits", "_mark", "_num_ticks", "_wait")

    def __init__(self, limits: TimeLimits) -> None:
        self._limits = limits
        self._wait: tuple[Wait, int] | None = None
        self._num_ticks = 0
        """Since the last progress"""
        self._mark = 0
        """Bytes at the last progress"""

    def is_over(self, wait: Wait, number: int, num_bytes: int) -> bool:
        """Whether it has waited too long; called once in a tick.

        `number` is the request's on its connection: a second one begins anew. `num_bytes` counts
        what has come or gone until now.
        """
        limit_s = self._limits.of(wait)
        if limit_s is None:
            self._wait = None
            return False
        if (wait, number) != self._wait or num_bytes - self._mark >= MIN_RATE * limit_s:
            self._wait, self._mark, self._num_ticks = (wait, number), num_bytes, 0
            return False
        self._num_ticks += 1
        return self._num_ticks * self._limits.tick_s >= limit_s
