"""/v1/responses through the openai client."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.fakes.fake_loop import FakeLoop
from tests.router.api.openai.test_chat_tools import ARGUMENTS, CALL, serving_tools
from tests.router.api.responses.test_responses import TOOL, failing, prompt_of, saying


class Place(BaseModel):
    city: str


@asynccontextmanager
async def client_of(loop: FakeLoop) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving_tools(loop) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


async def test_the_client_reads_text_and_usage() -> None:
    async with client_of(saying("Hello there!")) as client:
        response = await client.responses.create(model="tgi", input="Hi", max_output_tokens=9)
    assert response.output_text == "Hello there!"
    assert response.model == "M"
    assert response.usage is not None
    assert response.usage.output_tokens == 4


async def test_the_client_streams() -> None:
    async with client_of(saying("Hello there!")) as client:
        stream = await client.responses.create(model="tgi", input="Hi", stream=True)
        pieces = [one.delta async for one in stream if one.type == "response.output_text.delta"]
    assert pieces == ["Hello", " ther", "e!"]


async def test_the_clients_stream_helper_assembles_the_answer() -> None:
    async with (
        client_of(saying('{"city":"Rome"}')) as client,
        client.responses.stream(model="tgi", input="Where?", text_format=Place) as stream,
    ):
        response = await stream.get_final_response()
    assert response.output_parsed == Place(city="Rome")


async def test_the_client_parses_structured_output() -> None:
    async with client_of(saying('{"city":"Rome"}')) as client:
        response = await client.responses.parse(model="tgi", input="Where?", text_format=Place)
    assert response.output_parsed == Place(city="Rome")


async def test_the_clients_tool_round_trip() -> None:
    loop = saying(CALL)
    async with client_of(loop) as client:
        items: list[Any] = [{"role": "user", "content": "Weather?"}]
        tools: list[Any] = [openai.pydantic_function_tool(Place, name="weather")]
        tools = [{"type": "function", **tools[0]["function"]}]
        first = await client.responses.create(model="tgi", input=items, tools=tools)
        items += first.output
        (call,) = first.output
        assert call.type == "function_call"
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "hot"})
        loop.play = saying("It is hot.").play
        second = await client.responses.create(model="tgi", input=items, tools=tools)
    assert json.loads(call.arguments) == {"city": "Rome"}
    assert second.output_text == "It is hot."
    assert ARGUMENTS in prompt_of(loop)


async def test_the_client_counts_the_tokens_of_a_prompt() -> None:
    async with client_of(saying("Hello")) as client:
        count = await client.responses.input_tokens.count(model="tgi", input="Hi", tools=[TOOL])
        response = await client.responses.create(model="tgi", input="Hi", tools=[TOOL])
    assert response.usage is not None
    assert count.input_tokens == response.usage.input_tokens


async def test_the_client_raises_its_own_types_before_a_stream() -> None:
    async with client_of(saying("Hello")) as client:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            await client.responses.create(
                model="tgi", input="Hi", previous_response_id="resp_1", stream=True
            )
    assert refused.value.param == "previous_response_id"


async def test_the_client_reads_an_error_within_a_stream() -> None:
    async with client_of(failing()) as client:
        stream = await client.responses.create(model="tgi", input="Hi", stream=True)
        read = [event async for event in stream]
    assert [event.type for event in read[-2:]] == ["error", "response.failed"]
