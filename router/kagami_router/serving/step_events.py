"""A stream of turns that can hand them over at once, beside being iterated.

A turn is all that one step brought for one request. Iterated, it costs the waking of a task and
of all that wait for each other in it. Diverted, the batching loop calls a sink for each request of
a step, in one pass; the iterator then brings only what the sink refused, in order, and the end or
the error.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

_Turn = TypeVar("_Turn")
_Turn_co = TypeVar("_Turn_co", covariant=True)

Sink = Callable[[_Turn], bool]
"""Takes a turn, or returns False because it cannot just now; never waits."""


@runtime_checkable
class Divertible(Protocol[_Turn_co]):
    """A stream whose turns can be handed over."""

    def divert(self, sink: Sink[_Turn_co]) -> None:
        """Call `sink` with each turn from now on; what it raises ends the iterator."""
