"""The value of a region of an answer: its text, read as a response template says.

The names of the kinds of content are those of transformers' chat response parsing
(https://huggingface.co/docs/transformers/chat_response_parsing).
"""

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import regex

# Integers that every reader of JSON keeps exactly (RFC 8259, section 6).
_MAX_INTEGER = 2**53 - 1
_MAX_DEPTH = 100
_PLACEHOLDER = regex.compile(r"\{(\w+(?:\.\w+)*)\}")
_NAME = regex.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:[-.][A-Za-z0-9_]+)*")
_NUMBER = regex.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_STRING = regex.compile(r"""'(?:[^'\\\n\r]|\\.)*'|"(?:[^"\\\n\r]|\\.)*\"""", regex.DOTALL)
_BARE_KEY = regex.compile(r'"(?:\\.|[^"\\])*"(*SKIP)(*FAIL)|(?<=[{,])(\s*)(\w+)(\s*):')
_WORDS: Mapping[str, Any] = {
    "True": True,
    "true": True,
    "False": False,
    "false": False,
    "None": None,
    "null": None,
}
Options = Mapping[str, Any]
_Item = TypeVar("_Item")


def read_value(kind: str, text: str, options: Options) -> Any:
    """What `text` says; raises `ValueError` if it is not of this kind."""
    return KINDS[kind](text, options)


def transformed(shape: Any, scope: Mapping[str, Any]) -> Any:
    """`shape` with its placeholders filled; `{content.name}` leads into an object.

    Raises `ValueError` for a placeholder that leads nowhere.
    """
    match shape:
        case Mapping():
            return {key: transformed(value, scope) for key, value in shape.items()}
        case list():
            return [transformed(value, scope) for value in shape]
        case str() if found := _PLACEHOLDER.fullmatch(shape):
            value: Any = scope
            for name in found[1].split("."):
                if not isinstance(value, Mapping) or name not in value:
                    raise ValueError(f"nothing is called {shape}")
                value = value[name]
            return value
        case _:
            return shape


def check_shape(shape: Any) -> None:
    """Raises `ValueError` for a text that has a placeholder and other characters."""
    match shape:
        case Mapping():
            for value in shape.values():
                check_shape(value)
        case list():
            for value in shape:
                check_shape(value)
        case str() if _PLACEHOLDER.search(shape) and not _PLACEHOLDER.fullmatch(shape):
            raise ValueError(f"a placeholder stands alone in its text. Given: {shape}")
        case _:
            pass


def _text(text: str, options: Options) -> str:
    return text.strip() if options.get("strip", True) else text


def _json(text: str, options: Options) -> Any:
    """JSON; its strings may have other quotes, and its keys none."""
    said = text
    strings: list[str] = []
    for opener, closer in options.get("string_delims", ()):
        quoted = regex.compile(f"{regex.escape(opener)}(.*?){regex.escape(closer)}", regex.DOTALL)
        # Each string is a number in quotes until the keys are done.
        said = quoted.sub(lambda found: _kept(strings, found[1]), said)
    if options.get("unquoted_keys"):
        said = _BARE_KEY.sub(lambda found: f'{found[1]}"{found[2]}"{found[3]}:', said)
    for number, string in enumerate(strings):
        said = said.replace(f"\x01{number}\x02", json.dumps(string))
    try:
        return json.loads(said)
    except (ValueError, RecursionError) as error:
        if options.get("allow_non_json"):
            return _text(text, options)
        raise ValueError(f"no JSON: {error}") from error


def _kept(strings: list[str], text: str) -> str:
    strings.append(text)
    return f"\x01{len(strings) - 1}\x02"


def _inner(text: str, options: Options) -> Any:
    """A value inside of a region, read as `value_parser` says."""
    parser = options.get("value_parser")
    if parser is None:
        return text
    return read_value(parser.get("name", "text"), text, parser.get("args", {}))


def _xml_inline(text: str, options: Options) -> dict[str, Any]:
    """Tags that `tag_pattern` finds: its groups are `key` and `value`."""
    made: dict[str, Any] = {}
    lists: set[str] = set()
    for found in regex.finditer(options["tag_pattern"], text, flags=regex.DOTALL):
        groups = found.groupdict()
        key, value = groups["key"], _inner(groups.get("value", ""), options)
        if key not in made or not options.get("merge_duplicates"):
            made[key] = value
        elif key in lists:
            made[key].append(value)
        else:
            made[key] = [made[key], value]
            lists.add(key)
    return made


def _kv_lines(text: str, options: Options) -> dict[str, Any]:
    """One key and its value on each line."""
    between = options.get("kv_sep", ":")
    made: dict[str, Any] = {}
    for line in text.split(options.get("line_sep", "\n")):
        key, found, value = _text(line, options).partition(between)
        if found:
            made[_text(key, options)] = _inner(_text(value, options), options)
    return made


def _call_list(text: str, options: Options) -> list[dict[str, Any]]:
    """`[name(key=value)]` as in Python, with literals as values and no positional arguments."""
    return _CallList(text).read()


KINDS: Mapping[str, Callable[[str, Options], Any]] = {
    "text": _text,
    "int": lambda text, options: int(_text(text, options)),
    "float": lambda text, options: float(_text(text, options)),
    "bool": lambda text, options: _text(text, options).lower() in ("true", "1"),
    "json": _json,
    "xml-inline": _xml_inline,
    "kv-lines": _kv_lines,
    "python-call-list": _call_list,
}


class _CallList:
    """Reads a list of calls, from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> list[dict[str, Any]]:
        """All calls; raises `ValueError`."""
        self._expect("[")
        calls = self._items("]", self._call)
        self._skip_space()
        if self._at != len(self._text):
            raise self._error("the end")
        return calls

    def _call(self) -> dict[str, Any]:
        name = self._name()
        self._expect("(")
        return {"name": name, "arguments": self._unique(self._items(")", self._argument))}

    def _argument(self) -> tuple[str, Any]:
        key = self._name()
        self._expect("=")
        return key, self._value(0)

    def _pair(self, depth: int) -> tuple[str, Any]:
        if not (self._sees("'") or self._sees('"')):
            raise self._error("a string")
        key = self._string()
        self._expect(":")
        return key, self._value(depth)

    def _value(self, depth: int) -> Any:
        if self._sees("'") or self._sees('"'):
            return self._string()
        if depth >= _MAX_DEPTH:
            raise self._error(f"at most {_MAX_DEPTH} levels")
        if self._sees("["):
            self._at += 1
            return self._items("]", lambda: self._value(depth + 1))
        if self._sees("{"):
            self._at += 1
            return self._unique(self._items("}", lambda: self._pair(depth + 1)))
        if number := _NUMBER.match(self._text, self._at):
            self._at = number.end()
            if number[1] is None and number[2] is None:
                if len(number[0]) > 17 or abs(int(number[0])) > _MAX_INTEGER:
                    raise self._error(f"an integer up to {_MAX_INTEGER}")
                return int(number[0])
            return float(number[0])
        word = _NAME.match(self._text, self._at)
        if word is None or word[0] not in _WORDS:
            raise self._error("a value")
        self._at = word.end()
        return _WORDS[word[0]]

    def _string(self) -> str:
        found = _STRING.match(self._text, self._at)
        if found is None:
            raise self._error("a string")
        self._at = found.end()
        try:
            text = str(ast.literal_eval(found[0]))
        except (SyntaxError, ValueError) as error:
            raise self._error("a string") from error
        return text

    def _name(self) -> str:
        self._skip_space()
        found = _NAME.match(self._text, self._at)
        if found is None:
            raise self._error("a name")
        self._at = found.end()
        return str(found[0])

    def _items(self, closer: str, read: Callable[[], _Item]) -> list[_Item]:
        made: list[_Item] = []
        while not self._sees(closer):
            if made:
                self._expect(",")
            made.append(read())
        self._at += 1
        return made

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise self._error("each name once")
        return made

    def _sees(self, character: str) -> bool:
        self._skip_space()
        return self._text.startswith(character, self._at)

    def _expect(self, character: str) -> None:
        if not self._sees(character):
            raise self._error(character)
        self._at += 1

    def _skip_space(self) -> None:
        while self._text[self._at : self._at + 1] in (" ", "\t", "\n", "\r"):
            self._at += 1

    def _error(self, expected: str) -> ValueError:
        return ValueError(f"expected {expected} at {self._at}")
