"""/v1/messages through Anthropic's own client, over a fake loop."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anthropic
import pytest
from anthropic.types import Message
from pydantic import BaseModel
from tests.fakes.fake_loop import EOS, FakeLoop, step_events_of
from tests.fakes.fake_server import TEMPLATE, TOKENS, FakeServer, serving
from tests.router.api.openai.test_chat_tools import CALL, OTHER, QWEN, WIDE, compiles, saying
from tests.router.text.test_call_ids import WITH_CALL_ID

from kagami_proto.errors import GenerationFailed
from kagami_proto.values import GrammarKind
from kagami_router.api.answering.respond import respond
from kagami_router.request.values import FinishReason, Token
from kagami_router.text.chat_template import ChatTemplate

PATH = "/v1/messages"
HI = Token(40, "Hi", -0.25, False)
BANG = Token(41, "!", -0.5, False)
USER = {"role": "user", "content": "Say hi"}
BODY: dict[str, Any] = {"model": "tgi", "max_tokens": 8, "messages": [USER]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Says the weather", "input_schema": SCHEMA}
WITH_TOOL = BODY | {"tools": [TOOL], "max_tokens": 100}


def hi_loop(reason: FinishReason = FinishReason.EOS_TOKEN, **options: Any) -> FakeLoop:
    said = [HI, BANG, EOS] if reason is FinishReason.EOS_TOKEN else [HI, BANG]
    return FakeLoop(lambda _: [*step_events_of(said, reason, **options)])


@asynccontextmanager
async def client_of(
    loop: FakeLoop | None = None, **options: Any
) -> AsyncIterator[tuple[anthropic.AsyncAnthropic, FakeServer]]:
    options = {"limits": WIDE, "compile_grammar": compiles} | options
    async with (
        serving(loop or hi_loop(), **options) as server,
        anthropic.AsyncAnthropic(base_url=server.url, api_key="k", max_retries=0) as client,
    ):
        yield client, server


async def create(loop: FakeLoop | None = None, **fields: Any) -> Message:
    async with client_of(loop) as (client, _):
        message: Message = await client.messages.create(**BODY | fields)
    return message


async def streamed(loop: FakeLoop | None = None, **fields: Any) -> Message:
    async with client_of(loop) as (client, _), client.messages.stream(**BODY | fields) as stream:
        return await stream.get_final_message()


async def prompt_of(messages: list[Any], **fields: Any) -> str:
    """The prompt that the model gets."""
    template = fields.pop("template", None)
    async with client_of(template=template) as (client, server):
        await client.messages.create(**BODY | {"messages": messages} | fields)
        return server.loop.requests[0].prompt_text


async def refusal(**fields: Any) -> str:
    async with client_of() as (client, _):
        with pytest.raises(anthropic.UnprocessableEntityError) as refused:
            await client.messages.create(**BODY | fields)
    body = refused.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    return str(body["error"]["message"])


async def test_answer_has_anthropics_shape() -> None:
    async with serving(hi_loop()) as server, server.post(PATH, BODY) as response:
        answer = await response.json()
        headers = response.headers
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "M",
        "content": [{"type": "text", "text": "Hi!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 28,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 3,
        },
    }
    assert headers["request-id"] == headers["x-request-id"]
    assert headers["x-generated-tokens"] == "3"


@pytest.mark.parametrize("answer", [create, streamed])
async def test_the_client_reads_an_answer(answer: Any) -> None:
    message = await answer()
    (block,) = message.content
    assert block.type == "text"
    assert block.text == "Hi!"
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 3


def _ask(url: str) -> tuple[str, str]:
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        whole = client.messages.create(**BODY)
        with client.messages.stream(**BODY) as stream:
            text = "".join(stream.text_stream)
    return whole.content[0].text, text


async def test_the_synchronous_client_reads_both() -> None:
    async with serving(hi_loop()) as server:
        assert await asyncio.to_thread(_ask, server.url) == ("Hi!", "Hi!")


async def test_a_stream_has_anthropics_events_in_order() -> None:
    body = BODY | {"stream": True}
    async with serving(hi_loop()) as server, server.post(PATH, body) as response:
        assert "x-prompt-tokens" in response.headers
        blocks = (await response.text()).removesuffix("\n\n").split("\n\n")
    comments = [block for block in blocks if block.startswith(":")]
    events = [block.split("\ndata: ") for block in blocks if not block.startswith(":")]
    assert [name.removeprefix("event: ") for name, _ in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(name == f"event: {json.loads(data)['type']}" for name, data in events)
    (comment,) = comments
    assert "x-generated-tokens=3" in comment


async def test_each_step_is_one_piece_of_text() -> None:
    async with client_of() as (client, _), client.messages.stream(**BODY) as stream:
        assert [text async for text in stream.text_stream] == ["Hi", "!"]


@pytest.mark.parametrize("answer", [create, streamed])
async def test_cached_tokens_are_counted_apart(answer: Any) -> None:
    usage = (await answer(hi_loop(cached_tokens=20))).usage
    assert usage.input_tokens == 8
    assert usage.cache_read_input_tokens == 20


@pytest.mark.parametrize("answer", [create, streamed])
async def test_the_stop_sequence_that_was_found_is_in_the_answer(answer: Any) -> None:
    loop = hi_loop(FinishReason.STOP_SEQUENCE, stop="STOP")
    message = await answer(loop, stop_sequences=["x", "STOP"])
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == "STOP"
    assert loop.requests[0].stopping.stop == ("x", "STOP")
    assert not loop.requests[0].stopping.keep_stop


@pytest.mark.parametrize("answer", [create, streamed])
async def test_an_answer_cut_by_max_tokens_says_so(answer: Any) -> None:
    loop = hi_loop(FinishReason.LENGTH)
    assert (await answer(loop)).stop_reason == "max_tokens"
    assert loop.requests[0].stopping.max_new_tokens == 8


@pytest.mark.parametrize("answer", [create, streamed])
async def test_an_answer_cut_by_the_context_says_so(answer: Any) -> None:
    loop = hi_loop(FinishReason.LENGTH)
    message = await answer(loop, max_tokens=5000)
    assert message.stop_reason == "model_context_window_exceeded"
    assert loop.requests[0].stopping.max_new_tokens == 4096 - 28


@pytest.mark.parametrize("answer", [create, streamed])
async def test_an_empty_answer_has_one_empty_text(answer: Any) -> None:
    message = await answer(FakeLoop(lambda _: [*step_events_of([EOS], FinishReason.EOS_TOKEN)]))
    assert [block.text for block in message.content] == [""]


@pytest.mark.parametrize("answer", [create, streamed])
async def test_a_call_is_a_block_behind_the_text(answer: Any) -> None:
    message = await answer(saying("I look.\n" + CALL), tools=[TOOL], max_tokens=100)
    text, call = message.content
    assert text.text == "I look.\n"
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Rome"})
    assert call.id.startswith("toolu_")
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize("answer", [create, streamed])
async def test_several_calls_are_several_blocks(answer: Any) -> None:
    message = await answer(saying(f"{CALL}\n{OTHER}"), tools=[TOOL], max_tokens=100)
    assert [block.input for block in message.content] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert len({block.id for block in message.content}) == 2


async def test_a_call_that_was_cut_has_no_input() -> None:
    cut = saying(CALL[:50], FinishReason.LENGTH)
    message = await create(cut, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=100)
    assert message.stop_reason == "max_tokens"
    assert [block.input for block in message.content] == [{}]


async def test_a_conversation_with_tools_comes_back_as_it_was_said() -> None:
    async with client_of(saying(CALL), template=QWEN) as (client, server):
        first = await client.messages.create(**WITH_TOOL)
        (call,) = first.content
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}
        messages = [USER, first.to_param(), {"role": "user", "content": [result]}]
        await client.messages.create(**WITH_TOOL | {"messages": messages})
        prompt = server.loop.requests[1].prompt_text
    assert '"name": "weather", "arguments": {"city": "Rome"}' in prompt
    assert prompt.endswith("Sunny\n</tool_response>\n<|assistant|>")


@pytest.mark.parametrize(
    ("choice", "is_held", "max_calls"),
    [
        ({"type": "auto"}, False, 2),
        ({"type": "any"}, True, 2),
        ({"type": "tool", "name": "weather"}, True, 2),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, 1),
    ],
)
async def test_tool_choice(choice: dict[str, Any], is_held: bool, max_calls: int) -> None:
    async with client_of(saying(f"{CALL}\n{OTHER}")) as (client, server):
        message = await client.messages.create(**WITH_TOOL | {"tool_choice": choice})
        grammar = server.loop.requests[0].grammar
    calls = [block for block in message.content if block.type == "tool_use"]
    assert len(calls) == max_calls
    assert grammar is not None
    assert ('\nbody: "<tool_call>" calls\n' in grammar.source) is is_held


async def test_with_the_choice_none_no_tool_is_shown() -> None:
    prompt = await prompt_of([USER], tools=[TOOL], tool_choice={"type": "none"})
    assert prompt == "<|user|>Say hi\n<|assistant|>"


async def test_a_system_prompt_may_have_blocks() -> None:
    cached = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    prompt = await prompt_of([USER], system=[cached, {"type": "text", "text": "Be kind."}])
    assert prompt == "<|system|>Be brief.\nBe kind.\n<|user|>Say hi\n<|assistant|>"


async def test_a_late_system_message_joins_the_users_if_the_template_takes_one_first() -> None:
    one_first = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'system' and loop.index0 %}"
        "{{ raise_exception('only first') }}{% endif %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
        TOKENS,
    )
    messages = [USER, {"role": "system", "content": "Now short"}]
    said = await prompt_of(messages, system="Be kind", template=one_first)
    assert said == f"<|system|>Be kind<|user|>{USER['content']}\n\nNow short"
    assert "<|system|>Now short" in await prompt_of(messages, system="Be kind")


async def test_neighbours_of_one_role_are_one_message() -> None:
    prompt = await prompt_of([USER, {"role": "user", "content": "now"}])
    assert prompt == "<|user|>Say hi\nnow\n<|assistant|>"


async def test_an_answer_that_is_begun_is_continued() -> None:
    prompt = await prompt_of([USER, {"role": "assistant", "content": "Well,"}])
    assert prompt == "<|user|>Say hi\n<|assistant|>Well,"


async def test_what_was_thought_is_left_out() -> None:
    thought = {"type": "thinking", "thinking": "Hm", "signature": "s"}
    said = {"role": "assistant", "content": [thought, {"type": "text", "text": "Hi."}]}
    prompt = await prompt_of([USER, said, USER])
    assert prompt == "<|user|>Say hi\n<|assistant|>Hi.\n<|user|>Say hi\n<|assistant|>"


async def test_a_result_that_is_an_error_says_so() -> None:
    used = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
    text = {"type": "text", "text": "no net"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text], "is_error": True}
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{{ m.name }}:{{ m.tool_call_id }}:{{ m.content }};"
        "{% if m.tool_calls %}{% endif %}{% endfor %}{# 'tool' #}",
        TOKENS,
    )
    turns = [
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    prompt = await prompt_of([USER, *turns], template=template)
    assert prompt.endswith("tool:weather:toolu_1:Error: no net;user:::So?;")


async def test_ids_of_calls_have_the_form_that_the_template_takes() -> None:
    used = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sun"}
    turns = [{"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    prompt = await prompt_of([USER, *turns], template=ChatTemplate(WITH_CALL_ID, TOKENS))
    ids = re.findall(r"CALL_ID\](\w{9})\[ARGS|RESULTS\](\w{9})\[", prompt)
    assert ids[0][0] == ids[1][1]


async def test_thinking_that_is_disabled_reaches_the_template() -> None:
    template = ChatTemplate(TEMPLATE + "{{ enable_thinking }}", TOKENS)
    prompt = await prompt_of([USER], thinking={"type": "disabled"}, template=template)
    assert prompt.endswith("False")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"do_sample": True, "temperature": 1.0}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 5}, {"top_k": 5}),
    ],
)
async def test_sampling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    loop = hi_loop()
    async with serving(loop, limits=WIDE) as server, server.post(PATH, BODY | fields) as response:
        assert response.status == 200
    sampling = loop.requests[0].sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


class Place(BaseModel):
    city: str


async def test_a_schema_of_the_output_becomes_its_grammar() -> None:
    async with client_of(saying('{"city": "Rome"}')) as (client, server):
        message = await client.messages.parse(**BODY, output_format=Place)
        grammar = server.loop.requests[0].grammar
    assert message.parsed_output == Place(city="Rome")
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA


async def test_nulls_and_unknown_fields_mean_nothing() -> None:
    names = (
        "system tools tool_choice thinking output_config temperature top_p top_k stop_sequences"
        " stream metadata service_tier container"
    )
    body = BODY | dict.fromkeys(names.split()) | {"context_management": {"edits": []}}
    async with serving(hi_loop()) as server, server.post(PATH, body) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_tokens": 0}, "`max_tokens` must be strictly positive"),
        ({"messages": []}, "`messages` cannot be empty"),
        ({"stop_sequences": list("abcde")}, "`stop_sequences` supports up to 4"),
        ({"extra_body": {"temperature": -1}}, "`temperature` must be strictly positive"),
        ({"tools": [{"name": "s"}]}, "`tools[0].input_schema` is missing"),
        ({"tools": [TOOL, TOOL]}, "`tools[1]` has a name that was given before"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "`tool_choice.name` is missing"),
        ({"tool_choice": {"type": "any"}}, "`tool_choice` is only allowed when `tools`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "`messages[0].content[0]` is an image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "search_result"}]}]},
            "messages[0].content[0].type: Invalid value 'search_result'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "document"}]}, USER]},
            "`messages[0].content[0]` is a document",
        ),
    ],
)
async def test_what_is_refused_is_named(fields: dict[str, Any], text: str) -> None:
    assert text in await refusal(**fields)


async def test_a_missing_max_tokens_is_named() -> None:
    body = {"messages": [USER]}
    async with serving() as server, server.post(PATH, body) as response:
        assert response.status == 422
        assert "`max_tokens`" in (await response.json())["error"]["message"]


async def test_the_key_goes_as_the_client_sends_it() -> None:
    async with client_of(key="k") as (client, server):
        await client.messages.create(**BODY)
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="x") as stranger:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                await stranger.messages.create(**BODY)
    assert refused.value.type == "authentication_error"
    assert refused.value.request_id


async def test_no_permit_is_a_rate_limit() -> None:
    async with client_of(max_concurrent_requests=0) as (client, _):
        with pytest.raises(anthropic.RateLimitError, match="overloaded"):
            await client.messages.create(**BODY)


async def test_a_failed_generation_is_an_error_with_its_text() -> None:
    loop = FakeLoop(lambda _: [GenerationFailed("no memory")])
    async with client_of(loop) as (client, _):
        with pytest.raises(anthropic.APIStatusError, match="no memory") as failed:
            await client.messages.create(**BODY)
    assert failed.value.type == "api_error"


async def test_a_stream_that_fails_raises_in_the_client() -> None:
    loop = FakeLoop(lambda _: [step_events_of([HI, BANG])[0], GenerationFailed("no memory")])
    async with client_of(loop) as (client, _), client.messages.stream(**BODY) as stream:
        assert await anext(stream.text_stream) == "Hi"
        with pytest.raises(anthropic.APIStatusError, match="no memory"):
            await stream.get_final_message()


async def test_tokens_are_counted_as_they_will_be_used() -> None:
    body = {"model": "tgi", "messages": [USER], "system": "Be brief.", "tools": [TOOL]}
    async with client_of() as (client, server):
        counted = await client.messages.count_tokens(**body)
        await client.messages.create(**body, max_tokens=8)
        assert counted.input_tokens == len(server.loop.requests[0].prompt_ids)


async def test_the_clients_own_tool_loop_runs_to_its_end() -> None:
    @anthropic.beta_async_tool
    async def weather(city: str) -> str:
        """Says the weather."""
        return f"Sunny in {city}"

    answers = iter([saying(CALL), saying("It is sunny.")])
    async with client_of(FakeLoop(lambda request: next(answers).play(request))) as (client, server):
        fields = BODY | {"max_tokens": 100}
        runner = client.beta.messages.tool_runner(**fields, tools=[weather])
        reasons = [message.stop_reason async for message in runner]
        assert "Sunny in Rome" in server.loop.requests[1].prompt_text
    assert reasons == ["tool_use", "end_turn"]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_counted_and_their_permits_come_back(stream: bool) -> None:
    async with serving(hi_loop()) as server:
        async with server.post(PATH, BODY | {"stream": stream}) as response:
            await response.read()
        assert server.has_all_permits()
        assert "tgi_request_success 1" in server.readiness.metrics.render()


async def test_a_client_that_goes_away_ends_its_generation() -> None:
    loop = hi_loop()
    loop.gate.clear()
    async with serving(loop) as server:
        async with server.post(PATH, BODY | {"stream": True}) as response:
            await response.content.readline()
        await asyncio.wait_for(loop.left.wait(), 5)
        assert loop.num_open == 0


CLAUDE_CODE: dict[str, Any] = BODY | {
    "max_tokens": 100,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;"},
        {"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}},
    ],
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "medium"},
    "metadata": {"user_id": "u"},
    "tools": [TOOL, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
}


async def test_claude_code_is_served() -> None:
    async with serving(saying("Hi!"), limits=WIDE, compile_grammar=compiles) as server:
        async with aiohttp.ClientSession() as http, http.head(f"{server.url}/") as response:
            assert response.status == 200
        async with server.post("/v1/messages?beta=true", CLAUDE_CODE) as response:
            assert response.status == 200, await response.text()
            assert response.headers["x-left-out"] == "tools[1]: web_search_20250305"
    prompt = server.loop.requests[0].prompt_text
    assert "billing" not in prompt
    assert prompt.startswith("<|system|>Be short.")
    assert "weather" in prompt
    assert "web_search" not in prompt


async def test_a_system_prompt_that_is_nothing_but_the_billing_header_is_none() -> None:
    prompt = await prompt_of([USER], system="x-anthropic-billing-header: a")
    assert prompt.startswith("<|user|>Say hi")


async def test_a_stream_of_messages_lives_by_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []

    async def responding(*args: Any, keep_alive: bytes, **options: Any) -> Any:
        given.append(keep_alive)
        return await respond(*args, keep_alive=keep_alive, **options)

    monkeypatch.setattr("kagami_router.api.anthropic.messages.respond", responding)
    await create()
    assert given == [b'event: ping\ndata: {"type":"ping"}\n\n']
