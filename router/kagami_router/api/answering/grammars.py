"""Turns TGI's and OpenAI's fields for constrained output into a `Grammar`.

Only the shape of the fields is checked here. Validation asks a shard whether the grammar compiles.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_proto.values import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.native import GrammarType
from kagami_router.api.schemas.openai import ResponseFormat
from kagami_router.tools.json_schema import closed

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


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
        return Grammar(GrammarKind.JSON_SCHEMA, encode(closed(schema)).decode())
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
