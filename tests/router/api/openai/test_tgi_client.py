"""TGI's own Python client over a scripted model, and how it is told apart from others."""

import asyncio
import json
from typing import Any

import openai
import pytest
import text_generation
from tests.fakes.fake_loop import EOS, FakeLoop, step_events_of
from tests.fakes.fake_server import FakeServer
from tests.router.api.openai.test_chat_tools import (
    ARGUMENTS,
    CALL,
    OTHER,
    TOOL,
    saying,
    serving_tools,
)
from text_generation.types import ChatCompletionChunk, ChatRequest, Message, Tool

from kagami_proto.errors import GenerationFailed
from kagami_router.api.openai.tgi_client import is_tgi_client
from kagami_router.request.values import FinishReason, Token

pytestmark = pytest.mark.filterwarnings(
    "ignore::pydantic.warnings.PydanticDeprecatedSince20"  # the client's own
)
MESSAGES = [Message(role="user", content="Say hi")]
TOOLS = [Tool(**TOOL)]
TEXT = "Hello there!"
# What `tgi` 2.4 sends beside what `text-generation` 0.7 sends.
NEWER = {"tool_prompt": None, "stop": None}


def body_of(more: dict[str, Any] | None = None, **fields: Any) -> bytes:
    """A body as the client writes it."""
    asked = ChatRequest(model="tgi", messages=MESSAGES, **fields).model_dump() | (more or {})
    return json.dumps(asked).encode()


async def sync_chunks(server: FakeServer, **fields: Any) -> list[ChatCompletionChunk]:
    client = text_generation.Client(server.url)
    return await asyncio.to_thread(lambda: list(client.chat(MESSAGES, stream=True, **fields)))


async def async_chunks(server: FakeServer, **fields: Any) -> list[ChatCompletionChunk]:
    client = text_generation.AsyncClient(server.url)
    return [chunk async for chunk in await client.chat(MESSAGES, stream=True, **fields)]


BOTH = pytest.mark.parametrize("chunks_of", [sync_chunks, async_chunks])


@BOTH
async def test_text_generation_0_7_reads_a_stream_of_text(chunks_of: Any) -> None:
    async with serving_tools(saying(TEXT)) as server:
        chunks = await chunks_of(server, max_tokens=20)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    assert {chunk.choices[0].delta.role for chunk in chunks} == {"assistant"}
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]


@BOTH
async def test_text_generation_0_7_reads_several_choices_and_logprobs(chunks_of: Any) -> None:
    async with serving_tools(saying(TEXT)) as server:
        chunks = await chunks_of(server, max_tokens=20, n=2, logprobs=True)
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content for choice in own) == TEXT
        assert all(choice.logprobs["content"] for choice in own)


@BOTH
async def test_text_generation_0_7_reads_a_stream_of_calls(chunks_of: Any) -> None:
    async with serving_tools(saying(f"I look.\n{CALL}\n{OTHER}")) as server:
        chunks = await chunks_of(server, tools=TOOLS, tool_choice="auto", max_tokens=200)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I look.\n"
    calls = [delta.tool_calls for delta in deltas if delta.tool_calls]
    for index, arguments in enumerate([ARGUMENTS, ARGUMENTS.replace("Rome", "Oslo")]):
        own = [call for call in calls if call.index == index]
        assert [call.function.name for call in own if call.function.name] == ["weather"]
        assert "".join(call.function.arguments for call in own) == arguments
        assert len({call.id for call in own}) == 1
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_text_generation_0_7_reads_a_whole_answer_with_a_call() -> None:
    async with serving_tools(saying(CALL)) as server:
        client = text_generation.AsyncClient(server.url)
        answer = await client.chat(MESSAGES, tools=TOOLS, tool_choice="auto", max_tokens=200)
        sync = text_generation.Client(server.url)
        same = await asyncio.to_thread(
            lambda: sync.chat(MESSAGES, tools=TOOLS, tool_choice="auto", max_tokens=200)
        )
    for choice in (answer.choices[0], same.choices[0]):
        (call,) = choice.message.tool_calls
        assert (call["function"]["name"], call["function"]["arguments"]) == ("weather", ARGUMENTS)
        assert choice.finish_reason == "tool_calls"


async def test_an_error_in_the_stream_is_raised() -> None:
    first = step_events_of([Token(3, "Hello", -0.5, False), EOS], FinishReason.EOS_TOKEN)[0]
    loop = FakeLoop(lambda _: [first, GenerationFailed("out of paper")])
    async with serving_tools(loop) as server:
        with pytest.raises(Exception, match="out of paper"):
            await async_chunks(server)


async def test_openais_helper_reads_the_same_answers() -> None:
    async with (
        serving_tools(saying(f"I look.\n{CALL}")) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
        client.chat.completions.stream(
            model="tgi", messages=[{"role": "user", "content": "Hi"}], tools=[TOOL], max_tokens=200
        ) as stream,
    ):
        message = (await stream.get_final_completion()).choices[0].message
    assert (message.role, message.content) == ("assistant", "I look.\n")
    assert [call.function.arguments for call in message.tool_calls] == [ARGUMENTS]


@pytest.mark.parametrize("more", [{}, NEWER, {"repetition_penalty": 1.2, "tools": [TOOL]}])
def test_tgis_clients_are_known(more: dict[str, Any]) -> None:
    assert is_tgi_client(body_of(more, stream=True))


@pytest.mark.parametrize(
    "body",
    [
        body_of({"stream_options": None}),
        body_of({"top_k": None}),
        body_of({"model": "other"}),
        body_of(stream=True).replace(b'"repetition_penalty": null, ', b""),
        body_of(stream=True).replace(b'"stream": true', b'"stream": null'),
        b'{"model": "tgi", "messages": [',
        b'{"model": "tgi", "messages": [], "stream": true}',
        b"[]",
        b"",
    ],
)
def test_others_are_not_taken_for_them(body: bytes) -> None:
    assert not is_tgi_client(body)
