from typing import Any

import pytest

from kagami_proto.errors import ToolError
from kagami_router.tools.offers import (
    AUTO,
    MAX_CALLS,
    MAX_TOOLS,
    NONE,
    REQUIRED,
    Mode,
    ToolChoice,
    allowed_calls,
    read_choice,
    read_tools,
)

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def wire(name: Any = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def test_a_tool_without_parameters_takes_an_empty_object() -> None:
    (tool,) = read_tools([wire()])
    assert tool.schema == {"type": "object", "additionalProperties": False}


def test_tgis_arguments_are_parameters_for_the_template_too() -> None:
    (tool,) = read_tools([wire(arguments=SCHEMA)])
    assert tool.definition == wire(parameters=SCHEMA)


def test_the_template_gets_the_tool_as_it_was_sent() -> None:
    sent = wire(description="d", parameters=SCHEMA, strict=None)
    assert read_tools([sent])[0].definition == sent


def test_an_object_with_properties_has_no_others_unless_it_says_so() -> None:
    closed, opened = read_tools(
        [wire(parameters=SCHEMA), wire("g", parameters=SCHEMA | {"additionalProperties": True})]
    )
    assert closed.schema["additionalProperties"] is False
    assert opened.schema["additionalProperties"] is True


def test_a_schema_that_requires_what_it_does_not_name_stays_open() -> None:
    (tool,) = read_tools([wire(parameters=SCHEMA | {"required": ["unnamed"]})])
    assert "additionalProperties" not in tool.schema


def test_a_schema_of_several_parts_is_closed_with_the_names_of_all() -> None:
    parts = {"allOf": [{"properties": {"days": {"type": "integer"}}}]}
    (tool,) = read_tools([wire(parameters=SCHEMA | parts)])
    assert tool.schema["additionalProperties"] is False
    assert tool.schema["properties"].keys() == SCHEMA["properties"].keys() | {"days"}


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        ([3], "`tools[0]` must be"),
        ([{"type": "function"}], "`tools[0]` must be"),
        ([{"type": "retrieval", "function": {"name": "f"}}], "`tools[0].type` must be `function`"),
        ([wire("a b")], "`tools[0].function.name` must have 1 to 128"),
        ([wire("")], "`tools[0].function.name`"),
        ([wire("a" * 129)], "`tools[0].function.name`"),
        ([wire(None)], "`tools[0].function.name`"),
        ([wire("f"), wire("f")], "`tools[1]` has a name that was given before: f"),
        ([wire(parameters="x")], "`tools[0].function.parameters` must be a JSON schema"),
        ([wire(parameters={"type": "array"})], "must be the schema of an object. Given: 'array'"),
        ([wire(str(n)) for n in range(MAX_TOOLS + 1)], "`tools` must have at most 128 tools"),
    ],
)
def test_bad_tools_are_refused_by_place(tools: list[object], text: str) -> None:
    with pytest.raises(ToolError) as raised:
        read_tools(tools)
    assert text in str(raised.value)


@pytest.mark.parametrize("name", ["get_weather", "mcp.server/tool:1", "天気", "a-b"])
def test_names_from_elsewhere_are_taken(name: str) -> None:
    assert read_tools([wire(name)])[0].name == name


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, AUTO),
        ("auto", AUTO),
        ("none", NONE),
        ("required", REQUIRED),
        ("f", ToolChoice(Mode.REQUIRED, ("f",), max_calls=1)),
        ({"type": "function", "function": {"name": "f"}}, ToolChoice(Mode.REQUIRED, ("f",), 1)),
        ({"function": {"name": "f"}}, ToolChoice(Mode.REQUIRED, ("f",), max_calls=1)),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [wire("f")]}},
            ToolChoice(Mode.AUTO, ("f",)),
        ),
    ],
)
def test_choices(choice: object, expected: ToolChoice) -> None:
    assert read_choice(choice) == expected


@pytest.mark.parametrize(
    "choice",
    [3, [], {}, {"type": "function"}, {"type": "custom", "function": {"name": "f"}}],
)
def test_other_choices_are_refused(choice: object) -> None:
    with pytest.raises(ToolError, match="`tool_choice` must be"):
        read_choice(choice)


def test_an_unknown_tool_is_named_as_tgi_names_it() -> None:
    with pytest.raises(ToolError, match=r"^Tool with name foo not found$"):
        allowed_calls(read_tools([wire()]), read_choice("foo"), is_parallel=True)


def test_a_choice_without_tools_is_refused() -> None:
    with pytest.raises(ToolError, match="only allowed when `tools` are given"):
        allowed_calls((), REQUIRED, is_parallel=True)


@pytest.mark.parametrize("choice", [AUTO, NONE])
def test_no_tools_make_no_calls(choice: ToolChoice) -> None:
    assert allowed_calls((), choice, is_parallel=True) is None


def test_none_makes_no_calls() -> None:
    assert allowed_calls(read_tools([wire()]), NONE, is_parallel=True) is None


def test_without_parallel_calls_there_is_one_at_most() -> None:
    tools = read_tools([wire()])
    counts = [allowed_calls(tools, AUTO, is_parallel=one) for one in (True, False)]
    assert [one.max_calls for one in counts if one] == [MAX_CALLS, 1]


def test_a_tool_that_is_named_is_called_once() -> None:
    calls = allowed_calls(read_tools([wire("f")]), read_choice("f"), is_parallel=True)
    assert calls
    assert calls.max_calls == 1
