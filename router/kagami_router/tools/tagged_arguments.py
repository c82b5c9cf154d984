"""Arguments between tags, as in XML: each has its name and its text, and no type.

The tool's schema says what a text means. The text of a string is neither quoted nor escaped, and it
is given out while it arrives.
"""

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kagami_router.tools.call_arguments import NotArguments, Piece, json_term, json_text
from kagami_router.tools.casting import (
    cast,
    is_text,
    properties_of,
    required_of,
    types_of,
    values_of,
)
from kagami_router.tools.deltas import overlap
from kagami_router.tools.lark import ANY, NOTHING, literal, terms
from kagami_router.tools.offers import Tool

_MAX_NAME = 256  # characters of an argument's name
# In `middle`: whether the text is a string.
_IS_STRING = "{is_string}"


@dataclass(frozen=True, slots=True)
class TaggedStyle:
    """Each argument is `opener` name `middle` text `closer`; after the last one comes `end`."""

    opener: str
    middle: str
    closer: str
    end: str
    """The foot of the call, or what stands in its place"""

    begin = "<"

    def reader(self, tool: Tool) -> "TaggedReader":
        """A reader for one call of this tool."""
        return TaggedReader(self, tool)

    def written(self, arguments: Mapping[str, Any]) -> str:
        """Arguments as the model writes them."""
        return "".join(self._written(name, value) for name, value in arguments.items())

    def _written(self, name: str, value: Any) -> str:
        middle = self._middle(is_string=isinstance(value, str))
        return f"{self.opener}{name}{middle}{_text(value)}{self.closer}"

    def _middle(self, is_string: bool) -> str:
        return self.middle.replace(_IS_STRING, "true" if is_string else "false")

    def rules(self, name: str, tool: Tool, marker_ids: Mapping[str, int]) -> list[str]:
        """The arguments in the order of the schema; those not required may be missing."""
        schema = tool.schema
        properties = properties_of(schema)
        required = required_of(schema)
        each, lines = [], []
        for index, (key, one) in enumerate(properties.items()):
            rule = f"{name}_{index}"
            each.append(rule if key in required else f"{rule}?")
            lines += self._argument(rule, key, one, tool, marker_ids)
        if schema.get("additionalProperties") is not False:
            each.append(f"{name}_more*")
            middle = terms(self._middle(True), marker_ids)
            head = f"{terms(self.opener, marker_ids)} {name}_key {middle}"
            lines += [
                f"{name}_more: {head} {name}_text",
                rf"{name}_key: /[^<>\s\x22=]{{1,{_MAX_NAME}}}/",
                *self._text_rules(f"{name}_text", marker_ids),
            ]
        return [f"{name}: {' '.join(each) or NOTHING}", *lines]

    def _argument(
        self, rule: str, key: str, one: object, tool: Tool, marker_ids: Mapping[str, int]
    ) -> list[str]:
        types = types_of(one, tool.schema)
        is_string = "string" in types
        head = terms(f"{self.opener}{key}{self._middle(is_string)}", marker_ids)
        closer = terms(self.closer, marker_ids)
        if is_string and (values := values_of(one, tool.schema)):
            texts = " | ".join(literal(_text(value)) for value in values)
            return [f"{rule}: {head} ({texts}) {closer}"]
        if is_string:
            return [f"{rule}: {head} {rule}_text", *self._text_rules(f"{rule}_text", marker_ids)]
        value = {**one} if isinstance(one, Mapping) else {}
        for table in ("$defs", "definitions"):
            if table in tool.schema:
                value.setdefault(table, tool.schema[table])
        return [
            f"{rule}: {head} {rule}_json {closer}",
            f"{rule}_json: {json_term(value, is_strict=tool.is_strict)}",
        ]

    def _text_rules(self, rule: str, marker_ids: Mapping[str, int]) -> list[str]:
        """Any text, and the closer behind it."""
        for marker, marker_id in marker_ids.items():
            # What stands before the marker counts as text, which may be anything.
            _, found, behind = self.closer.partition(marker)
            if found:
                return [f"{rule}: <[^{marker_id}]>* {terms(marker + behind, marker_ids)}"]
        return [f"{rule}[lazy]: ANY {literal(self.closer)}", ANY]


class _State(enum.Enum):
    BETWEEN = enum.auto()
    """Before an argument, or before the end"""
    STRING = enum.auto()
    """In a text that is given out while it arrives"""
    VALUE = enum.auto()
    """In a text whose meaning is known at its end"""
    OVER = enum.auto()


class TaggedReader:
    """Reads the arguments of one call."""

    def __init__(self, style: TaggedStyle, tool: Tool) -> None:
        self._style = style
        self._schema = tool.schema
        self._state = _State.BETWEEN
        self._types: frozenset[str] = frozenset()
        self._names: set[str] = set()
        self._head = _head_of(style)
        self._opener, self._end = style.opener.strip(), style.end.strip()
        self._closer = style.closer.strip()
        # A line break at the ends of a text belongs to the tags if the form has one there.
        self._tail = "\n" if style.closer.startswith("\n") else ""

    @property
    def is_over(self) -> bool:
        """Whether the object is complete."""
        return self._state is _State.OVER

    def feed(self, text: str) -> Piece:
        """Read what is certain of `text`; raises `NotArguments`."""
        length, pieces = 0, []
        while not self.is_over:
            read = self._between if self._state is _State.BETWEEN else self._value
            piece = read(text[length:])
            if piece is None:
                break
            length += piece.length
            pieces.append(piece.json)
        return Piece(length, "".join(pieces))

    def _between(self, text: str) -> Piece | None:
        said = text.lstrip()
        if said.startswith(self._end):
            self._state = _State.OVER
            return Piece(0, "}" if self._names else "{}")
        match = self._head.match(text)
        if match is not None:
            # A line break that belongs to the tag may follow.
            if match.end() == len(text) and self._style.middle.endswith("\n"):
                return None
            return self._opened(match["name"], match.end())
        may_go_on = self._end.startswith(said) or self._opener.startswith(said)
        if may_go_on or (said.startswith(self._opener) and len(said) <= _MAX_NAME + 64):
            return None
        raise NotArguments(said[:_MAX_NAME])

    def _opened(self, name: str, length: int) -> Piece:
        if name in self._names:
            raise NotArguments(f"{name} twice")
        begin = ", " if self._names else "{"
        self._names.add(name)
        self._types = types_of(properties_of(self._schema).get(name), self._schema)
        is_string = is_text(self._types)
        self._state = _State.STRING if is_string else _State.VALUE
        quote = '"' if is_string else ""
        return Piece(length, f"{begin}{json_text(name)}: {quote}")

    def _value(self, text: str) -> Piece | None:
        has_end, length = self._scan(text)
        is_string = self._state is _State.STRING
        if not has_end:
            return Piece(length, _escaped(text[:length])) if is_string and length else None
        self._state = _State.BETWEEN
        said = text[:length]
        written = _escaped(said) + '"' if is_string else json_text(cast(said, self._types))
        return Piece(text.index(self._closer, length) + len(self._closer), written)

    def _scan(self, text: str) -> tuple[bool, int]:
        """Whether the value ends in `text`, and how many characters belong to it for certain.

        A closer that neither an argument nor the end follows is a part of the value.
        """
        at = text.find(self._closer)
        while at >= 0:
            behind = text[at + len(self._closer) :].lstrip()
            ends = [behind.startswith(one) for one in (self._opener, self._end)]
            may_end = [one.startswith(behind) for one in (self._opener, self._end)]
            if any(ends) or any(may_end):
                return any(ends), len(text[:at].removesuffix(self._tail))
            at = text.find(self._closer, at + 1)
        held = max(overlap(text, self._closer), overlap(text, self._tail + self._closer))
        return False, len(text) - held


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _head_of(style: TaggedStyle) -> re.Pattern[str]:
    middle = re.escape(style.middle.rstrip("\n")).replace(re.escape(_IS_STRING), "(?:true|false)")
    middle = middle.replace("\\\n", r"\s*")
    behind = "\n?" if style.middle.endswith("\n") else ""
    name = rf"(?P<name>[^<>\x22=]{{1,{_MAX_NAME}}}?)"
    return re.compile(rf"\s*{re.escape(style.opener)}\s*{name}\s*{middle}{behind}")
