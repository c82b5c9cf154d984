"""Common client libraries against the real routes."""

from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import ValidationError
from tests.fakes.fake_loop import EOS, FakeLoop, step_events_of
from tests.fakes.fake_server import serving

from kagami_router.request.values import FinishReason, Token

HI = Token(40, "Hi", -0.25, False)
BANG = Token(41, "!", -0.5, False)
MESSAGES = [{"role": "user", "content": "Say hi"}]


# The headers that a browser sends without a preflight request.
UNASKED = {"accept", "accept-encoding", "accept-language", "connection", "content-length", "host",
           "user-agent"}  # fmt: skip


@pytest.mark.parametrize("client_type", [openai.AsyncOpenAI, anthropic.AsyncAnthropic])
async def test_a_browser_may_send_all_that_openais_and_anthropics_clients_send(
    client_type: Any,
) -> None:
    sent: set[str] = set()

    async def remember(request: web.Request) -> web.Response:
        sent.update(name.lower() for name in request.headers)
        return web.Response(status=404)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", remember)
    async with TestServer(app) as elsewhere:
        client = client_type(base_url=str(elsewhere.make_url("/")), api_key="k", max_retries=0)
        async with client:
            with pytest.raises(Exception, match="404"):
                await client.post("/x", body={}, cast_to=object)
    async with serving() as server, server.http.options("/v1/messages") as response:
        allowed = response.headers["access-control-allow-headers"].split(",")
    assert len(sent) > 10
    assert sent - UNASKED <= set(allowed)


def hi_loop() -> FakeLoop:
    return FakeLoop(
        lambda request: [
            *step_events_of(
                [HI, BANG, EOS],
                FinishReason.EOS_TOKEN,
                top_tokens=(HI, BANG)[: request.top_n_tokens],
            )
        ]
    )


@asynccontextmanager
async def openai_client():
    async with (
        serving(hi_loop()) as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


@asynccontextmanager
async def hub_client():
    async with (
        serving(hi_loop()) as server,
        AsyncInferenceClient(base_url=server.url) as client,
    ):
        yield client


async def test_openai_chat() -> None:
    async with openai_client() as client:
        answer = await client.chat.completions.create(
            model="tgi", messages=MESSAGES, logprobs=True, top_logprobs=2, stop="x"
        )
    assert answer.choices[0].message.content == "Hi!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].token == "!"
    assert answer.usage.completion_tokens == 3


async def test_openai_chat_stream() -> None:
    async with openai_client() as client:
        stream = await client.chat.completions.create(
            model="tgi", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == "Hi!"
    assert chunks[-1].usage.total_tokens == 31


async def test_openais_stream_helper_assembles_one_message() -> None:
    async with (
        openai_client() as client,
        client.chat.completions.stream(model="tgi", messages=MESSAGES) as stream,
    ):
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hi!"


async def test_openai_completions_both_ways() -> None:
    async with openai_client() as client:
        whole = await client.completions.create(model="tgi", prompt=["a", "b"], max_tokens=5)
        stream = await client.completions.create(model="tgi", prompt="a", max_tokens=5, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert [choice.text for choice in whole.choices] == ["Hi!", "Hi!"]
    assert text == "Hi!"


async def test_openai_reads_logprobs_and_the_prompt_in_front() -> None:
    async with openai_client() as client:
        answer = await client.completions.create(
            model="tgi", prompt=[5, 6], max_tokens=5, logprobs=2, echo=True, best_of=2, stop=["x"]
        )
    (choice,) = answer.choices
    assert choice.text.endswith("Hi!")
    assert choice.logprobs.tokens == ["Hi", "!", "</s>"]
    assert choice.logprobs.token_logprobs == [-0.25, -0.5, -0.0625]
    assert choice.logprobs.top_logprobs[0] == {"Hi": -0.25, "!": -0.5}
    assert choice.logprobs.text_offset == [2, 4, 5]
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_openai_errors_are_raised_before_a_stream_begins() -> None:
    async with openai_client() as client:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            await client.chat.completions.create(
                model="tgi", messages=MESSAGES, temperature=-1, stream=True
            )
    assert "temperature" in str(refused.value.body)


async def test_openai_lists_the_model() -> None:
    async with openai_client() as client:
        assert [model.id async for model in client.models.list()] == ["M"]


async def test_hub_text_generation() -> None:
    async with hub_client() as client:
        answer = await client.text_generation(
            "a", max_new_tokens=5, details=True, decoder_input_details=True, top_n_tokens=2
        )
    assert answer.generated_text == "aHi!"
    assert answer.details.finish_reason == "eos_token"
    assert answer.details.tokens[-1].special


async def test_hub_text_generation_stream() -> None:
    async with hub_client() as client:
        events = [
            event async for event in await client.text_generation("a", stream=True, details=True)
        ]
    assert [event.index for event in events] == [1, 2, 3]
    assert events[-1].generated_text == "aHi!"
    assert events[-1].details.input_length == 2


async def test_hub_chat_both_ways() -> None:
    async with hub_client() as client:
        whole = await client.chat_completion(MESSAGES, max_tokens=5)
        stream = await client.chat_completion(MESSAGES, max_tokens=5, stream=True)
        text = "".join([chunk.choices[0].delta.content async for chunk in stream])
    assert whole.choices[0].message.content == text == "Hi!"


async def test_hub_sees_a_validation_error_as_one() -> None:
    async with hub_client() as client:
        with pytest.raises(ValidationError, match="`inputs` cannot be empty"):
            await client.text_generation("", max_new_tokens=5)
