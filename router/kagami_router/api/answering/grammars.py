"""Turns TGI's and OpenAI's fields for constrained output into a `Grammar`.

Only the shape of the fields is checked here. Validation asks a shard whether the grammar compiles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_proto.values import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.native import GrammarType
from kagami_router.api.schemas.openai import OpenAIRequest, ResponseFormat, StructuredOutputs
from kagami_router.tools.json_schema import closed
from kagami_router.tools.lark import literal

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
        if given.schema is not None:
            return json_schema(given.schema)
        if given.type in ("json", "json_object"):
            return json_schema(_ANY_OBJECT)
        raise MalformedBody("response_format: missing field `value`", field="response_format")
    return _FORMS[given.type](given.value, "response_format")


def asked(body: OpenAIRequest) -> Grammar | None:
    """What a chat or a completion holds its answer to, in whichever spelling it asks.

    Raises `InvalidRequest`, also for several at once.
    """
    given = {name: value for name, value in _spelled(body) if value is not None}
    if len(given) > 1:
        raise InvalidRequest(
            f"{' and '.join(f'`{name}`' for name in given)} exclude each other",
            field=next(iter(given)),
        )
    for name, value in given.items():
        return _SPELLINGS[name.rpartition(".")[2].removeprefix("guided_")](value, name)
    return None


def _spelled(body: OpenAIRequest) -> Iterator[tuple[str, Any]]:
    """Each field that may hold an answer, with its value."""
    shown = body.response_format
    yield "response_format", None if shown is None or shown.type == "text" else shown
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        yield name, getattr(body, name)
    for name in ("regex", "ebnf", "json_schema"):
        yield name, getattr(body, name)
    inner = body.structured_outputs or StructuredOutputs()
    for name in ("json", "regex", "choice", "grammar", "structural_tag"):
        yield f"structured_outputs.{name}", getattr(inner, name)
    yield "structured_outputs.json_object", inner.json_object or None


def _choice(texts: Sequence[str], name: str) -> Grammar:
    if not texts:
        raise InvalidRequest(f"`{name}` must have at least one text", field=name)
    return Grammar(GrammarKind.LARK, f"start: {' | '.join(map(literal, texts))}\n")


def _lark(source: str, name: str) -> Grammar:
    if "::=" in source:
        raise InvalidRequest(
            f"`{name}` must be a grammar in Lark's notation; GBNF (`::=`) is not served", field=name
        )
    return Grammar(GrammarKind.LARK, source)


def _not_served(value: object, name: str) -> NoReturn:
    raise InvalidRequest(f"`{name}` is not served", field=name)


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


_SPELLINGS: Mapping[str, Callable[[Any, str], Grammar | None]] = {
    "response_format": lambda value, _: response_format(value),
    "json": lambda value, _: json_schema(value),
    "json_schema": lambda value, _: json_schema(value),
    "json_object": lambda *_: json_schema(_ANY_OBJECT),
    "regex": lambda value, _: Grammar(GrammarKind.REGEX, value),
    "choice": _choice,
    "grammar": _lark,
    "ebnf": _lark,
    "structural_tag": _not_served,
}
