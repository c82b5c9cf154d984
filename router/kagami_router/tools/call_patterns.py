"""Recognizes the beginning and the end of a tool call in text that is still incomplete."""

import re
from collections.abc import Iterable

from kagami_router.tools.formats import ToolForm
from kagami_router.tools.offers import NAME

# Without a grammar, white space is unbounded. A text longer than this, in characters, is no head.
_MAX_HEAD = 512


class ObjectScan:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_text = False
        self._is_escaped = False

    @property
    def is_over(self) -> bool:
        """Whether the object has ended; valid after the first character."""
        return self._depth == 0

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = self._is_in_text
            elif character == '"':
                self._is_in_text = not self._is_in_text
            elif not self._is_in_text and character in "{[":
                self._depth += 1
            elif not self._is_in_text and character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return len(text)


class Pattern:
    """A form's text with any white space that JSON allows; also matches its beginnings."""

    def __init__(self, units: Iterable[str], behind: str = "") -> None:
        units = list(units)
        beginning = ""
        for unit in reversed(units):
            beginning = f"(?:{unit}{beginning})?"
        self._whole = re.compile("".join(units) + behind)
        self._beginning = re.compile(beginning)

    def end_in(self, text: str) -> int | None:
        """The index where the pattern ends, or None if `text` does not begin with it."""
        match = self._whole.match(text)
        return None if match is None else match.end()

    def name_in(self, text: str) -> str:
        """The function's name in a text that begins with the pattern, else ""."""
        match = self._whole.match(text)
        return "" if match is None else match["name"]

    def could_match(self, text: str) -> bool:
        """Whether `text` or a continuation of it begins with the pattern."""
        return len(text) <= _MAX_HEAD and (
            self._whole.match(text) is not None or self._beginning.fullmatch(text) is not None
        )


def patterns_of(form: ToolForm) -> tuple[Pattern, Pattern, Pattern]:
    """The head of the first call, the head of a further call in a list, and the foot."""
    space = r"\s*"
    head = [*_units(form.before), f"(?P<name>{NAME})", *_units(form.after)]
    object_follows = r"(?=\{)"
    return (
        Pattern(
            [*_units(form.lead), *([] if form.lead.isspace() else [space]), *head], object_follows
        ),
        Pattern([space, *head], object_follows),
        Pattern([space, *_units(form.foot)] if form.foot else []),
    )


def _units(text: str) -> list[str]:
    """Regex parts of a form's text; white space is optional where JSON allows it."""
    units: list[str] = []
    for character in text:
        if character.isspace() or character in "{,:[":
            parts = [r"\s*", re.escape(character), r"\s*"] if not character.isspace() else [r"\s*"]
        else:
            parts = [re.escape(character)]
        for part in parts:
            if part != r"\s*" or units[-1:] != [part]:
                units.append(part)
    return units


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
