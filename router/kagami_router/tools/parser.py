"""Splits the tokens of an answer into text and tool calls while they arrive.

Text that could still become a marker is held back; nothing is lost. With a grammar, arguments are
sent as they arrive. Without a grammar a call is held back until it is complete, because a malformed
call is sent as text. A call that was made before in the same answer ends the answer: small models
that have to call repeat themselves until a limit.
"""

import enum
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kagami_router.request.values import Token
from kagami_router.tools.call_arguments import ArgumentReader, NotArguments
from kagami_router.tools.call_patterns import Pattern, patterns_of
from kagami_router.tools.deltas import (
    CallArguments,
    CallStart,
    Delta,
    TextDelta,
    merged,
    new_call_id,
    overlap,
)
from kagami_router.tools.formats import ToolFormat
from kagami_router.tools.offers import AllowedCalls


class State(enum.Enum):
    """What the parser reads next. `_RULES` lists what each state does and allows.

        START ──► TEXT ──► HEAD ──► ARGUMENTS ──► FOOT ──► CLOSE ──► AFTER ──► TEXT
          └──────────────► HEAD ◄─────────────────────────── CLOSE (the next call of a list)

    From HEAD, ARGUMENTS and FOOT it returns to TEXT if the text is not a call. A call that was made
    before leads from FOOT to OVER.
    """

    START = enum.auto()
    """No text was read; calls without an opener can only begin here"""
    TEXT = enum.auto()
    HEAD = enum.auto()
    """An opener was read: the name of a function follows"""
    ARGUMENTS = enum.auto()
    FOOT = enum.auto()
    """The text after the arguments in this form"""
    CLOSE = enum.auto()
    """After a call: its closer, or the next call of a list"""
    AFTER = enum.auto()
    """After a closer: white space"""
    OVER = enum.auto()
    """A call was made before, in the same answer: nothing more is read"""


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
        self._first_head, self._next_head, self._foot_pattern = patterns_of(self._form)
        self._tools = {tool.name: tool for tool in calls.tools}
        self._max_calls = calls.max_calls
        self._is_constrained = is_constrained
        self._new_id = new_id
        self._state = State.TEXT if self._form.opener else State.START
        self._head_pattern = self._first_head
        self._buffer = ""
        self._before = ""  # the opener of the current call; it is text if this is not a call
        self._raw = ""  # the part of the current call that was taken from the buffer
        self._held: list[Delta] = []  # deltas of the current call that were not given out
        self._name = ""  # of the current call
        self._index = 0
        self._written = ""  # its arguments until now
        self._rivals: list[str] = []  # arguments of earlier calls that it may be the same as
        self._done: list[tuple[str, str]] = []  # name and arguments of each call before
        self._reader: ArgumentReader | None = None
        self._is_blank = True  # nothing but white space came before
        self._out: list[Delta] = []
        self.num_calls = 0
        self.num_reasoning_tokens = 0
        self.is_over = False

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """The deltas of one token; `tail` is the text that the token released."""
        if not token.special:
            return self.push_text(token.text + tail)
        deltas = self.push_text(tail)
        if token.text in self._special:
            deltas += self._push_marker(token.text)
        return deltas

    def push_text(self, text: str) -> list[Delta]:
        """The deltas of more text."""
        self._buffer += text
        return self._run()

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """The deltas that were held back. `is_cut`: a limit was reached, a partial call counts."""
        deltas: list[Delta] = []
        while _RULES[self._state].is_in_call:
            self._settle(is_cut)
            deltas += self._run()
        # After calls only white space is left, or the beginning of a next call; both are dropped.
        is_next = self._state is State.AFTER and (self._is_constrained or not self._buffer.strip())
        if self._state is State.CLOSE or is_next:
            self._buffer = ""
        self._put_text(self._buffer)
        self._buffer = ""
        return merged(deltas + self._take())

    def _settle(self, is_cut: bool) -> None:
        """End a call that is incomplete when no more text comes."""
        if self._state is State.HEAD:
            is_call = self._is_constrained and self.num_calls > 0  # the beginning of a further call
        else:
            is_call = self._is_constrained or is_cut
        if not is_call:
            self._fail()
            return
        if not self._rivals:  # else it is the beginning of a call that was made before
            self._release()
        self._held = []
        self._buffer = ""
        self._state = State.AFTER

    def _push_marker(self, marker: str) -> list[Delta]:
        """The deltas of a marker that is a special token; the output's text does not have it."""
        opens = marker in (self._form.opener, self._form.prelude)
        if not opens:
            return self.push_text(marker)
        if not _RULES[self._state].may_open or self.num_calls >= self._max_calls:
            return []
        if self._state is State.TEXT and not self._is_blank:
            self._put_text(self._buffer)
            self._buffer = ""
        before, self._buffer = self._buffer, ""
        self._open(before)
        return self._run()

    def _run(self) -> list[Delta]:
        while _RULES[self._state].read(self):
            pass
        return self._take()

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return merged(out)

    # One method for each state: it takes what it can from the buffer. False = it needs more text.

    def _start(self) -> bool:
        """Calls without an opener can only begin here."""
        if not self._first_head.could_match(self._buffer):
            self._state = State.TEXT
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
        end = len(self._buffer) - (overlap(self._buffer, opener) if is_searched else 0)
        if not self._is_blank or self._buffer[:end].strip():
            self._put_text(self._buffer[:end])
            self._buffer = self._buffer[end:]
        return False

    def _head(self) -> bool:
        end = self._head_pattern.end_in(self._buffer)
        if end is not None:
            name = self._head_pattern.name_in(self._buffer)
            if name not in self._tools:
                return self._fail()
            self._name = name
            self._consume(end)
            self._reader = self._form.style.reader(self._tools[name])
            self._index, self._written = self.num_calls, ""
            self._rivals = [written for called, written in self._done if called == name]
            self._put_call(CallStart(self._index, self._new_id(), name))
            self._state = State.ARGUMENTS
            return True
        return self._fail() if not self._head_pattern.could_match(self._buffer) else False

    def _arguments(self) -> bool:
        if not self._buffer or self._reader is None:
            return False
        try:
            piece = self._reader.feed(self._buffer)
        except NotArguments:
            return self._fail()
        self._consume(piece.length)
        if piece.json:
            self._written += piece.json
            self._rivals = [one for one in self._rivals if one.startswith(self._written)]
            self._put_call(CallArguments(self._index, piece.json))
        if self._reader.is_over:
            self._state = State.FOOT
        return self._reader.is_over

    def _foot(self) -> bool:
        end = self._foot_pattern.end_in(self._buffer)
        if end is None:
            return self._fail() if not self._foot_pattern.could_match(self._buffer) else False
        if not self._is_constrained and not _is_json(self._written):
            return self._fail()
        self._consume(end)
        if self._written in self._rivals:
            self._held, self._state, self.is_over = [], State.OVER, True
            return True
        self._release()
        self._done.append((self._name, self._written))
        self._state = State.CLOSE
        return True

    def _close(self) -> bool:
        """Reads a closer, or the next call of a list. Models forget closers: none is required."""
        may_follow = self._form.is_list and self.num_calls < self._max_calls
        if may_follow and self._next_head.could_match(self._buffer):
            if self._next_head.end_in(self._buffer) is None:
                return False
            self._open("", self._next_head)
            return True
        rest, closer = self._buffer.lstrip(), self._form.closer.strip()
        if closer and not rest.startswith(closer) and closer.startswith(rest):
            return False
        if closer and rest.startswith(closer):
            self._buffer = rest.removeprefix(closer)
        self._state = State.AFTER
        return True

    def _after(self) -> bool:
        """Only white space belongs between two calls."""
        rest = self._buffer.lstrip()
        opener = self._form.opener
        is_searched = bool(opener) and opener not in self._special
        if not rest or (is_searched and rest != opener and opener.startswith(rest)):
            return False
        self._is_blank = is_searched and rest.startswith(opener)
        self._state = State.TEXT
        return True

    def _over(self) -> bool:
        """Drops all that follows."""
        self._buffer = ""
        return False

    def _open(self, before: str, head: "Pattern | None" = None) -> None:
        self._before, self._raw = before, ""
        self._head_pattern = head or self._first_head
        self._state = State.HEAD

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
        """Add to the current call; it goes out while it grows if it is certain to be a new call."""
        self._held.append(delta)
        if self._is_constrained and not self._rivals:
            self._release()

    def _release(self) -> None:
        self.num_calls += sum(isinstance(delta, CallStart) for delta in self._held)
        self._out += self._held
        self._held = []

    def _fail(self) -> bool:
        """Treat the beginning of a call as text: it is not a call."""
        self._held = []
        self._put_text(self._before)
        self._buffer = self._raw + self._buffer
        self._state = State.TEXT
        return True


class _Rule(NamedTuple):
    """What a state reads, and what it allows."""

    read: Callable[[CallParser], bool]
    is_in_call: bool = False
    """A call has begun and has not ended"""
    may_open: bool = False
    """A marker may open a call"""


_RULES: Mapping[State, _Rule] = {
    State.START: _Rule(CallParser._start, may_open=True),
    State.TEXT: _Rule(CallParser._text, may_open=True),
    State.HEAD: _Rule(CallParser._head, is_in_call=True),
    State.ARGUMENTS: _Rule(CallParser._arguments, is_in_call=True),
    State.FOOT: _Rule(CallParser._foot, is_in_call=True),
    State.CLOSE: _Rule(CallParser._close),
    State.AFTER: _Rule(CallParser._after, may_open=True),
    State.OVER: _Rule(CallParser._over),
}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
