"""Stop strings, matched on text across token boundaries.

The text is seen as one stream, whatever tokens it came in: the string that is complete first ends
it, and of those complete at the same character the longest. Special tokens are part of the stream
with their literal text, so they can complete a stop string, but they never go out.
"""

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in the text of one sequence.

    With `keep_stop` text goes through at once and ends behind the stop string. Without, it ends
    before, so whatever could still become a stop string is held back.
    """

    __slots__ = ("_held", "_keep_stop", "_num_held", "_progress", "found")

    def __init__(self, stop: Sequence[str], *, keep_stop: bool) -> None:
        self._progress = [_Progress(text) for text in stop if text]
        self._keep_stop = keep_stop
        # What a stop string may begin in, oldest first: a text, and whether it may go out.
        self._held: deque[tuple[str, bool]] = deque()
        self._num_held = 0
        self.found: str | None = None
        """The stop string that is complete."""

    def push(self, text: str, *, is_shown: bool = True) -> tuple[str, bool]:
        """Take new text; returns what may go out now, and whether a stop string is complete."""
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
        num_kept = (
            0 if self._keep_stop else max((each.length for each in self._progress), default=0)
        )
        return self._release(self._num_held - num_kept), False

    def rest(self) -> str:
        """What was held back, once it is known that nothing follows."""
        return "".join(text for text, is_shown in self._held if is_shown)

    def _release(self, count: int) -> str:
        """The oldest `count` characters of what is held, less those that must not go out."""
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

    The table of borders is filled only as far as the text has ever matched: a stop string may be
    as long as a request's body, and building all of its table would stop the event loop.
    """

    __slots__ = ("_borders", "length", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        # At n: the length of the longest text, shorter than n, that stop[:n] begins and ends with.
        self._borders = [0, 0]

    def feed(self, text: str) -> int:
        """Take new text; where in it the stop string is complete, -1 if nowhere."""
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
