"""Answers in OpenAI's harmony format, which gpt-oss writes: messages on channels.

An answer is a row of messages, each with a header and a body between special tokens:
`<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`.
The channel `analysis` has thoughts, `final` the answer, `commentary` calls and what is said before
them (https://cookbook.openai.com/articles/openai-harmony).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import tokenizers

from kagami_proto.values import Grammar
from kagami_router.request.values import Token
from kagami_router.tools.answer_form import AnswerForm, Opening, Reading, Wanted
from kagami_router.tools.answer_grammar import RESPONSE, lark, response_rules
from kagami_router.tools.call_arguments import json_term
from kagami_router.tools.deltas import (
    CallArguments,
    CallStart,
    Delta,
    ReasoningDelta,
    TextDelta,
    merged,
    new_call_id,
)
from kagami_router.tools.formats import ToolFormat
from kagami_router.tools.lark import literal
from kagami_router.tools.offers import AllowedCalls

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
_OPENED = f"{_START}assistant"
_MARKER = re.compile("(" + "|".join(map(re.escape, MARKERS)) + ")")
_RECIPIENT = re.compile(r"to=([\w.:/-]+)")
_FUNCTION = "functions."


class HarmonyParser:
    """Reads one answer. `push` every token, then `finish`."""

    def __init__(
        self,
        begun: str,
        calls: AllowedCalls | None,
        *,
        is_constrained: bool,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """`begun` is what the prompt has behind the last opening of an assistant's turn."""
        self._names = frozenset(tool.name for tool in calls.tools) if calls else frozenset()
        self._max_calls = calls.max_calls if calls else 0
        self._is_constrained = is_constrained
        self._new_id = new_id
        self._header: str | None = ""  # None: in a body
        self._num_header = 0  # tokens
        self._has_marker = False
        self._make: Callable[[str], Delta] = TextDelta
        self._is_separate = False  # a body of this kind came before
        self._call: str | None = None  # the function that the body calls
        self._arguments = ""
        self._held: list[Delta] = []
        self._rivals: list[str] = []
        self._done: list[tuple[str, str]] = []
        self._shown: set[type] = set()
        self._out: list[Delta] = []
        self.num_calls = 0
        self.num_reasoning_tokens = 0
        self.is_over = False
        for part in _MARKER.split(begun):
            self._marker(part) if part in MARKERS else self._text(part)
        self._out.clear()

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """The deltas of one token; `tail` is the text that the token released."""
        in_header = self._header is not None
        if not token.special:
            self._text(token.text + tail)
        else:
            self._text(tail)
            if token.text in MARKERS:
                self._marker(token.text)
        self._num_header = self._num_header + 1 if in_header else 0
        if self._header is None and self._make is ReasoningDelta and self._call is None:
            self.num_reasoning_tokens += self._num_header if in_header else 1
            self._num_header = 0
        return self._take()

    def push_text(self, text: str) -> list[Delta]:
        """The deltas of more text."""
        self._text(text)
        return self._take()

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """The deltas that were held back. `is_cut`: a limit was reached, a partial call counts."""
        said = (self._header or "").lstrip()
        if not self._has_marker and not "to=".startswith(said[:3]):
            self._out.append(TextDelta(said))  # a text without any channel
        self._close(is_complete=not is_cut)
        return self._take()

    def _take(self) -> list[Delta]:
        out, self._out = self._out, []
        return merged(out)

    def _marker(self, marker: str) -> None:
        self._has_marker = True
        if marker == _MESSAGE and self._header is not None:
            self._open(self._header)
        elif marker in _ENDS or marker == _START:
            self._close(is_complete=True)
            self._header = ""
        elif self._header is None:
            self._close(is_complete=True)  # a header without an end of the message before it
            self._header = marker
        else:
            self._header += marker

    def _open(self, header: str) -> None:
        self._header = None
        recipient = _RECIPIENT.search(header)
        name = recipient[1].removeprefix(_FUNCTION) if recipient else ""
        is_call = recipient is not None and recipient[1].startswith(_FUNCTION)
        if is_call and name in self._names and self.num_calls < self._max_calls:
            self._call, self._arguments = name, ""
            self._rivals = [said for called, said in self._done if called == name]
            self._put(CallStart(self.num_calls, self._new_id(), name))
            return
        is_thought = f"{_CHANNEL}analysis" in header.replace(" ", "")
        self._make = ReasoningDelta if is_thought else TextDelta
        self._is_separate = self._make in self._shown

    def _text(self, text: str) -> None:
        if not text or self.is_over:
            return
        if self._header is not None:
            self._header += text
        elif self._call is None:
            self._out.append(self._make(f"\n{text}" if self._is_separate else text))
            self._is_separate = False
            self._shown.add(type(self._out[-1]))
        else:
            self._arguments += text
            self._rivals = [one for one in self._rivals if one.startswith(self._arguments)]
            self._put(CallArguments(self.num_calls - (not self._held), text))

    def _put(self, delta: Delta) -> None:
        """Add to the call; it goes out while it grows if it is certain to be a new one."""
        self._held.append(delta)
        if self._is_constrained and not self._rivals:
            self._release()

    def _release(self) -> None:
        self.num_calls += sum(isinstance(delta, CallStart) for delta in self._held)
        self._out += self._held
        self._held = []

    def _close(self, *, is_complete: bool) -> None:
        name, self._call = self._call, None
        self._make, self._is_separate = TextDelta, False
        if name is None:
            return
        if self._arguments in self._rivals:
            self._held, self.is_over = [], True
        elif self._is_constrained or not is_complete or _is_json(self._arguments):
            if not self._rivals:  # else it is the beginning of a call that was made before
                self._release()
            self._done.append((name, self._arguments))
        else:
            self._out.append(TextDelta(self._arguments))
        self._held = []


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class HarmonyForm:
    """The form of answers of gpt-oss."""

    tool_format: ToolFormat
    """For the history of models whose template has no calls"""
    ids: Mapping[str, int]
    """Of all markers"""

    def shows_tools(self, calls: AllowedCalls) -> bool:
        """As `AnswerForm` says: the template does."""
        return True

    def reading(self, opening: Opening, wanted: Wanted) -> Reading:
        """As `AnswerForm` says."""
        begun = opening.prompt.rpartition(_OPENED)[2]
        grammar = wanted.response
        # A message that the prompt has begun is not held.
        if wanted.has_grammars and not begun:
            grammar = self._grammar(wanted)

        def new_parser() -> HarmonyParser:
            is_held = wanted.has_grammars and not begun
            return HarmonyParser(begun, wanted.calls, is_constrained=is_held)

        return Reading(grammar, new_parser, may_think=True, is_plain=False)

    def _grammar(self, wanted: Wanted) -> Grammar | None:
        """Thoughts, then calls, the response, or text, each on its channel."""
        calls, response = wanted.calls, wanted.response
        if calls is None and response is None:
            return None
        ids = {name: f"<[{token_id}]>" for name, token_id in self.ids.items()}
        ends = ",".join(str(self.ids[one]) for one in MARKERS)
        behind = f"body {ids['<|end|>']} {ids[_START]} {literal('assistant')}"
        channel, message = ids[_CHANNEL], ids[_MESSAGE]
        lines = [
            f"thought: {channel} {literal('analysis')} {message} {behind}",
            f"remark: {channel} {literal('commentary')} {message} {behind}",
            f"body: <[^{ends}]>*",
        ]
        last = ["call"] if calls is not None else []
        if response is not None:
            constrained = f"({literal(' ')} {ids[_CONSTRAIN]} /[A-Za-z]+/)?"
            lines.append(f"held: {channel} {literal('final')} {constrained} {message} {RESPONSE}")
            lines += response_rules(response)
        if calls is None or not calls.is_required:
            last.append("said" if response is None else "held")
            lines.append(f"said: {channel} {literal('final')} {message} body")
        if calls is not None:
            lines += self._call_rules(calls, ids)
        # A remark is text, and would stand before the response.
        first = "thought | remark" if response is None else "thought"
        return lark([f"start: ({first})* ({' | '.join(last)})", *lines])

    def _call_rules(self, calls: AllowedCalls, ids: Mapping[str, str]) -> list[str]:
        lines, heads = [], []
        for index, tool in enumerate(calls.tools):
            head = literal(f"commentary to={_FUNCTION}{tool.name} ")
            behind = f"{ids[_CONSTRAIN]} {literal('json')} {ids[_MESSAGE]} arguments_{index}"
            heads.append(f"{ids[_CHANNEL]} {head} {behind}")
            term = json_term(tool.schema, is_strict=tool.is_strict)
            lines.append(f"arguments_{index}: {term}")
        return [f"call: {' | '.join(heads)}", *lines]


def find_harmony(
    source: str, tokenizer: tokenizers.Tokenizer, tool_format: ToolFormat
) -> AnswerForm | None:
    """The form, if the chat template with this source writes on channels."""
    if _CHANNEL not in source or _MESSAGE not in source:
        return None
    ids = {one: tokenizer.token_to_id(one) for one in MARKERS}
    known = {one: token_id for one, token_id in ids.items() if token_id is not None}
    return HarmonyForm(tool_format, known) if len(known) == len(MARKERS) else None
