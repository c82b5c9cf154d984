"""Calls and parts that come back, over every chat route."""

from typing import Any

import pytest
from tests.fakes.fake_server import TEMPLATE, TOKENS, FakeServer
from tests.router.api.openai.test_chat_tools import saying, serving_tools

from kagami_router.api.answering.history import read_arguments
from kagami_router.text.chat_template import ChatTemplate

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
ABSENT = object()
READS_CALLS = ChatTemplate(
    "{% for m in messages if m.tool_calls %}{% for name in m.tool_calls[0].function.arguments %}"
    "{{ name }}{% endfor %}|{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}",
    TOKENS,
)


def body_of(path: str, arguments: object) -> dict[str, Any]:
    """A conversation whose second message is a call with these arguments."""
    name = "input" if path == MESSAGES else "arguments"
    given = {} if arguments is ABSENT else {name: arguments}
    user = {"role": "user", "content": "a"}
    if path == CHAT:
        call = {"id": "c", "type": "function", "function": {"name": "f", **given}}
        turns = [user, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return {"messages": [*turns, {"role": "tool", "tool_call_id": "c", "content": "r"}]}
    if path == RESPONSES:
        call = {"type": "function_call", "call_id": "c", "name": "f", **given}
        result = {"type": "function_call_output", "call_id": "c", "output": "r"}
        return {"input": [user, call, result]}
    call = {"type": "tool_use", "id": "c", "name": "f", **given}
    result = {"type": "tool_result", "tool_use_id": "c", "content": "r"}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    return {"max_tokens": 5, "messages": [user, *turns]}


def with_part(path: str, role: str, part: object) -> dict[str, Any]:
    """A conversation whose first message has this part."""
    messages = [{"role": role, "content": [part]}, {"role": "user", "content": "b"}]
    return {"input": messages} if path == RESPONSES else {"messages": messages}


async def prompt(server: FakeServer, path: str, body: dict[str, Any]) -> str:
    async with server.post(path, {"model": "m"} | body) as response:
        assert response.status == 200, await response.text()
    return server.loop.requests[-1].prompt_text


async def refusal(path: str, body: dict[str, Any]) -> str:
    async with (
        serving_tools(saying("Hi")) as server,
        server.post(path, {"model": "m"} | body) as response,
    ):
        assert response.status == 422
        error = (await response.json())["error"]
        return str(error["message"])


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("arguments", [None, ABSENT, "", " ", "null", "{}", {}])
async def test_no_arguments_are_an_empty_object_in_any_spelling(
    path: str, arguments: object
) -> None:
    body = body_of(path, arguments)
    async with serving_tools(saying("Hi"), template=READS_CALLS) as server:
        assert await prompt(server, path, body) == "|{}"
    async with serving_tools(saying("Hi")) as server:
        assert '{"name": "f", "arguments": {}}' in await prompt(server, path, body)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("arguments", ['{"city": "Köln"}', {"city": "Köln"}])
async def test_arguments_are_an_object_or_its_text(path: str, arguments: object) -> None:
    body = body_of(path, arguments)
    async with serving_tools(saying("Hi"), template=READS_CALLS) as server:
        assert await prompt(server, path, body) == 'city|{"city": "Köln"}'
    async with serving_tools(saying("Hi")) as server:
        assert '"arguments": {"city": "Köln"}}' in await prompt(server, path, body)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (CHAT, "messages[1].tool_calls[0].function.arguments"),
        (RESPONSES, "input[1].arguments"),
        (MESSAGES, "messages[1].content[0].input"),
    ],
)
@pytest.mark.parametrize("arguments", ['{"city": "Ro', "{city}", "[1]", "3", 3, [], "[" * 9999])
async def test_arguments_that_are_no_object_are_named(
    path: str, place: str, arguments: object
) -> None:
    text = await refusal(path, body_of(path, arguments))
    assert f"`{place}` must be an object, or the JSON text of one. Given: " in text
    assert len(text) < 300


def test_arguments_as_text_are_the_ones_that_were_sent() -> None:
    assert "a" + read_arguments("x", '{"b":1}') + "c" == 'a{"b":1}c'


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "refusal", "refusal": "I cannot"},
        {"type": "text", "text": "I cannot"},
        {"type": "input_text", "text": "I cannot"},
        {"type": "output_text", "text": "I cannot", "annotations": []},
    ],
)
async def test_parts_with_a_text_are_read(path: str, part: dict[str, Any]) -> None:
    for template in (TEMPLATE, "{% for m in messages %}{{ m.content[0].text }}\n{% endfor %}"):
        async with serving_tools(saying("Hi"), template=ChatTemplate(template, TOKENS)) as server:
            assert "I cannot\n" in await prompt(server, path, with_part(path, "assistant", part))


async def test_a_refusal_that_comes_back_is_the_messages_text() -> None:
    said = {"role": "assistant", "content": None, "refusal": "I cannot"}
    body = {"messages": [said, {"role": "user", "content": "b"}]}
    async with serving_tools(saying("Hi")) as server:
        assert "<|assistant|>I cannot\n" in await prompt(server, CHAT, body)


@pytest.mark.parametrize(("path", "name"), [(CHAT, "messages"), (RESPONSES, "input")])
@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"type": "input_audio", "input_audio": {}}, "is an audio (`input_audio`), and this model"),
        ({"type": "file", "file": {"file_id": "f"}}, "is a file (`file`), and this model"),
        ({"type": "input_file", "file_id": "f"}, "is a file (`input_file`), and this model"),
        ({"type": "image_url", "image_url": {}}, "is an image (`image_url`), and this model"),
        ({"type": "hologram"}, "expected one of the types text, "),
        ({"type": "text"}, "missing field `text`"),
        ({"type": "refusal", "refusal": None}, "missing field `refusal`"),
        ({"type": "text", "text": 3}, "text: expected a string"),
        ({"text": "a"}, 'expected {"type":"text"'),
        ("a", 'expected {"type":"text"'),
        ({"type": ["text"], "text": "a"}, 'expected {"type":"text"'),
    ],
)
async def test_parts_without_a_text_are_refused_by_name_and_place(
    path: str, name: str, part: object, text: str
) -> None:
    refused = await refusal(path, with_part(path, "user", part))
    assert f"{name}[0].content[0]" in refused
    assert text in refused


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
async def test_a_developer_is_the_system(path: str, role: str) -> None:
    name = "input" if path == RESPONSES else "messages"
    turns = [{"role": role, "content": "a"}, {"role": role, "content": "b"}]
    body = {name: [*turns, {"role": "user", "content": "c"}]}
    async with serving_tools(saying("Hi")) as server:
        said = await prompt(server, path, body)
    assert said == "<|system|>a\n<|system|>b\n<|user|>c\n<|assistant|>"
    one = ChatTemplate("{{ messages[0].role }}={{ messages[0].content }}", TOKENS)
    async with serving_tools(saying("Hi"), template=one) as server:
        assert await prompt(server, path, body) == "system=a\n\nb"
