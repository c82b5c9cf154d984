"""Reads an answer as the checkpoint's response template says.

Text and thoughts go out while they arrive. A call goes out when it is complete. What the template
calls a call and what is none that the request allows stays text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kagami_router.request.values import Token
from kagami_router.tools.call_arguments import NotArguments, json_text
from kagami_router.tools.casting import cast, properties_of, types_of
from kagami_router.tools.deltas import (
    CallArguments,
    CallStart,
    Delta,
    ReasoningDelta,
    TextDelta,
    merged,
    new_call_id,
)
from kagami_router.tools.offers import AllowedCalls, Tool
from kagami_router.tools.response_template import Delimiter, Field, Found, ResponseTemplate

_TEXT = "content"
_CALLS = "tool_calls"
# Text that was read is dropped from the buffer when it is longer, but for what a pattern may look
# back at, in characters.
_MAX_READ, _KEPT = 4096, 256


class TemplateParser:
    """Reads one answer. `push` every token, then `finish`."""

    def __init__(
        self,
        template: ResponseTemplate,
        prompt: str,
        calls: AllowedCalls | None,
        *,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._template = template
        self._tools = {} if calls is None else {tool.name: tool for tool in calls.tools}
        self._max_calls = 0 if calls is None else calls.max_calls
        self._new_id = new_id
        self._buffer = ""
        self._at = 0  # what stands before was read
        self._field = template.rest
        self._captures: Mapping[str, str] = {}
        self._body = ""  # of a region that is read at its end
        self._raw = ""  # the same with its delimiters
        self._is_blank = True  # the region has no text yet
        self._spaces: dict[str, str] = {}  # at the end of a field's text: shown if more follows
        self._shown: set[str] = set()  # fields that have shown text
        self._made: list[tuple[str, str]] = []  # name and arguments of each call
        self._out: list[Delta] = []
        self.num_calls = 0
        self.num_reasoning_tokens = 0
        self.is_over = False
        # A prompt may have begun the message: it may be inside of the thoughts.
        self._buffer = template.begun(prompt)
        self._run(is_end=False)
        self._out.clear()

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """The deltas of one token; `tail` is the text that the token released."""
        text = token.text + tail
        if token.special:
            text = tail + (token.text if self._template.knows(token.text) else "")
        was_thought = self._is_in_thoughts
        deltas = self.push_text(text)
        if was_thought or self._is_in_thoughts:
            self.num_reasoning_tokens += 1
        return deltas

    def push_text(self, text: str) -> list[Delta]:
        """The deltas of more text."""
        if self.is_over:
            return []
        self._buffer += text
        self._run(is_end=False)
        return self._take()

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """The deltas that were held back; a call that is not complete is text."""
        if not self.is_over:
            self._run(is_end=True)
        return self._take()

    @property
    def _is_in_thoughts(self) -> bool:
        return self._field is not None and self._field.is_thoughts

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return merged(out)

    def _run(self, *, is_end: bool) -> None:
        """Read all that is certain."""
        while not self.is_over:
            which, found, certain = self._next(is_end=is_end)
            self._say(self._buffer[self._at : certain])
            self._at = certain
            if found is None:
                if is_end:
                    self._close("")
                break
            was_open = self._field is not self._template.rest or not self._is_blank
            delimiter = self._buffer[found.start : found.end]
            self._at = found.end
            if which is None:
                self._captures = {**self._captures, **found.groups}
                self._close(delimiter)
                if not was_open and found.start == found.end:
                    break  # it would be found again at the same place
            else:
                self._close("")
                self._field, self._captures, self._raw = which, found.groups, delimiter
        if self._at > _MAX_READ:
            self._buffer = self._buffer[self._at - _KEPT :]
            self._at = _KEPT

    def _next(self, *, is_end: bool) -> tuple[Field | None, Found | None, int]:
        """The next delimiter, and where the text before it ends.

        None for the field = the end of the one that is open. Without a delimiter: how far the text
        is certain to have none. The first one counts, of those the longest.
        """
        best: tuple[tuple[int, int, bool, str], Field | None, Found] | None = None
        certain = len(self._buffer)
        for field, delimiter in self._watched():
            found = delimiter.find(self._buffer, self._at, is_end=is_end)
            if found is None:
                continue
            if found.is_pending:
                certain = min(certain, found.start)
                continue
            name = "" if field is None else field.name
            key = (found.start, found.start - found.end, field is None, name)
            if best is None or key < best[0]:
                best = key, field, found
        if best is None or (best[2].start >= certain and certain < len(self._buffer)):
            return None, None, max(certain, self._at)
        return best[1], best[2], best[2].start

    def _watched(self) -> Sequence[tuple[Field | None, Delimiter]]:
        """What may come next: the end of a region; outside of one, the beginning of any."""
        field, rest = self._field, self._template.rest
        watched: list[tuple[Field | None, Delimiter]] = []
        if field is not None and field.closer is not None:
            watched.append((None, field.closer))
        if field is rest:
            watched += [(one, one.opener) for one in self._template.fields if one.opener]
        return watched

    def _say(self, text: str) -> None:
        """More text of the region that is open; outside of all fields it means nothing."""
        field = self._field
        if not text or field is None:
            return
        if not field.is_text or not (field.is_thoughts or field.name == _TEXT):
            self._body += text
            self._raw += text
            self._is_blank = False
            return
        self._is_blank = False
        said = self._spaces.pop(field.name, "") + text
        if field.options.get("strip", True):
            shown = said.rstrip()
            self._spaces[field.name] = said[len(shown) :]
            said = shown if field.name in self._shown else shown.lstrip()
        if said:
            self._shown.add(field.name)
            is_text = field.name == _TEXT
            self._out.append(TextDelta(said) if is_text else ReasoningDelta(said))

    def _close(self, delimiter: str) -> None:
        """The region ends; text that no other field takes follows."""
        field = self._field
        if field is not None and field.name == _CALLS and (self._body or self._raw):
            self._call(field, self._raw + delimiter)
        elif field is not None and not field.is_text and field.name == _TEXT and self._body:
            self._out.append(TextDelta(str(self._value(field, self._body))))
        elif field is not None and not field.is_text and field.is_thoughts and self._body:
            self._out.append(ReasoningDelta(str(self._value(field, self._body))))
        self._field, self._captures = self._template.rest, {}
        self._body = self._raw = ""
        self._is_blank = True

    def _value(self, field: Field, text: str) -> Any:
        try:
            return field.value(text, self._captures)
        except ValueError:
            return text

    def _call(self, field: Field, raw: str) -> None:
        """The calls of one region; all of it is text if one of them is none."""
        try:
            value = field.value(self._body, self._captures)
            calls = [self._read(one) for one in (value if isinstance(value, list) else [value])]
        except (ValueError, KeyError, TypeError):
            self._out.append(TextDelta(raw))
            return
        for name, arguments in calls:
            if (name, arguments) in self._made or self.num_calls == self._max_calls:
                self.is_over = True
                return
            self._made.append((name, arguments))
            self._out.append(CallStart(self.num_calls, self._new_id(), name))
            self._out.append(CallArguments(self.num_calls, arguments))
            self.num_calls += 1

    def _read(self, call: Any) -> tuple[str, str]:
        """Name and arguments of one call; raises `KeyError`, `TypeError`, `ValueError`."""
        function = call["function"]
        tool = self._tools[function["name"]]
        arguments = function.get("arguments", function.get("parameters")) or {}
        if not isinstance(arguments, Mapping):
            raise NotArguments(str(arguments))
        values = {name: _cast(value, name, tool) for name, value in arguments.items()}
        return tool.name, json_text(values)


def _cast(value: Any, name: str, tool: Tool) -> Any:
    if not isinstance(value, str):
        return value
    properties = properties_of(tool.schema)
    return cast(value, types_of(properties[name], tool.schema)) if name in properties else value
