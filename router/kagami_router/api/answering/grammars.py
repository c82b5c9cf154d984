"""Turns TGI's and OpenAI's fields for constrained output into a `Grammar`.

Only the shape of the fields is checked here. Validation asks a shard whether the grammar compiles.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_proto.values import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.native import GrammarType
from kagami_router.api.schemas.openai import ResponseFormat
from kagami_router.tools.json_schema import requires_unnamed

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# Keys whose value is one subschema, a list of subschemas, or a table of subschemas.
_ONE = ("items", "additionalProperties", "not", "contains", "propertyNames")
_LIST = ("anyOf", "oneOf", "prefixItems")
_TABLE = ("properties", "$defs", "definitions", "patternProperties")


def native(given: GrammarType | None) -> Grammar | None:
    """`parameters.grammar`; raises `InvalidRequest`."""
    if given is None:
        return None
    return _FORMS[given.type](given.value, "parameters.grammar")


def response_format(given: ResponseFormat | None) -> Grammar | None:
    """`response_format` of a chat; raises `InvalidRequest`.

    Accepts OpenAI's `json_schema` member, TGI's `value`, and a `json_object` with neither.
    """
    if given is None or given.type == "text":
        return None
    if given.json_schema is not None:
        return json_schema(given.json_schema.schema or _ANY_OBJECT)
    if given.value is None:
        if given.type in ("json", "json_object"):
            return json_schema(_ANY_OBJECT)
        raise MalformedBody("response_format: missing field `value`", field="response_format")
    return _FORMS[given.type](given.value, "response_format")


def json_schema(schema: Mapping[str, Any] | str) -> Grammar:
    """A JSON schema, given as an object or as its text; raises `InvalidRequest`."""
    try:
        if isinstance(schema, str):
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        # The encoder is quick, all that follows takes 100 times as long.
        if (size := len(encode(schema))) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(
                f"grammar is not valid: it has {size} bytes, more than {MAX_GRAMMAR_BYTES}"
            )
        if "properties" in schema and "type" not in schema:
            schema = {**schema, "type": "object"}
        return Grammar(GrammarKind.JSON_SCHEMA, encode(_closed(schema)).decode())
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"grammar is not valid: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("grammar is not valid: it is nested too deeply") from error


def _named_schema(value: Mapping[str, Any] | str, place: str) -> Grammar:
    """`{"name": …, "schema": …}`, TGI's form of a `json_schema`."""
    schema = value.get("schema") if isinstance(value, Mapping) else None
    if not isinstance(schema, Mapping):
        raise MalformedBody(f"{place}.value: missing field `schema`", field=f"{place}.value")
    return json_schema(schema)


def _regex(value: Mapping[str, Any] | str, place: str) -> Grammar:
    if not isinstance(value, str):
        raise MalformedBody(f"{place}.value: expected a string", field=f"{place}.value")
    return Grammar(GrammarKind.REGEX, value)


_FORMS: Mapping[str, Callable[[Mapping[str, Any] | str, str], Grammar]] = {
    "json": lambda value, _: json_schema(value),
    "json_object": lambda value, _: json_schema(value),
    "json_schema": _named_schema,
    "regex": _regex,
}


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with closed objects: they have only the properties that it names, as in TGI.

    JSON Schema lets an object have further properties unless it is closed, and a model would
    invent some. Nothing is closed when several parts describe one object: no part knows the
    properties of the others.
    """
    return schema if any(map(_has_parts, _subschemas(schema))) else _close(schema)


def _subschemas(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema itself and every schema inside it."""
    left: list[Any] = [schema]
    while left:
        schema = left.pop()
        if isinstance(schema, Mapping):
            yield schema
            left += [schema[key] for key in _ONE if key in schema]
            for key in _LIST:
                left += _parts(schema, key)
            for key in _TABLE:
                if isinstance(table := schema.get(key), Mapping):
                    left += table.values()


def _has_parts(schema: Mapping[str, Any]) -> bool:
    """Whether more than one part says which properties one object has."""
    if "allOf" in schema:
        return True
    if "properties" not in schema:
        return False
    parts = [*_parts(schema, "anyOf"), *_parts(schema, "oneOf")]
    return "$ref" in schema or any(
        "properties" in part or "$ref" in part for part in parts if isinstance(part, Mapping)
    )


def _parts(schema: Mapping[str, Any], key: str) -> list[Any]:
    parts = schema.get(key)
    return parts if isinstance(parts, list) else []


def _close(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key in _ONE:
        if key in closed:
            closed[key] = _close(closed[key])
    for key in _LIST:
        if isinstance(closed.get(key), list):
            closed[key] = [_close(each) for each in closed[key]]
    for key in _TABLE:
        if isinstance(closed.get(key), Mapping):
            closed[key] = {name: _close(each) for name, each in closed[key].items()}
    is_open = "patternProperties" in closed or requires_unnamed(closed)
    if "properties" in closed and not is_open:
        closed.setdefault("additionalProperties", False)
    return closed
