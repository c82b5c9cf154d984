"""Tokens to text and calls, as they come.

What could still become a marker is held back; nothing is lost. Where the grammar held the model to
its tools, arguments go out as they grow. Without a grammar a call is kept until it is whole: one
that is malformed turns out to be text.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kagami_router.request.values import Token
from kagami_router.tools.formats import PYTHON_TAG, ToolForm, ToolFormat
from kagami_router.tools.offers import NAME, AllowedCalls

# White space is unbounded where no grammar holds it: a longer head is no head.
_MAX_HEAD = 512


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `index` counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: pieces of one JSON text."""

    index: int
    text: str


Delta = TextDelta | CallStart | CallArguments


def new_call_id() -> str:
    """Unique among all calls of all answers."""
    return f"call_{secrets.token_hex(12)}"


class TextOnly:
    """The parser of an answer that makes no calls."""

    num_calls = 0

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """The text that this token shows."""
        text = tail if token.special else token.text + tail
        return [TextDelta(text)] if text else []

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """Nothing is ever held back."""
        return []


class CallParser:
    """Reads one answer. `push` every token, then `finish`."""

    def __init__(
        self,
        tool_format: ToolFormat,
        calls: AllowedCalls,
        *,
        is_constrained: bool,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._form = tool_format.form
        self._special = tool_format.special_markers
        self._first_head, self._next_head, self._foot_pattern = _patterns(self._form)
        self._names = frozenset(tool.name for tool in calls.tools)
        self._max_calls = calls.max_calls
        self._is_constrained = is_constrained
        self._new_id = new_id
        self._state: Callable[[], bool] = self._text if self._form.opener else self._start
        self._head_pattern = self._first_head
        self._buffer = ""
        self._before = ""  # the call that is being read: what is text too if that is none
        self._raw = ""  # of that call: what was taken from the buffer
        self._held: list[Delta] = []  # of that call, until it is known to be one
        self._scan = _ObjectScan()
        self._is_blank = True  # nothing but white space came before
        self._out: list[Delta] = []
        self.num_calls = 0

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """What this token and the text it freed add."""
        if not token.special:
            return self.push_text(token.text + tail)
        deltas = self.push_text(tail)
        if token.text in self._special:
            deltas += self._push_marker(token.text)
        return deltas

    def push_text(self, text: str) -> list[Delta]:
        """What this text adds."""
        self._buffer += text
        return self._run()

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """What was held back, at the end; a call cut by a limit counts as far as it goes."""
        deltas: list[Delta] = []
        while self._state in (self._head, self._arguments, self._foot):
            self._settle(is_cut)
            deltas += self._run()
        # Behind calls nothing is left but white space, or what the next one was to begin with.
        is_next = self._state == self._after and (self._is_constrained or not self._buffer.strip())
        if self._state == self._close or is_next:
            self._buffer = ""
        self._put_text(self._buffer)
        self._buffer = ""
        return _merged(deltas + self._take())

    def _settle(self, is_cut: bool) -> None:
        """No more text comes, and a call is not over."""
        if self._state == self._head:
            is_call = self._is_constrained and self.num_calls > 0  # its first characters
        else:
            is_call = self._is_constrained or is_cut
        if not is_call:
            self._fail()
            return
        self._release_call()
        self._buffer = ""
        self._state = self._after

    def _push_marker(self, marker: str) -> list[Delta]:
        """A special token: the text it stands for is no part of the output."""
        opens = marker in (self._form.opener, PYTHON_TAG)
        if not opens:
            return self.push_text(marker)
        may_open = self._state in (self._start, self._text, self._after)
        if not may_open or self.num_calls >= self._max_calls:
            return []
        if self._state == self._text and not self._is_blank:
            self._put_text(self._buffer)
            self._buffer = ""
        before, self._buffer = self._buffer, ""
        self._open(before)
        return self._run()

    def _run(self) -> list[Delta]:
        while self._state():
            pass
        return self._take()

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return _merged(out)

    # States. Each takes what it can from the buffer; False = it needs more.

    def _start(self) -> bool:
        """Calls without an opener can only begin here."""
        if not self._first_head.could_match(self._buffer):
            self._state = self._text
            return True
        if self._first_head.end_in(self._buffer) is None:
            return False
        self._open("")
        return True

    def _text(self) -> bool:
        opener = self._form.opener
        is_searched = bool(opener) and opener not in self._special
        at = self._buffer.find(opener) if is_searched else -1
        if at >= 0 and self.num_calls < self._max_calls:
            begin = 0 if self._is_blank and not self._buffer[:at].strip() else at
            self._put_text(self._buffer[:begin])
            before, self._buffer = self._buffer[begin : at + len(opener)], self._buffer[at:]
            self._buffer = self._buffer.removeprefix(opener)
            self._open(before)
            return True
        end = len(self._buffer) - (_overlap(self._buffer, opener) if is_searched else 0)
        if not self._is_blank or self._buffer[:end].strip():
            self._put_text(self._buffer[:end])
            self._buffer = self._buffer[end:]
        return False

    def _head(self) -> bool:
        end = self._head_pattern.end_in(self._buffer)
        if end is not None:
            name = self._head_pattern.name_in(self._buffer)
            if name not in self._names:
                return self._fail()
            self._consume(end)
            self._scan = _ObjectScan()
            self._put_call(CallStart(self.num_calls, self._new_id(), name))
            self._state = self._arguments
            return True
        return self._fail() if not self._head_pattern.could_match(self._buffer) else False

    def _arguments(self) -> bool:
        if not self._buffer:
            return False
        piece = self._consume(self._scan.feed(self._buffer))
        index = self.num_calls - 1 if self._is_constrained else self.num_calls
        self._put_call(CallArguments(index, piece))
        if self._scan.is_over:
            self._state = self._foot
        return self._scan.is_over

    def _foot(self) -> bool:
        end = self._foot_pattern.end_in(self._buffer)
        if end is None:
            return self._fail() if not self._foot_pattern.could_match(self._buffer) else False
        if not self._is_constrained and not _is_json(self._held):
            return self._fail()
        self._consume(end)
        self._release_call()
        self._state = self._close
        return True

    def _close(self) -> bool:
        """Behind a call: its closer, or in a list the next one. Models forget closers."""
        rest = self._buffer.lstrip()
        closer, between = self._form.closer.strip(), self._form.between.strip()
        may_follow = self._form.is_list and self.num_calls < self._max_calls
        if may_follow and rest.startswith(between):
            rest = rest.removeprefix(between)
            before, self._buffer = self._buffer[: len(self._buffer) - len(rest)], rest
            self._open(before, self._next_head)
            return True
        if closer and not rest.startswith(closer) and closer.startswith(rest):
            return False
        if closer and rest.startswith(closer):
            self._buffer = rest.removeprefix(closer)
        self._state = self._after
        return True

    def _after(self) -> bool:
        """Only white space belongs between two calls."""
        rest = self._buffer.lstrip()
        opener = self._form.opener
        is_searched = bool(opener) and opener not in self._special
        if not rest or (is_searched and rest != opener and opener.startswith(rest)):
            return False
        self._is_blank = is_searched and rest.startswith(opener)
        self._state = self._text
        return True

    def _open(self, before: str, head: "_Pattern | None" = None) -> None:
        self._before, self._raw = before, ""
        self._head_pattern = head or self._first_head
        self._state = self._head

    def _consume(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if not self._is_constrained:
            self._raw += text
        return text

    def _put_text(self, text: str) -> None:
        if text:
            self._out.append(TextDelta(text))
            self._is_blank = False

    def _put_call(self, delta: Delta) -> None:
        if not self._is_constrained:
            self._held.append(delta)
            return
        self._out.append(delta)
        if isinstance(delta, CallStart):
            self.num_calls += 1

    def _release_call(self) -> None:
        if self._held:
            self._out += self._held
            self._held = []
            self.num_calls += 1

    def _fail(self) -> bool:
        """What began as a call is text."""
        self._held = []
        self._put_text(self._before)
        self._buffer = self._raw + self._buffer
        self._state = self._text
        return True


class _ObjectScan:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_text = False
        self._is_escaped = False

    @property
    def is_over(self) -> bool:
        """Asked after the first character."""
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


class _Pattern:
    """A form's text with any white space JSON allows; knows what its beginnings look like."""

    def __init__(self, units: Iterable[str], behind: str = "") -> None:
        units = list(units)
        beginning = ""
        for unit in reversed(units):
            beginning = f"(?:{unit}{beginning})?"
        self._whole = re.compile("".join(units) + behind)
        self._beginning = re.compile(beginning)

    def end_in(self, text: str) -> int | None:
        """Where the pattern ends in a text that begins with it."""
        match = self._whole.match(text)
        return None if match is None else match.end()

    def name_in(self, text: str) -> str:
        """The function's name in such a text."""
        match = self._whole.match(text)
        return "" if match is None else match["name"]

    def could_match(self, text: str) -> bool:
        """Whether some continuation of `text` begins with the pattern, and soon."""
        return len(text) <= _MAX_HEAD and (
            self._whole.match(text) is not None or self._beginning.fullmatch(text) is not None
        )


def _patterns(form: ToolForm) -> tuple[_Pattern, _Pattern, _Pattern]:
    """The head of a first call, of the next in a list, and the foot."""
    space = r"\s*"
    head = [*_units(form.before), f"(?P<name>{NAME})", *_units(form.after)]
    object_follows = r"(?=\{)"
    return (
        _Pattern(
            [*_units(form.lead), *([] if form.lead.isspace() else [space]), *head], object_follows
        ),
        _Pattern([space, *head], object_follows),
        _Pattern([space, *_units(form.foot)] if form.foot else []),
    )


def _units(text: str) -> list[str]:
    """A form's text, white space optional where JSON has some."""
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


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


def _is_json(call: Iterable[Delta]) -> bool:
    text = "".join(delta.text for delta in call if isinstance(delta, CallArguments))
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbouring pieces put together."""
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        match last, delta:
            case TextDelta(before), TextDelta(more):
                merged[-1] = TextDelta(before + more)
            case CallArguments(index, before), CallArguments(same, more) if index == same:
                merged[-1] = CallArguments(index, before + more)
            case _:
                merged.append(delta)
    return merged
