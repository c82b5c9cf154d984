"""Arguments as Gemma writes them: an object whose names stand bare and whose strings are quoted
by a marker: `{city:<escape>Rome<escape>,days:3}`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kagami_router.tools.call_arguments import NotArguments, Piece, json_text
from kagami_router.tools.casting import properties_of, required_of, types_of, values_of
from kagami_router.tools.lark import ANY, listed, literal, terms
from kagami_router.tools.offers import Tool

_MAX_DEPTH = 64
_NAME = re.compile(r"\s*([^\s:{}\[\],]{1,256})\s*:\s*")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None, "None": None}
_WORD = re.compile("|".join(_WORDS))
_TERMS: Mapping[str, str] = {
    "string": "gemma_string",
    "integer": "GEMMA_INTEGER",
    "number": "GEMMA_NUMBER",
    "boolean": "GEMMA_BOOLEAN",
    "null": "GEMMA_NULL",
    "array": "gemma_list",
    "object": "gemma_object",
}


@dataclass(frozen=True, slots=True)
class GemmaStyle:
    """`quote` stands before and after a string; nothing in a string is escaped."""

    quote: str

    @property
    def begin(self) -> str:
        """A regex for what the arguments begin with."""
        return r"\{"

    def reader(self, tool: Tool) -> "_GemmaReader":
        """A reader for one call of this tool."""
        return _GemmaReader(self.quote)

    def written(self, arguments: Mapping[str, Any]) -> str:
        """Arguments as the model writes them."""
        return self._written(arguments)

    def _written(self, value: Any) -> str:
        match value:
            case str():
                return f"{self.quote}{value}{self.quote}"
            case Mapping():
                pairs = (f"{name}:{self._written(one)}" for name, one in value.items())
                return "{" + ",".join(pairs) + "}"
            case list():
                return "[" + ",".join(map(self._written, value)) + "]"
            case _:
                return json.dumps(value)

    def rules(self, name: str, tool: Tool, marker_ids: Mapping[str, int]) -> list[str]:
        """The arguments in the order of the schema; those not required may be missing.

        Inside of lists and objects any value is allowed.
        """
        schema, required = tool.schema, required_of(tool.schema)
        items = [
            (f"{literal(f'{key}:')} ({self._value(one, schema, marker_ids)})", key in required)
            for key, one in properties_of(schema).items()
        ]
        return [
            f'{name}: "{{" {name}_pairs "}}"',
            *listed(f"{name}_pairs", items, '","'),
            *self._shared(marker_ids),
        ]

    def _value(self, schema: object, root: Mapping[str, Any], ids: Mapping[str, int]) -> str:
        if values := values_of(schema, root):
            return " | ".join(terms(self._written(one), ids) for one in values)
        types = types_of(schema, root)
        return " | ".join(_TERMS[one] for one in sorted(types)) or "gemma_value"

    def _shared(self, marker_ids: Mapping[str, int]) -> list[str]:
        quote = terms(self.quote, marker_ids)
        quote_id = marker_ids.get(self.quote)
        text = (
            [f"gemma_string: {quote} gemma_text", f"gemma_text[lazy]: ANY {quote}", ANY]
            if quote_id is None
            else [f"gemma_string: {quote} <[^{quote_id}]>* {quote}"]
        )
        return [
            f"gemma_value: {' | '.join(_TERMS.values())}",
            *text,
            'gemma_list: "[" (gemma_value ("," gemma_value)*)? "]"',
            'gemma_object: "{" (gemma_pair ("," gemma_pair)*)? "}"',
            'gemma_pair: GEMMA_NAME ":" gemma_value',
            r"GEMMA_NAME: /[A-Za-z_][A-Za-z0-9_-]{0,63}/",
            r"GEMMA_INTEGER: /-?(0|[1-9][0-9]{0,17})/",
            r"GEMMA_NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/",
            "GEMMA_BOOLEAN: /true|false/",
            "GEMMA_NULL: /null/",
        ]


class _GemmaReader:
    """Waits for the closing bracket: only then the values are known."""

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self._read = 0  # characters
        self._depth = 0
        self._is_quoted = False
        self.is_over = False

    def feed(self, text: str) -> Piece:
        """The whole object, or nothing yet; raises `NotArguments`."""
        while self._read < len(text):
            if text.startswith(self._quote, self._read):
                self._is_quoted = not self._is_quoted
                self._read += len(self._quote)
                continue
            if self._quote.startswith(text[self._read :]):
                break  # the beginning of a quote
            if not self._is_quoted:
                self._depth += {"{": 1, "}": -1}.get(text[self._read], 0)
            self._read += 1
            if self._depth == 0:
                self.is_over = True
                return Piece(self._read, self._as_json(text[: self._read]))
        return Piece(0, "")

    def _as_json(self, text: str) -> str:
        value, end = self._value(text, 0, 0)
        if end != len(text):
            raise NotArguments(text)
        return json_text(value)

    def _value(self, text: str, at: int, depth: int) -> tuple[Any, int]:
        """The value that begins at `at`, and where it ends."""
        if depth > _MAX_DEPTH:
            raise NotArguments(text)
        if text.startswith(self._quote, at):
            begin = at + len(self._quote)
            end = text.find(self._quote, begin)
            if end < 0:
                raise NotArguments(text)
            return text[begin:end], end + len(self._quote)
        if text.startswith("{", at):
            return self._object(text, at + 1, depth)
        if text.startswith("[", at):
            return self._list(text, at + 1, depth)
        if match := _NUMBER.match(text, at):
            return json.loads(match[0]), match.end()
        if match := _WORD.match(text, at):
            return _WORDS[match[0]], match.end()
        raise NotArguments(text)

    def _object(self, text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
        made: dict[str, Any] = {}
        while not text.startswith("}", at := _space(text, at)):
            match = _NAME.match(text, at)
            if match is None:
                raise NotArguments(text)
            name = match[1].replace(self._quote, "").strip('"')
            made[name], at = self._value(text, match.end(), depth + 1)
            at = _comma(text, at, "}")
        return made, at + 1

    def _list(self, text: str, at: int, depth: int) -> tuple[list[Any], int]:
        made: list[Any] = []
        while not text.startswith("]", at := _space(text, at)):
            value, at = self._value(text, at, depth + 1)
            made.append(value)
            at = _comma(text, at, "]")
        return made, at + 1


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _comma(text: str, at: int, closer: str) -> int:
    """Behind the comma after a value; a bracket that closes needs none."""
    at = _space(text, at)
    if text.startswith(",", at):
        return at + 1
    if text.startswith(closer, at):
        return at
    raise NotArguments(text)
