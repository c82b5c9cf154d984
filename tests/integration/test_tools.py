"""Tools with the embedded model, which was never taught any: only the grammar makes it call."""

import asyncio
import json
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from langchain_openai import ChatOpenAI
from tests.integration.conftest import Server

pytestmark = pytest.mark.slow

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"$ref": "#/$defs/City"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
    "$defs": {"City": {"type": "string", "maxLength": 12}},
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Says the weather", "parameters": SCHEMA},
    },
    {"type": "function", "function": {"name": "now", "description": "Tells the time"}},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
MODEL = "kagami/SmolLM2-135M-Instruct"
ASKED: dict[str, Any] = {
    "model": MODEL,
    "messages": MESSAGES,
    "tools": TOOLS,
    "parallel_tool_calls": False,
    "max_tokens": 80,
}


def check(name: str, arguments: str) -> None:
    """Raises unless the arguments are what this tool takes."""
    given = json.loads(arguments)
    if name == "now":
        assert given == {}
        return
    assert name == "weather"
    assert {"city", "unit"} <= given.keys() <= {"city", "unit", "days"}
    assert isinstance(given["city"], str)
    assert len(given["city"]) <= 12
    assert given["unit"] in ("celsius", "fahrenheit")
    assert given.get("days", 1) in range(1, 10)


@pytest.fixture
def server(bf16_server: Server) -> Server:
    """As it is served by default; no text here is compared with another batch's."""
    return bf16_server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


async def _many(server: Server, **fields: Any) -> list[Any]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        return await asyncio.gather(
            *(
                client.chat.completions.create(
                    **{**ASKED, "temperature": 1.0, "seed": seed, **fields}
                )
                for seed in range(12)
            )
        )


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_calls_are_valid_whatever_the_seed(server: Server, choice: Any) -> None:
    for answer in await _many(server, tool_choice=choice):
        (one,) = answer.choices
        assert one.finish_reason == "tool_calls"
        assert one.message.content is None
        (call,) = one.message.tool_calls
        check(call.function.name, call.function.arguments)
        assert choice == "required" or call.function.name == "weather"


async def test_streamed_calls_are_those_of_the_whole_answer(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        asked = {**ASKED, "tool_choice": "required", "temperature": 0}
        whole = await client.chat.completions.create(**asked)
        stream = await client.chat.completions.create(**asked, stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]
    pieces = [piece for chunk in chunks for piece in chunk.delta.tool_calls or ()]
    (call,) = whole.choices[0].message.tool_calls
    assert [piece.function.name for piece in pieces if piece.id] == [call.function.name]
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments
    assert [chunk.finish_reason for chunk in chunks][-2:] == [None, "tool_calls"]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_model_that_repeats_a_call_is_ended_before_its_limit(
    server: Server, is_stream: bool
) -> None:
    now = {**ASKED, "tools": TOOLS[1:], "parallel_tool_calls": True, "max_tokens": 400}
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        asked: dict[str, Any] = {**now, "tool_choice": "required", "temperature": 0}
        if is_stream:
            stream = await client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}
            )
            *chunks, last = [chunk async for chunk in stream]
            deltas = [chunk.choices[0].delta for chunk in chunks]
            calls = [piece.id for delta in deltas for piece in delta.tool_calls or () if piece.id]
            reason, usage = chunks[-1].choices[0].finish_reason, last.usage
        else:
            whole = await client.chat.completions.create(**asked)
            calls = [call.id for call in whole.choices[0].message.tool_calls]
            reason, usage = whole.choices[0].finish_reason, whole.usage
    assert (len(calls), reason) == (1, "tool_calls")
    assert usage is not None
    assert usage.completion_tokens < 100


async def test_auto_is_text_or_valid_calls(server: Server) -> None:
    for answer in await _many(server, max_tokens=30):
        (one,) = answer.choices
        assert one.message.content or one.message.tool_calls
        if one.finish_reason == "tool_calls":
            for call in one.message.tool_calls:
                check(call.function.name, call.function.arguments)


def test_small_talk_is_answered_in_text(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello! How are you?"}]
    answer = client.chat.completions.create(
        **{**ASKED, "messages": messages, "temperature": 0, "max_tokens": 20}
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_a_schema_that_does_not_compile_names_its_tool(client: openai.OpenAI) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
    tools: list[Any] = [*TOOLS, {"type": "function", "function": {"name": "b", "parameters": bad}}]
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        client.chat.completions.create(**{**ASKED, "tools": tools})
    assert "`parameters` of the tool b" in str(raised.value)


def test_openai_round_trip(client: openai.OpenAI) -> None:
    asked = client.chat.completions.create(**ASKED, tool_choice=NAMED, temperature=0)
    message = asked.choices[0].message
    assert message.tool_calls
    result: Any = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": [{"type": "text", "text": "Sunny, 24 degrees"}],
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=[*MESSAGES, message, result], temperature=0, max_tokens=30
    )
    assert answer.choices[0].message.content


def test_huggingface_hub_round_trip(server: Server) -> None:
    client = InferenceClient(base_url=server.url)
    asked = client.chat_completion(
        MESSAGES, tools=TOOLS, tool_choice=NAMED, temperature=0, max_tokens=80
    )
    message = asked.choices[0].message
    assert asked.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls
    (call,) = message.tool_calls
    check(call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 24 degrees"}
    answer = client.chat_completion([*MESSAGES, message, result], max_tokens=20)
    assert answer.choices[0].message.content


def test_huggingface_hub_streams_a_call(server: Server) -> None:
    client = InferenceClient(base_url=server.url)
    chunks = client.chat_completion(
        MESSAGES, tools=TOOLS, tool_choice=NAMED, temperature=0, max_tokens=80, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    assert pieces[0].function.name == "weather"
    check("weather", "".join(piece.function.arguments for piece in pieces))


def test_langchain_round_trip(server: Server) -> None:
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="-", model=MODEL, max_tokens=80)
    asked = model.bind_tools(TOOLS, tool_choice="weather").invoke(MESSAGES)
    (call,) = asked.tool_calls
    check(call["name"], json.dumps(call["args"]))
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Sunny, 24 degrees"}
    assert model.invoke([*MESSAGES, asked, result]).content


def test_langchain_streams_a_call(server: Server) -> None:
    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="-", model=MODEL, max_tokens=80)
    whole: Any = None
    for chunk in model.bind_tools(TOOLS, tool_choice="weather").stream(MESSAGES):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    check(call["name"], json.dumps(call["args"]))
