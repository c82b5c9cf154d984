"""The grammar of an answer: thoughts, then calls, a response of a given form, or text."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kagami_proto.values import Grammar, GrammarKind
from kagami_router.tools.formats import ToolFormat
from kagami_router.tools.lark import ANY, literal, terms
from kagami_router.tools.offers import AllowedCalls
from kagami_router.tools.reasoning import Begun, ReasoningFormat
from kagami_router.tools.tool_forms import FILLINGS, PLACEHOLDER

# A response may leave the spaces out, as an answer without tools may.
_RESPONSE_OPTIONS: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ",[ ]?",
    "key_separator": ":[ ]?",
    "coerce_one_of": True,
}
RESPONSE = "response"
# A slash that no backslash precedes would end a pattern.
_SLASH = re.compile(r"(?<!\\)/")


@dataclass(frozen=True, slots=True)
class Thoughts:
    """How an answer may begin with thoughts."""

    format: ReasoningFormat
    are_begun: bool
    """The prompt has the opener"""

    @classmethod
    def behind(cls, reasoning: ReasoningFormat | None, begun: Begun) -> "Thoughts | None":
        """The thoughts that may follow what was begun; None = the answer has none."""
        if reasoning is None or begun is Begun.CLOSED:
            return None
        return cls(reasoning, begun is Begun.OPEN)


def answer_grammar(
    tool_format: ToolFormat,
    calls: AllowedCalls | None,
    response: Grammar | None = None,
    thoughts: Thoughts | None = None,
) -> Grammar | None:
    """What the whole answer has to match; None = it may be any text.

    With `calls` and without `response` the answer is text that may end in calls. With both it is
    either calls or the response. Required calls leave no place for text or response.
    """
    if calls is None:
        if response is None or thoughts is None:
            return response
        body = [f"body: {RESPONSE}", *response_rules(response)]
        return lark([*_start_rules(thoughts), *body])
    rules = _CallRules(tool_format, calls)
    if calls.is_required:
        lines = [*_start_rules(thoughts, rules.opener_id), f"body: {rules.opened}"]
    elif response is not None:
        lines = [*_start_rules(thoughts, rules.opener_id), f"body: {rules.opened} | {RESPONSE}"]
        lines += response_rules(response)
    elif tool_format.form.opener:
        lines = rules.text_or_calls()  # thoughts are a part of its text
    else:
        lines = [*_start_rules(thoughts), *rules.bare_text_or_calls()]
    return lark(lines + rules.lines())


def lark(lines: list[str]) -> Grammar:
    """A grammar of these rules; what is said twice counts once."""
    return Grammar(GrammarKind.LARK, "\n".join(dict.fromkeys(lines)) + "\n")


def _start_rules(thoughts: Thoughts | None, opener_id: int | None = None) -> list[str]:
    """The rules above `body`; a call's opener that is a token may end thoughts too."""
    if thoughts is None:
        return ["start: body"]
    form, ids = thoughts.format.form, thoughts.format.marker_ids
    opened = "thought WS? body"
    if not thoughts.are_begun:
        opened = f"body | {terms(form.opener, ids)} {opened}"
    closer_id = ids.get(form.closer)
    if closer_id is None:
        thought = ["thought[lazy]: ANY " + terms(form.closer, ids), ANY]
    elif opener_id is None:
        thought = [f"thought: <[^{closer_id}]>* <[{closer_id}]>"]
    else:
        thought = [f"thought: <[^{closer_id},{opener_id}]>* <[{closer_id}]>?"]
    return [f"start: {opened}", *thought, r"WS: /[ \n]{1,4}/"]


def response_rules(response: Grammar) -> list[str]:
    """The rule `RESPONSE`, whose text has to match a grammar."""
    match response.kind:
        case GrammarKind.JSON_SCHEMA:
            schema = json.loads(response.source)
            options = {**_RESPONSE_OPTIONS, **schema.get("x-guidance", {})}
            return [f"{RESPONSE}: %json {json.dumps({**schema, 'x-guidance': options})}"]
        case GrammarKind.REGEX:
            pattern = _SLASH.sub(r"\\/", response.source).replace("\n", r"\n")
            return [f"{RESPONSE}: /{pattern}/"]
        case GrammarKind.LARK:
            return [f"{RESPONSE}: %lark {{\n{response.source}\n}}"]


class _CallRules:
    """The rules of calls; each tool has its own, so that every schema has its own `$defs`."""

    def __init__(self, tool_format: ToolFormat, calls: AllowedCalls) -> None:
        self._form = tool_format.form
        self._ids = tool_format.marker_ids
        self._calls = calls

    @property
    def opener_id(self) -> int | None:
        """The id of the opener, if it is one token."""
        return self._ids.get(self._form.opener)

    @property
    def opened(self) -> str:
        """An alternative of `body`: the opener and the calls."""
        opener = self._form.opener
        if opener:
            return f"{self._terms(opener)} calls"
        tag = self._ids.get(self._form.prelude)
        return "calls" if tag is None else f"calls | <[{tag}]> calls"

    def text_or_calls(self) -> list[str]:
        """The first rules of an answer that may end in calls."""
        opener = self._form.opener
        for marker, marker_id in self._ids.items():
            # What stands before the marker counts as text, which may be anything.
            _, found, behind = opener.partition(marker)
            if found:
                opened = f"{self._terms(marker + behind)} calls"
                return [f"start: text | text {opened}", f"text: <[^{marker_id}]>*"]
        # Both alternatives begin with any text. The lazy one ends at the first opener. After it
        # only calls may follow.
        return [
            "start: TEXT | begin calls",
            "TEXT: /(?s:.*)/",
            f"begin[lazy]: TEXT {literal(opener)}",
        ]

    def bare_text_or_calls(self) -> list[str]:
        """`body` in a form without an opener: text, or calls alone."""
        begin = self._form.text_begin
        return [f"body: TEXT | {self.opened}", f"TEXT: /(?s:.*)/ & ~/{begin}(?s:.*)/"]

    def lines(self) -> list[str]:
        """`calls`, and all below it."""
        form, calls = self._form, self._calls
        # What stands before a call is one term with its head: terms that begin alike would
        # hide one another.
        places = {"first": form.lead, "next": form.between}
        further = calls.max_calls - 1 if form.between else 0
        repeated = f" next{{0,{further}}}" if further else ""
        lines = [f"calls: first{repeated} {self._terms(form.closer)}"]
        for place, before in list(places.items())[: 2 if further else 1]:
            rules = []
            for index, tool in enumerate(calls.tools):
                head = self._terms(before + form.before + tool.name + form.after)
                rules.append(f"{head} arguments_{index} {self._terms(form.foot)}")
            lines.append(f"{place}: {' | '.join(rules)}")
        for index, tool in enumerate(calls.tools):
            lines += form.style.rules(f"arguments_{index}", tool, self._ids)
        return lines

    def _terms(self, text: str) -> str:
        parts = [
            FILLINGS[part].written if part in FILLINGS else terms(part, self._ids)
            for part in PLACEHOLDER.split(text)
        ]
        return " ".join(part for part in parts if part)
