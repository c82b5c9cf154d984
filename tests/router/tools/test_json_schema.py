"""Closed schemas, and what the real engine makes of them."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.fakes.byte_tokenizer import EOS, byte_tokenizer

from kagami_router.tools.json_schema import closed

NAME = {"name": {"type": "string"}}
AGE = {"age": {"type": "integer"}}
PERSON: dict[str, Any] = {"type": "object", "properties": NAME, "required": ["name"]}
AGED: dict[str, Any] = {"type": "object", "properties": AGE, "required": ["age"]}
BOTH = {"name": "a", "age": 1}


def takes(schema: dict[str, Any], value: Any) -> bool:
    source = LLMatcher.grammar_from_json_schema(
        json.dumps(closed(schema)),
        overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    )
    tokenizer = byte_tokenizer()
    made = LLMatcher(LLTokenizer(tokenizer.to_str(), eos_token=EOS), source, log_level=0)
    assert not made.is_error(), made.get_error()
    ids = tokenizer.encode(json.dumps(value), add_special_tokens=False).ids
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


@pytest.mark.parametrize(
    ("schema", "held"),
    [
        (PERSON | {"properties": {"name": {"allOf": [{"enum": ["a", "b"]}]}}}, {"name": "a"}),
        (PERSON | {"allOf": [{"description": "x"}]}, {"name": "a"}),
        ({"allOf": [PERSON]}, {"name": "a"}),
        ({"allOf": [PERSON, AGED]}, BOTH),
        (PERSON | {"allOf": [AGED]}, BOTH),
        (PERSON | {"$ref": "#/$defs/aged", "$defs": {"aged": AGED}}, BOTH),
        ({"$ref": "#/$defs/aged", "description": "x", "$defs": {"aged": AGED}}, {"age": 1}),
        (
            {"$defs": {"aged": AGED}, "allOf": [{"$ref": "#/$defs/aged"}, PERSON]},
            {"age": 1, "name": "a"},
        ),
        ({"anyOf": [PERSON, AGED]}, {"age": 1}),
        (PERSON | {"properties": NAME | AGE, "anyOf": [{"required": ["age"]}]}, BOTH),
        (
            {"type": "object", "properties": {"p": {"anyOf": [PERSON, {"type": "null"}]}}},
            {"p": {"name": "a"}},
        ),
        (
            {
                "type": "object",
                "properties": {"p": {"anyOf": [{"$ref": "#/$defs/p"}, {"type": "null"}]}},
                "$defs": {"p": PERSON},
            },
            {"p": {"name": "a"}},
        ),
        (
            {
                "type": "object",
                "properties": {"p": {"allOf": [{"$ref": "#/$defs/p"}], "default": None}},
                "$defs": {"p": PERSON},
            },
            {"p": {"name": "a"}},
        ),
    ],
)
def test_objects_of_several_parts_have_the_names_of_all_and_no_other(
    schema: dict[str, Any], held: dict[str, Any]
) -> None:
    assert takes(schema, held)
    if "p" in held:
        assert not takes(schema, {"p": held["p"] | {"more": 1}})
    assert not takes(schema, held | {"more": 1})


@pytest.mark.parametrize(
    "schema",
    [
        PERSON | {"additionalProperties": True},
        {"type": "object"},
        {"allOf": [PERSON, {"type": "object", "additionalProperties": True}]},
        PERSON | {"patternProperties": {"^m": {"type": "integer"}}},
    ],
)
def test_what_is_open_on_purpose_stays_open(schema: dict[str, Any]) -> None:
    assert takes(schema, {"name": "a", "more": 1})


def test_what_is_true_of_a_condition_alone_is_not_closed() -> None:
    condition = {"if": PERSON, "not": AGED}
    assert closed(PERSON | condition)["if"] == PERSON
    assert closed(PERSON | condition)["not"] == AGED


def test_references_in_a_circle_end() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "allOf": [{"$ref": "#"}]}
    assert closed(tree)["properties"] == tree["properties"]
