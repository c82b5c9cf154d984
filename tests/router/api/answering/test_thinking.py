"""Reasoning on every chat route: shown, counted, switched, and sent back."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest
from tests.fakes.fake_loop import FakeLoop
from tests.fakes.fake_server import TOKENS, FakeServer
from tests.router.api.openai.test_chat_tools import ARGUMENTS, CALL, QWEN, saying, serving_tools
from tests.router.api.openai.test_chat_tools import TOOL as CHAT_TOOL

from kagami_router.api.answering.thinking import variables, with_thoughts
from kagami_router.request.values import FinishReason
from kagami_router.text.chat_template import ChatTemplate

# As the templates of models that think: the variable switches it off, and history has it.
SOURCE = (
    "{% set eol = '\n' %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{{ eol }}{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "effort={{ reasoning_effort }} thinking={{ enable_thinking }}\n"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
THOUGHT, TEXT = "It is 2 < 3.", "So it is."
SAID = f"<think>\n{THOUGHT}\n</think>\n\n{TEXT}"
CALLED = f"<think>{THOUGHT}</think>\n{CALL}"


@asynccontextmanager
async def serving(
    said: str | FakeLoop = SAID, template: ChatTemplate | None = None
) -> AsyncIterator[FakeServer]:
    loop = saying(said) if isinstance(said, str) else said
    template = template or ChatTemplate(SOURCE, TOKENS)
    async with serving_tools(loop, template=template) as server:
        yield server


@asynccontextmanager
async def openai_of(server: FakeServer) -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="k", max_retries=0) as client:
        yield client


@asynccontextmanager
async def anthropic_of(server: FakeServer) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="k", max_retries=0) as client:
        yield client


async def chat(server: FakeServer, **fields: Any) -> Any:
    async with openai_of(server) as client:
        return await client.chat.completions.create(model="m", messages=[USER], **fields)


async def chunks_of(server: FakeServer, **fields: Any) -> list[Any]:
    async with openai_of(server) as client:
        asked: Any = {"model": "m", "messages": [USER], "stream": True} | fields
        return [chunk async for chunk in await client.chat.completions.create(**asked)]


# --- chat ---


async def test_a_chat_shows_and_counts_reasoning() -> None:
    async with serving() as server:
        answer = await chat(server)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.reasoning) == (THOUGHT, THOUGHT)
    assert message.content == TEXT
    details = answer.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens


async def test_a_stream_shows_and_counts_the_same() -> None:
    async with serving() as server:
        whole = await chat(server)
        *chunks, last = await chunks_of(server, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert len([one for one in thoughts if one]) > 1
    assert "".join(thoughts) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    assert deltas[0].role == "assistant"
    assert last.usage == whole.usage


async def test_each_choice_is_counted() -> None:
    async with serving() as server:
        one, two = await chat(server), await chat(server, n=2)
    assert two.usage.completion_tokens_details.reasoning_tokens == (
        2 * one.usage.completion_tokens_details.reasoning_tokens
    )


@pytest.mark.parametrize("fields", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
async def test_reasoning_can_be_hidden_and_is_counted(fields: dict[str, Any]) -> None:
    async with serving() as server:
        answer = await chat(server, extra_body=fields)
    assert "reasoning_content" not in answer.choices[0].message.to_dict()
    assert answer.choices[0].message.content == TEXT
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


async def test_an_answer_that_is_cut_while_it_thinks_has_no_text() -> None:
    async with serving(saying(SAID[:14], FinishReason.LENGTH)) as server:
        answer = await chat(server)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("It is", None)
    assert answer.choices[0].finish_reason == "length"


async def test_calls_follow_reasoning() -> None:
    async with serving(CALLED) as server:
        answer = await chat(server, tools=[CHAT_TOOL], tool_choice="required")
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, None)
    assert [call.function.arguments for call in message.tool_calls] == [ARGUMENTS]
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_logprobs_are_those_of_all_tokens() -> None:
    async with serving() as server:
        whole = await chat(server, logprobs=True)
        chunks = [chunk.choices[0] for chunk in await chunks_of(server, logprobs=True)]
    streamed = [one for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content]
    assert streamed == whole.choices[0].logprobs.content
    assert len(streamed) == whole.usage.completion_tokens


async def test_a_model_that_does_not_think_has_no_new_members() -> None:
    async with serving(template=QWEN) as server:
        answer = await chat(server)
    assert answer.choices[0].message.content == SAID
    assert "reasoning_content" not in answer.choices[0].message.to_dict()
    assert answer.usage.completion_tokens_details is None


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "effort= thinking=\n"),
        ({"reasoning_effort": "low"}, "effort=low thinking=True\n"),
        ({"reasoning_effort": "none"}, "effort=none thinking=False\n"),
        ({"reasoning": {"effort": "high"}}, "effort=high thinking=True\n"),
        ({"reasoning": {"enabled": False}}, "effort= thinking=False\n"),
        ({"enable_thinking": False}, "effort= thinking=False\n"),
        ({"thinking": {"type": "disabled"}}, "effort= thinking=False\n"),
        ({"thinking": {"type": "enabled"}}, "effort= thinking=True\n"),
        ({"thinking": True}, "effort= thinking=True\n"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "effort= thinking=False\n",
        ),
    ],
)
async def test_what_a_chat_asks_reaches_the_template(fields: dict[str, Any], shown: str) -> None:
    async with serving() as server:
        await chat(server, extra_body=fields)
    assert shown in server.loop.requests[0].prompt_text


async def test_thinking_that_is_switched_off_leaves_text_alone() -> None:
    async with serving("</think> is a tag.") as server:
        answer = await chat(server, extra_body={"enable_thinking": False})
    assert answer.choices[0].message.content == "</think> is a tag."


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
async def test_reasoning_comes_back_under_the_name_that_the_template_reads(name: str) -> None:
    said = {"role": "assistant", "content": "Yes.", name: "Hm."}
    async with serving() as server, openai_of(server) as client:
        await client.chat.completions.create(model="m", messages=[USER, said, USER])
    assert "<|assistant|><think>Hm.</think>Yes.\n" in server.loop.requests[0].prompt_text


async def test_an_answer_that_was_nothing_but_reasoning_comes_back() -> None:
    said: Any = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    async with serving() as server, openai_of(server) as client:
        await client.chat.completions.create(model="m", messages=[USER, said, USER])
    assert "<|assistant|><think>Hm.</think>\n" in server.loop.requests[0].prompt_text


def test_names_that_the_template_does_not_read_are_left_out() -> None:
    said = {"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "b"}
    assert with_thoughts([said], "{{ m.thinking }}") == [
        {"role": "assistant", "content": "a", "thinking": "b"}
    ]
    assert with_thoughts([said], "{{ m.content }}") == [{"role": "assistant", "content": "a"}]


def test_variables_have_all_names_of_the_switch() -> None:
    assert variables() == {}
    assert variables("none") == {
        "reasoning_effort": "none",
        "enable_thinking": False,
        "thinking": False,
    }


# --- responses ---


async def respond(server: FakeServer, **fields: Any) -> Any:
    async with openai_of(server) as client:
        return await client.responses.create(model="m", **({"input": "Hi"} | fields))


async def test_a_response_has_a_reasoning_item() -> None:
    async with serving() as server:
        answer = await respond(server)
    thought, message = answer.output
    assert (thought.type, thought.summary, thought.status) == ("reasoning", [], "completed")
    assert [part.text for part in thought.content] == [THOUGHT]
    assert answer.output_text == TEXT
    assert message.type == "message"
    assert answer.usage.output_tokens_details.reasoning_tokens > 0


async def test_the_events_of_reasoning_are_openais() -> None:
    async with serving() as server, openai_of(server) as client:
        whole = await client.responses.create(model="m", input="Hi")
        async with client.responses.stream(model="m", input="Hi") as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
    kinds = [event.type for event in events]
    first = kinds.index("response.output_item.added")
    expected = [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert list(dict.fromkeys(kinds[first:]))[:6] == expected[:6]
    assert kinds.count("response.output_item.added") == 2
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == [
        *range(len([event for event in events if hasattr(event, "sequence_number")]))
    ]
    texts = [one.delta for one in events if one.type == "response.reasoning_text.delta"]
    assert "".join(texts) == THOUGHT
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output[0].content == whole.output[0].content
    assert final.usage == whole.usage


async def test_reasoning_items_come_back_with_what_followed_them() -> None:
    async with serving(CALLED) as server:
        tool: Any = {"type": "function", "name": "weather", "parameters": {}, "strict": False}
        answer = await respond(server, tools=[tool])
        items = [item.to_dict() for item in answer.output]
        result = {"type": "function_call_output", "call_id": items[1]["call_id"], "output": "Sun"}
        summary = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text"}]}
        summary["summary"][0]["text"] = "Sunny?"
        said = {"role": "assistant", "content": "Sun."}
        sealed = {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"}
        await respond(server, input=[USER, *items, result, summary, said, sealed, USER])
    prompt = server.loop.requests[1].prompt_text
    assert f"<|assistant|><think>{THOUGHT}</think>" in prompt
    assert prompt.count("weather") == 1
    assert "<|assistant|><think>Sunny?</think>Sun.\n" in prompt


async def test_effort_of_a_response_reaches_the_template() -> None:
    async with serving() as server:
        await respond(server, reasoning={"effort": "none"})
    assert "effort=none thinking=False" in server.loop.requests[0].prompt_text


# --- messages ---

ASKED: dict[str, Any] = {"model": "m", "max_tokens": 100, "messages": [USER]}
ENABLED = {"type": "enabled", "budget_tokens": 1024}


def without_parsed(message: Any) -> list[Any]:
    """The blocks, without what the client's stream adds to them."""
    names = ("type", "text", "thinking", "signature")
    return [{name: getattr(block, name, None) for name in names} for block in message.content]


async def test_messages_have_thinking_blocks_where_they_are_asked_for() -> None:
    async with serving() as server, anthropic_of(server) as client:
        shown = await client.messages.create(**ASKED, thinking=ENABLED)
        hidden = await client.messages.create(**ASKED)
        omitted = await client.messages.create(**ASKED, thinking=ENABLED | {"display": "omitted"})
    thought, text = shown.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", THOUGHT, TEXT)
    assert thought.signature
    for other in (hidden, omitted):
        assert [block.text for block in other.content] == [TEXT]
    assert shown.usage.output_tokens == hidden.usage.output_tokens


async def test_a_stream_of_messages_has_the_same_blocks() -> None:
    async with serving() as server, anthropic_of(server) as client:
        whole = await client.messages.create(**ASKED, thinking=ENABLED)
        async with client.messages.stream(**ASKED, thinking=ENABLED) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
    assert without_parsed(final) == without_parsed(whole)
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert "signature" in kinds


async def test_a_message_that_is_nothing_but_thoughts_has_an_empty_text() -> None:
    loop = saying(SAID[:14], FinishReason.LENGTH)
    async with serving(loop) as server, anthropic_of(server) as client:
        whole = await client.messages.create(**ASKED, thinking=ENABLED)
        async with client.messages.stream(**ASKED, thinking=ENABLED) as stream:
            final = await stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert without_parsed(final) == without_parsed(whole)


async def test_thinking_blocks_come_back() -> None:
    async with serving() as server, anthropic_of(server) as client:
        first = await client.messages.create(**ASKED, thinking=ENABLED)
        messages = [USER, {"role": "assistant", "content": first.to_dict()["content"]}, USER]
        await client.messages.create(**ASKED | {"messages": messages})
    assert f"<think>{THOUGHT}</think>{TEXT}\n" in server.loop.requests[1].prompt_text


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "effort= thinking=\n"),
        ({"thinking": {"type": "disabled"}}, "effort= thinking=False\n"),
        ({"thinking": ENABLED}, "effort= thinking=True\n"),
        ({"thinking": {"type": "adaptive"}}, "effort= thinking=\n"),
        ({"output_config": {"effort": "high"}}, "effort=high thinking=True\n"),
    ],
)
async def test_what_messages_ask_reaches_the_template(fields: dict[str, Any], shown: str) -> None:
    async with serving() as server:
        async with server.post("/v1/messages", ASKED | fields) as response:
            assert response.status == 200, await response.text()
            json.loads(await response.text())
    assert shown in server.loop.requests[0].prompt_text
