"""Matches stop strings in text, across token boundaries.

The text is one stream; token boundaries do not matter. The stop string that is complete first ends
it. If several are complete at the same character, the longest counts. Special tokens are part of
the stream with their literal text, so they can complete a stop string, but they are never sent.
"""

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in the text of one sequence.

    With `keep_stop` the text is released at once and ends after the stop string. Without it the
    text ends before the stop string, so text that could still become one is held back.
    """

    __slots__ = ("_held", "_keep_stop", "_num_held", "_progress", "found")

    def __init__(self, stop: Sequence[str], *, keep_stop: bool) -> None:
        self._progress = [_Progress(text) for text in stop if text]
        self._keep_stop = keep_stop
        # Text that is held back, oldest first: (text, whether it may be sent).
        self._held: deque[tuple[str, bool]] = deque()
        self._num_held = 0
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str, *, is_shown: bool = True) -> tuple[str, bool]:
        """Add text; returns the text to send now, and whether a stop string is complete."""
        num_before = self._num_held
        self._held.append((text, is_shown))
        self._num_held += len(text)
        complete = [
            (end, -len(each.stop), each.stop)
            for each in self._progress
            if (end := each.feed(text)) >= 0
        ]
        if complete:
            end, minus_length, self.found = min(complete)
            out = self._release(num_before + end + (0 if self._keep_stop else minus_length))
            self._held.clear()
            return out, True
        num_held = (
            0 if self._keep_stop else max((each.length for each in self._progress), default=0)
        )
        return self._release(self._num_held - num_held), False

    def rest(self) -> str:
        """The text that was held back; call it when no more text follows."""
        return "".join(text for text, is_shown in self._held if is_shown)

    def _release(self, count: int) -> str:
        """Release the oldest `count` characters; returns those of them that may be sent."""
        self._num_held -= count
        out = []
        while self._held and count >= len(self._held[0][0]):
            text, is_shown = self._held.popleft()
            count -= len(text)
            if is_shown:
                out.append(text)
        if count:
            text, is_shown = self._held[0]
            self._held[0] = (text[count:], is_shown)
            if is_shown:
                out.append(text[:count])
        return "".join(out)


class _Progress:
    """How much of one stop string the text ends with (Knuth, Morris, Pratt 1977).

    The table of borders is filled only up to the longest match until now. A stop string may be as
    long as a request's body, and building its whole table would block the event loop.
    """

    __slots__ = ("_borders", "length", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        # Entry n: the length of the longest text, shorter than n, that begins and ends stop[:n].
        self._borders = [0, 0]

    def feed(self, text: str) -> int:
        """Add text; returns the index in it after the completed stop string, -1 if none."""
        stop, borders, length = self.stop, self._borders, self.length
        start = 0 if length else text.find(stop[0])
        if start < 0:
            return -1
        for index in range(start, len(text)):
            character = text[index]
            while length and stop[length] != character:
                length = borders[length]
            if stop[length] == character:
                length += 1
                if length == len(stop):
                    return index + 1
                if length == len(borders):
                    borders.append(self._border_of(length))
        self.length = length
        return -1

    def _border_of(self, length: int) -> int:
        """The next entry of the table, from those before it."""
        last = self.stop[length - 1]
        border = self._borders[length - 1]
        while border and self.stop[border] != last:
            border = self._borders[border]
        return border + (self.stop[border] == last)
