"""Turns the text of an argument into the JSON value that the tool's schema asks for."""

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_DEPTH = 16  # of references and alternatives that are followed
_NAMES: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}
_ALL = frozenset(_NAMES.values())
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None, "none": None}


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The named properties of an object's schema."""
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def required_of(schema: Mapping[str, Any]) -> list[Any]:
    """The names of the properties that an object must have."""
    required = schema.get("required")
    return required if isinstance(required, list) else []


def types_of(schema: object, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The JSON types that a value of `schema` may have; `root` is where its references lead."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return _ALL
    types = _ALL
    match schema.get("type"):
        case str(name):
            types &= {name}
        case [*names]:
            types &= {name for name in names if isinstance(name, str)}
        case _:
            pass
    if isinstance(values := schema.get("enum"), list):
        types &= {_NAMES.get(type(value), "") for value in values}
    if "const" in schema:
        types &= {_NAMES.get(type(schema["const"]), "")}
    if isinstance(reference := schema.get("$ref"), str):
        types &= types_of(resolved(reference, root), root, depth + 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(parts := schema.get(key), list) and parts:
            types &= frozenset().union(*(types_of(one, root, depth + 1) for one in parts))
    for part in schema.get("allOf") or () if isinstance(schema.get("allOf"), list) else ():
        types &= types_of(part, root, depth + 1)
    return types


def values_of(schema: object, root: Mapping[str, Any], depth: int = 0) -> list[Any] | None:
    """The only values that a schema allows, if it lists them."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return None
    if "const" in schema:
        return [schema["const"]]
    if isinstance(values := schema.get("enum"), list) and values:
        return values
    if isinstance(reference := schema.get("$ref"), str):
        return values_of(resolved(reference, root), root, depth + 1)
    return None


def is_text(types: frozenset[str]) -> bool:
    """Whether a value can be nothing but a string."""
    return types == {"string"}


def cast(text: str, types: frozenset[str]) -> Any:
    """The value of this text; a text that fits no other type is a string.

    A schema that allows everything takes for a string what is no JSON.
    """
    if is_text(types):
        return text
    for value in _readings(text.strip()):
        name = _NAMES.get(type(value))
        if name in types or (name == "integer" and "number" in types):
            return value
        if name == "number" and "integer" in types and value.is_integer():
            return int(value)
    return text


def _readings(text: str) -> Iterator[Any]:
    """What the text says as JSON, as a word, as a Python literal."""
    if text.lower() in _WORDS:
        yield _WORDS[text.lower()]
        return
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            json.dumps(value, allow_nan=False)  # raises for what is no JSON
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        yield value
        return


def resolved(reference: str, root: Mapping[str, Any]) -> object:
    """What a reference inside of `root` leads to; None = nothing."""
    found: object = root
    begin, *names = reference.split("/")
    for name in names if begin == "#" else ("",):
        if not isinstance(found, Mapping):
            return None
        found = found.get(name.replace("~1", "/").replace("~0", "~"))
    return found
