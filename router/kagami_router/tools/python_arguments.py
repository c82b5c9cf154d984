"""Arguments as in a call of Python's: `city="Rome", days=3`."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from kagami_router.tools.call_arguments import NotArguments, Piece, json_text
from kagami_router.tools.casting import properties_of, required_of, types_of, values_of
from kagami_router.tools.lark import listed, literal
from kagami_router.tools.offers import Tool

_BRACKETS: Mapping[str, str] = {"(": ")", "[": "]", "{": "}"}
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None}
_TERMS: Mapping[str, str] = {
    "string": "py_string",
    "integer": "PY_INTEGER",
    "number": "PY_NUMBER",
    "boolean": "PY_BOOLEAN",
    "null": "PY_NONE",
    "array": "py_list",
    "object": "py_dict",
}
_VALUES = (
    f"py_value: {' | '.join(_TERMS.values())}",
    "py_string: PY_STRING",
    'py_list: "[" (py_value (", " py_value)*)? "]"',
    'py_dict: "{" (py_pair (", " py_pair)*)? "}"',
    'py_pair: PY_STRING ": " py_value',
    r"PY_STRING: /\"([^\"\\\n\x00]|\\[^\x00])*\"|'([^'\\\n\x00]|\\[^\x00])*'/",
    r"PY_INTEGER: /-?(0|[1-9][0-9]{0,17})/",
    r"PY_NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/",
    "PY_BOOLEAN: /True|False/",
    "PY_NONE: /None/",
)


class PythonStyle:
    """Named arguments behind an opening bracket; the closing one is the foot of the call."""

    begin = ""

    def reader(self, tool: Tool) -> "_PythonReader":
        """A reader for one call of this tool."""
        return _PythonReader(tool)

    def written(self, arguments: Mapping[str, Any]) -> str:
        """Arguments as the model writes them."""
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())

    def rules(self, name: str, tool: Tool, marker_ids: Mapping[str, int]) -> list[str]:
        """The arguments in the order of the schema; those not required may be missing.

        Inside of lists and dictionaries any value is allowed.
        """
        schema, required = tool.schema, required_of(tool.schema)
        items = [
            (f"{literal(f'{key}=')} ({self._value(one, schema)})", key in required)
            for key, one in properties_of(schema).items()
            if key.isidentifier()
        ]
        return [*listed(name, items, '", "'), *_VALUES]

    def _value(self, schema: object, root: Mapping[str, Any]) -> str:
        if values := values_of(schema, root):
            return " | ".join(literal(_written(one)) for one in values)
        types = types_of(schema, root)
        return " | ".join(_TERMS[one] for one in sorted(types)) or "py_value"


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


class _PythonReader:
    """Waits for the closing bracket: only then the values are known."""

    def __init__(self, tool: Tool) -> None:
        self._names = list(properties_of(tool.schema))
        self._buffer_read = 0
        self._closers: list[str] = [")"]
        self._quote = ""
        self._is_escaped = False
        self.is_over = False

    def feed(self, text: str) -> Piece:
        """The whole object, or nothing yet; raises `NotArguments`."""
        for index in range(self._buffer_read, len(text)):
            self._take(text[index])
            if not self._closers:
                self.is_over = True
                return Piece(index, self._as_json(text[:index]))
        self._buffer_read = len(text)
        return Piece(0, "")

    def _take(self, character: str) -> None:
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in "\"'":
            self._quote = character
        elif character in _BRACKETS:
            self._closers.append(_BRACKETS[character])
        elif character in ")]}":
            if self._closers.pop() != character:
                raise NotArguments(character)

    def _as_json(self, text: str) -> str:
        try:
            call = ast.parse(f"f({text.strip()})", mode="eval").body
            if not isinstance(call, ast.Call):
                raise NotArguments(text)
            values = dict(zip(self._names, map(_value, call.args), strict=False))
            if len(values) != len(call.args):
                raise NotArguments(text)
            values |= {one.arg or "": _value(one.value) for one in call.keywords}
            if "" in values:
                raise NotArguments(text)
            return json_text(values)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise NotArguments(text) from error


def _value(node: ast.expr) -> Any:
    """A literal; the words of JSON count as those of Python."""
    match node:
        case ast.Name(name) if name in _WORDS:
            return _WORDS[name]
        case ast.List(items):
            return [_value(one) for one in items]
        case ast.Dict(keys, values):
            names = [None if key is None else ast.literal_eval(key) for key in keys]
            return dict(zip(names, map(_value, values), strict=True))
        case _:
            return ast.literal_eval(node)
