"""Regular expressions over module names, matched in time linear in the name's length.

An adapter's file brings them, so backtracking would be a way to run without end. Understood is what
such patterns are made of: names, `.`, `\\d`, `[…]`, groups, `|`, and `* + ? {m,n}` on what holds no
repetition itself. Anything else is refused.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from kagami_launcher.convert.files import ConversionRefused, shown

_MAX_PATTERN = 1000
_MAX_EXPRESSIONS = 1000  # beside patterns that are names
_MAX_NAME = 1000
_MAX_REPEATS = 1000
_MAX_DEPTH = 20
# Some seconds. A hundred patterns over a thousand modules take half of them.
_MAX_STEPS = 10_000_000
# A module's name as most adapters have it; its dots are taken as dots.
_NAME = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[dwDWsS]|\\[^a-zA-Z0-9]|[^\\()|*+?{}\[\]^$]")
_REPEAT = re.compile(r"(\*|\+|\?|\{(\d{1,4})?(,(\d{1,4})?)?\})")

# Sets of positions in a name are the bits of a number.
_Ends = Callable[["_Name", int], int]


class ModulePatterns:
    """Patterns in their order, each with a value; the first that matches a module counts.

    A pattern has to match the whole name, or what follows one of its dots.
    """

    def __init__(self, patterns: Mapping[str, Any], where: str) -> None:
        self._values = list(patterns.values())
        self._names: dict[str, int] = {}
        self._from_start: dict[str, int] = {}
        self._expressions: list[tuple[int, _Ends]] = []
        self._meter = _Meter(where)
        for number, pattern in enumerate(patterns):
            if found := _NAME.fullmatch(pattern):
                names = self._from_start if pattern.startswith("^") else self._names
                names.setdefault(found[1].replace("\\", ""), number)
            else:
                self._expressions.append((number, _Parser(pattern, where).whole()))
            if len(self._expressions) > _MAX_EXPRESSIONS:
                raise ConversionRefused(f"{where}: more than {_MAX_EXPRESSIONS} expressions")

    def value(self, module: str, default: Any) -> Any:
        """Of the first pattern that matches; raises `ConversionRefused` if that takes too long."""
        if len(module) > _MAX_NAME:
            raise ConversionRefused(
                f"{shown(module)} has {len(module)} characters, the limit is {_MAX_NAME}"
            )
        starts = [0, *(place + 1 for place, letter in enumerate(module) if letter == ".")]
        self._meter.add(len(starts))
        found = [self._names[module[at:]] for at in starts if module[at:] in self._names]
        if module in self._from_start:
            found.append(self._from_start[module])
        first = min(found, default=len(self._values))
        name = _Name(module, self._meter)
        begin = sum(1 << at for at in starts)
        for number, ends in self._expressions:
            if number > first:
                break
            if ends(name, begin) >> len(module) & 1:
                first = number
                break
        return self._values[first] if first < len(self._values) else default


class _Meter:
    def __init__(self, where: str) -> None:
        self._where, self._left = where, _MAX_STEPS

    def add(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise ConversionRefused(
                f"{self._where}: matching its patterns takes more than {_MAX_STEPS} steps"
            )


class _Name:
    """A module's name: where in it letters of a class are."""

    def __init__(self, text: str, meter: _Meter) -> None:
        self.text, self.meter = text, meter
        self._places: dict[re.Pattern[str], int] = {}

    def places(self, letter: re.Pattern[str]) -> int:
        self.meter.add(1)
        if letter not in self._places:
            self.meter.add(len(self.text))
            self._places[letter] = sum(
                1 << at for at, char in enumerate(self.text) if letter.match(char)
            )
        return self._places[letter]


class _Parser:
    """Reads a pattern into functions that take where a match may begin to where it may end."""

    def __init__(self, pattern: str, where: str) -> None:
        self._pattern, self._where, self._at = pattern, where, 0
        if len(pattern) > _MAX_PATTERN:
            self._refuse(f"it has {len(pattern)} characters, the limit is {_MAX_PATTERN}")

    def whole(self) -> _Ends:
        ends, _ = self._alternatives(0)
        if self._at < len(self._pattern):
            self._refuse(f"`{self._pattern[self._at]}` at {self._at}")
        return ends

    def _refuse(self, reason: str) -> NoReturn:
        raise ConversionRefused(
            f"{self._where}: the pattern {shown(self._pattern)} is not supported: {reason}"
        )

    def _alternatives(self, depth: int) -> tuple[_Ends, bool]:
        if depth > _MAX_DEPTH:
            self._refuse(f"more than {_MAX_DEPTH} groups in one another")
        parts = [self._sequence(depth)]
        while self._take("|"):
            parts.append(self._sequence(depth))
        branches = [ends for ends, _ in parts]

        def either(name: _Name, starts: int) -> int:
            found = 0
            for ends in branches:
                found |= ends(name, starts)
            return found

        return (
            either if len(branches) > 1 else branches[0],
            any(repeats for _, repeats in parts),
        )

    def _sequence(self, depth: int) -> tuple[_Ends, bool]:
        parts: list[_Ends] = []
        has_repeats = False
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            ends, repeats = self._item(depth)
            parts.append(ends)
            has_repeats |= repeats

        def all_of(name: _Name, starts: int) -> int:
            name.meter.add(1 + len(parts))
            for ends in parts:
                starts = ends(name, starts)
            return starts

        return all_of, has_repeats

    def _item(self, depth: int) -> tuple[_Ends, bool]:
        if self._take("^"):
            return lambda name, starts: starts & 1, False
        if self._take("$"):
            return lambda name, starts: starts & (1 << len(name.text)), False
        has_repeats = False
        if self._take("("):
            if self._take("?") and not self._take(":"):
                self._refuse("a group `(?` that is not `(?:`")
            ends, has_repeats = self._alternatives(depth + 1)
            if not self._take(")"):
                self._refuse("a group without `)`")
        else:
            ends = self._letter()
        if not (found := _REPEAT.match(self._pattern, self._at)):
            return ends, has_repeats
        if has_repeats:
            self._refuse("a repetition in a repetition")
        self._at = found.end()
        self._take("?")  # of what is found first: only whether something is found counts
        return self._repeated(ends, found), True

    def _letter(self) -> _Ends:
        found = _CLASS.match(self._pattern, self._at)
        try:
            letter = re.compile(found[0] if found else "(")
        except re.error:
            self._refuse(f"`{self._pattern[self._at : self._at + 20]}` at {self._at}")
        self._at += len(letter.pattern)
        return lambda name, starts: (starts & name.places(letter)) << 1

    def _repeated(self, ends: _Ends, found: re.Match[str]) -> _Ends:
        sign, low, comma, high = found.groups()
        if sign[0] != "{":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        else:
            least = int(low or 0)
            most = int(high) if high else None if comma else least
            if (low is None and high is None) or max(least, most or 0) > _MAX_REPEATS:
                self._refuse(f"the repetition {sign}")

        def repeated(name: _Name, starts: int) -> int:
            count = 0
            while starts and count < least:
                starts = ends(name, starts)
                count += 1
            reached = front = starts
            while front and (most is None or count < most):
                front = ends(name, front) & ~reached
                reached |= front
                count += 1
            return reached

        return repeated

    def _take(self, sign: str) -> bool:
        is_next = self._pattern.startswith(sign, self._at)
        self._at += is_next
        return is_next
