"""How a model writes the arguments of a call: what every style offers, and the style JSON."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from kagami_router.tools.offers import Tool

# The spaces of Python's json.dumps, which models see in training, and no others.
_SPACING: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


# Half of a pair, which no UTF-8 can say. In JSON it can stand as an escape.
_SURROGATE = re.compile("[\ud800-\udfff]")


class NotArguments(ValueError):
    """The text is no arguments in this style."""


class Piece(NamedTuple):
    """What was read of a text."""

    length: int
    """Characters of the text that were read"""
    json: str
    """The same as JSON: a part of one object"""


class ArgumentReader(Protocol):
    """Turns the text of one call's arguments into JSON while it arrives."""

    @property
    def is_over(self) -> bool:
        """Whether the object is complete."""

    def feed(self, text: str) -> Piece:
        """Read what is certain of `text`; the rest is given again, with more behind it.

        Raises `NotArguments`.
        """


class ArgumentStyle(Protocol):
    """One way of writing arguments."""

    @property
    def begin(self) -> str:
        """A regex for what the arguments begin with; it is not consumed."""

    def reader(self, tool: Tool) -> ArgumentReader:
        """A reader for one call of this tool."""

    def written(self, arguments: Mapping[str, Any]) -> str:
        """Arguments as the model writes them."""

    def rules(self, name: str, tool: Tool, marker_ids: Mapping[str, int]) -> list[str]:
        """Rules of a grammar for the arguments of a tool; the first one is called `name`."""


class JsonStyle:
    """A JSON object."""

    begin = r"\{"

    def reader(self, tool: Tool) -> ArgumentReader:
        """A reader for one call of this tool."""
        return _JsonReader()

    def written(self, arguments: Mapping[str, Any]) -> str:
        """Arguments as the model writes them."""
        return json.dumps(arguments, ensure_ascii=False)

    def rules(self, name: str, tool: Tool, marker_ids: Mapping[str, int]) -> list[str]:
        """One rule: the tool's schema."""
        return [f"{name}: {json_term(tool.schema, is_strict=tool.is_strict)}"]


JSON = JsonStyle()


def json_text(value: Any) -> str:
    """`value` as JSON that UTF-8 can say; raises `NotArguments` for infinity and its kind."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise NotArguments(str(error)) from error
    return json.dumps(value) if _SURROGATE.search(text) else text


def json_term(schema: Mapping[str, Any], *, is_strict: bool) -> str:
    """The term of a grammar for JSON of this schema."""
    options = {**_SPACING, "coerce_one_of": True, "lenient": not is_strict}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


class _JsonReader:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_text = False
        self._is_escaped = False

    @property
    def is_over(self) -> bool:
        """Whether the object has ended; valid after the first character."""
        return self._depth == 0

    def feed(self, text: str) -> Piece:
        """The part of `text` that belongs to the object."""
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
                    return Piece(index + 1, text[: index + 1])
        return Piece(len(text), text)
