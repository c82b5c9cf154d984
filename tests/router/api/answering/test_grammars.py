import json
from typing import Any

import msgspec
import pytest

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_proto.values import MAX_GRAMMAR_BYTES, Grammar, GrammarKind
from kagami_router.api.answering import grammars
from kagami_router.api.schemas.native import GrammarType
from kagami_router.api.schemas.openai import CompletionRequest, ResponseFormat

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
CLOSED_PERSON = {**PERSON, "additionalProperties": False}
ANY_OBJECT = {"type": "object"}


def native(wire: object) -> Grammar | None:
    return grammars.native(msgspec.convert(wire, GrammarType))


def response_format(wire: object) -> Grammar | None:
    return grammars.response_format(msgspec.convert(wire, ResponseFormat))


def schema_of(grammar: Grammar | None) -> Any:
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    return json.loads(grammar.source)


@pytest.mark.parametrize(
    "wire",
    [
        {"type": "json", "value": PERSON},
        {"type": "json_object", "value": PERSON},
        {"type": "json", "value": json.dumps(PERSON)},
        {"type": "json_schema", "value": {"name": "person", "schema": PERSON}},
    ],
)
def test_every_form_of_a_schema_is_one_grammar(wire: object) -> None:
    assert schema_of(native(wire)) == CLOSED_PERSON
    assert schema_of(response_format(wire)) == CLOSED_PERSON


def test_openai_names_the_schema_its_own_way() -> None:
    wire = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}
    assert schema_of(response_format(wire)) == CLOSED_PERSON


def test_a_json_object_without_a_schema_is_any_object() -> None:
    assert schema_of(response_format({"type": "json_object"})) == ANY_OBJECT


def test_text_asks_for_no_grammar() -> None:
    assert response_format({"type": "text"}) is None


def test_a_regex_is_taken_as_it_is() -> None:
    assert native({"type": "regex", "value": "a+"}) == Grammar(GrammarKind.REGEX, "a+")


def test_a_schema_with_properties_is_an_object() -> None:
    wire = {"type": "json", "value": {"properties": {"a": {"type": "integer"}}}}
    assert schema_of(native(wire))["type"] == "object"


def test_objects_have_just_their_properties_at_every_depth() -> None:
    nested = {"items": {"anyOf": [PERSON, {"type": "null"}]}, "$defs": {"person": PERSON}}
    closed = schema_of(native({"type": "json", "value": nested}))
    assert closed["items"]["anyOf"][0] == CLOSED_PERSON
    assert closed["$defs"]["person"] == CLOSED_PERSON


@pytest.mark.parametrize("name", ["properties", "allOf", "$ref"])
def test_a_property_may_be_called_like_a_keyword(name: str) -> None:
    wire = {"type": "json", "value": {"type": "object", "properties": {name: PERSON}}}
    assert schema_of(native(wire))["properties"][name] == CLOSED_PERSON


def test_alternatives_that_name_no_properties_leave_an_object_closed() -> None:
    either = {**PERSON, "anyOf": [{"required": ["name"]}, True]}
    assert schema_of(native({"type": "json", "value": either}))["additionalProperties"] is False


@pytest.mark.parametrize(
    "opened",
    [
        {**PERSON, "additionalProperties": True},
        {**PERSON, "patternProperties": {"^x": {"type": "integer"}}},
        {**PERSON, "required": ["name", "age"]},
    ],
)
def test_what_is_open_on_purpose_stays_open(opened: dict[str, Any]) -> None:
    assert schema_of(native({"type": "json", "value": opened})) == opened


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        ({"type": "json", "value": "{"}, "grammar is not valid"),
        ({"type": "json", "value": "[1]"}, "grammar is not valid"),
        ({"type": "json_schema", "value": {"name": "x"}}, "missing field `schema`"),
        ({"type": "json_schema", "value": "x"}, "missing field `schema`"),
        ({"type": "regex", "value": {}}, "expected a string"),
    ],
)
def test_a_value_of_the_wrong_form_is_refused(wire: object, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        native(wire)


def test_a_response_format_without_its_value_is_refused() -> None:
    with pytest.raises(MalformedBody, match="missing field `value`"):
        response_format({"type": "regex"})


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        grammars.json_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{}] * 100_000},
        {"properties": {f"name_{n}": {"type": "string"} for n in range(5000)}},
        {"items": {"description": "x" * 100_000}},
        json.dumps({"enum": [f"name_{n}" for n in range(10_000)]}),
    ],
)
def test_a_schema_that_is_too_large_is_refused_before_it_is_walked(
    schema: dict[str, Any] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(grammars, "closed")
    with pytest.raises(InvalidRequest, match=f"bytes, more than {MAX_GRAMMAR_BYTES}"):
        grammars.json_schema(schema)


def asked(wire: dict[str, Any]) -> Grammar | None:
    return grammars.asked(msgspec.convert({"prompt": "x"} | wire, CompletionRequest))


@pytest.mark.parametrize(
    ("wire", "kind", "source"),
    [
        ({"response_format": {"type": "json_object", "schema": PERSON}}, "JSON_SCHEMA", None),
        ({"guided_json": PERSON}, "JSON_SCHEMA", None),
        ({"guided_json": json.dumps(PERSON)}, "JSON_SCHEMA", None),
        ({"json_schema": json.dumps(PERSON)}, "JSON_SCHEMA", None),
        ({"structured_outputs": {"json": PERSON}}, "JSON_SCHEMA", None),
        ({"guided_regex": "a+"}, "REGEX", "a+"),
        ({"regex": "a+"}, "REGEX", "a+"),
        ({"structured_outputs": {"regex": "a+"}}, "REGEX", "a+"),
        ({"guided_choice": ["a", 'b"']}, "LARK", 'start: "a" | "b\\""\n'),
        ({"structured_outputs": {"choice": ["a"]}}, "LARK", 'start: "a"\n'),
        ({"guided_grammar": 'start: "a"'}, "LARK", 'start: "a"'),
        ({"ebnf": 'start: "a"'}, "LARK", 'start: "a"'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "LARK", 'start: "a"'),
    ],
)
def test_other_servers_spellings_are_served(
    wire: dict[str, Any], kind: str, source: str | None
) -> None:
    grammar = asked(wire)
    assert grammar is not None
    assert grammar.kind is GrammarKind[kind]
    if source is None:
        assert schema_of(grammar) == CLOSED_PERSON
    else:
        assert grammar.source == source


def test_any_object_may_be_asked_for() -> None:
    assert schema_of(asked({"structured_outputs": {"json_object": True}})) == ANY_OBJECT
    assert asked({"structured_outputs": {"json_object": False}}) is None
    assert asked({"response_format": {"type": "text"}}) is None


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (
            {"guided_regex": "a", "structured_outputs": {"choice": ["a"]}},
            "`guided_regex` and `structured_outputs.choice` exclude each other",
        ),
        ({"guided_choice": []}, "`guided_choice` must have at least one text"),
        ({"ebnf": 'root ::= "a"'}, "`ebnf` must be a grammar in Lark's notation; GBNF"),
        (
            {"structured_outputs": {"structural_tag": {}}},
            "`structured_outputs.structural_tag` is not served",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(wire: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        asked(wire)
