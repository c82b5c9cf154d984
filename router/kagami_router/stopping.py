"""Stop strings, matched on text across token boundaries.

The text is seen as one stream, whatever tokens it came in: the string that is complete first ends
it, and of those complete at the same character the longest.
"""

from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in the text of one sequence.

    With `keep_stop` text goes through at once and ends behind the stop string. Without, it ends
    before, so whatever could still become a stop string is held back.
    """

    __slots__ = ("_first_characters", "_keep_stop", "_longest", "_prefixes", "_seen", "_stop")

    def __init__(self, stop: Sequence[str], *, keep_stop: bool) -> None:
        self._stop = [text for text in stop if text]
        self._keep_stop = keep_stop
        self._longest = max(map(len, self._stop), default=0)
        self._prefixes = {text[:end] for text in self._stop for end in range(1, len(text))}
        self._first_characters = {text[0] for text in self._stop}
        # Text a stop string may begin in: already out with keep_stop, else held back.
        self._seen = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take new text; returns what may go out now, and whether a stop string is complete."""
        num_out = len(self._seen) if self._keep_stop else 0
        buffer = self._seen + text
        match = self._first_match(buffer)
        if match is not None:
            self._seen = ""
            begin, end = match
            return (buffer[num_out:end] if self._keep_stop else buffer[:begin]), True
        start = self._possible_start(buffer)
        self._seen = buffer[start:]
        return (text if self._keep_stop else buffer[:start]), False

    def rest(self) -> str:
        """What was held back, once it is known that nothing follows."""
        held, self._seen = ("" if self._keep_stop else self._seen), ""
        return held

    def _first_match(self, buffer: str) -> tuple[int, int] | None:
        """Begin and end of the stop string that is complete first."""
        found = [
            (begin + len(text), begin) for text in self._stop if (begin := buffer.find(text)) >= 0
        ]
        if not found:
            return None
        end, begin = min(found)
        return begin, end

    def _possible_start(self, buffer: str) -> int:
        """Where the longest suffix begins that a stop string begins with."""
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            if buffer[start] in self._first_characters and buffer[start:] in self._prefixes:
                return start
        return len(buffer)
