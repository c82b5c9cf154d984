import json
from typing import Any

import pytest
from tests.fakes.fake_loop import EOS, FakeLoop, step_events_of
from tests.fakes.fake_server import (
    LIMITS,
    TEMPLATE,
    TOKENS,
    FakeServer,
    events_of,
    flat_error,
    serving,
)
from tests.router.text.test_call_ids import WITH_CALL_ID

from kagami_proto.errors import InvalidRequest
from kagami_proto.values import Grammar, GrammarKind
from kagami_router.request.validation import RequestLimits
from kagami_router.request.values import FinishReason, Token
from kagami_router.text.chat_template import ChatTemplate

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CHAT: dict[str, Any] = {"messages": MESSAGES, "tools": [TOOL]}
ARGUMENTS = '{"city": "Rome"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
OTHER = CALL.replace("Rome", "Oslo")
WIDE = RequestLimits(
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_input_tokens=4095,
    max_total_tokens=4096,
    max_client_batch_size=4,
    vocab_size=LIMITS.vocab_size,
)
QWEN = ChatTemplate("{{ tools | tojson }}<tool_call>" + TEMPLATE, TOKENS)


async def compiles(grammar: Grammar) -> None:
    """A shard that accepts every grammar."""


def saying(text: str, reason: FinishReason = FinishReason.EOS_TOKEN) -> FakeLoop:
    """A model that answers `text` in tokens of five characters."""
    pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
    tokens = [Token(number, piece, -0.5, False) for number, piece in enumerate(pieces)]
    end = [EOS] if reason is FinishReason.EOS_TOKEN else []
    return FakeLoop(lambda _: [*step_events_of([*tokens, *end], reason)])


def serving_tools(loop: FakeLoop, **options: Any) -> Any:
    return serving(loop, **({"limits": WIDE, "compile_grammar": compiles} | options))


async def answer(server: FakeServer, body: dict[str, Any]) -> dict[str, Any]:
    async with server.post(PATH, body) as response:
        assert response.status == 200, await response.text()
        whole: dict[str, Any] = await response.json()
        return whole


async def error(server: FakeServer, body: dict[str, Any]) -> str:
    async with server.post(PATH, body) as response:
        assert response.status == 422
        return str((await flat_error(response))["error"])


async def chunks(server: FakeServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with server.post(PATH, body | {"stream": True}) as response:
        assert response.status == 200
        lines = await events_of(response)
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_a_call_is_answered_as_openai_answers_it() -> None:
    async with serving_tools(saying(CALL)) as server:
        (choice,) = (await answer(server, CHAT))["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None}
    assert choice["finish_reason"] == "tool_calls"
    assert len(call.pop("id")) == 9
    assert call == {
        "type": "function",
        "function": {"name": "weather", "arguments": ARGUMENTS},
    }


async def test_text_before_calls_is_content() -> None:
    async with serving_tools(saying(f"I look.\n{CALL}\n{OTHER}")) as server:
        (choice,) = (await answer(server, CHAT))["choices"]
    assert choice["message"]["content"] == "I look.\n"
    ids = {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2


async def test_a_call_that_was_made_before_is_not_shown() -> None:
    async with serving_tools(saying(f"{CALL}\n{CALL}\n{OTHER}")) as server:
        (choice,) = (await answer(server, CHAT))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


async def test_auto_may_answer_in_text() -> None:
    async with serving_tools(saying("Hello <b>!")) as server:
        (choice,) = (await answer(server, CHAT))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello <b>!"}
    assert choice["finish_reason"] == "stop"


async def test_a_stream_has_the_name_once_then_arguments_then_the_reason() -> None:
    async with serving_tools(saying(CALL)) as server:
        said = [chunk["choices"][0] for chunk in await chunks(server, CHAT)]
    first, *middle, last = said
    (call,) = first["delta"].pop("tool_calls")
    assert first["delta"] == {"role": "assistant", "content": None}
    assert len(call.pop("id")) == 9
    assert call == {
        "index": 0,
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert all(list(one["delta"]) == ["tool_calls"] for one in middle)
    pieces = [one["delta"]["tool_calls"][0] for one in middle]
    assert all(list(piece) == ["index", "function"] for piece in pieces)
    assert "".join(piece["function"]["arguments"] for piece in pieces) == ARGUMENTS
    assert last["delta"] == {}
    reasons = [one["finish_reason"] for one in said]
    assert reasons == [None] * (len(said) - 1) + ["tool_calls"]


async def test_a_stream_of_text_ends_as_ever() -> None:
    async with serving_tools(saying("Hello!")) as server:
        said = [chunk["choices"][0] for chunk in await chunks(server, CHAT)]
    assert "".join(one["delta"]["content"] for one in said) == "Hello!"
    assert [one["delta"].get("role") for one in said] == ["assistant", None, None]
    assert said[-1]["finish_reason"] == "stop"


async def test_each_choice_of_a_stream_has_calls_of_its_own() -> None:
    async with serving_tools(saying(CALL)) as server:
        said = [one["choices"][0] for one in await chunks(server, CHAT | {"n": 2})]
    for index in (0, 1):
        own = [one["delta"] for one in said if one["index"] == index]
        assert own[0]["role"] == "assistant"
        arguments = [d["tool_calls"][0]["function"]["arguments"] for d in own if "tool_calls" in d]
        assert "".join(arguments) == ARGUMENTS


async def test_usage_and_logprobs_count_every_token() -> None:
    body = CHAT | {"logprobs": True, "stream_options": {"include_usage": True}}
    async with serving_tools(saying(CALL)) as server:
        *said, usage = await chunks(server, body)
        whole = await answer(server, CHAT | {"logprobs": True})
    logprobs = [one["choices"][0]["logprobs"] for one in said]
    count = sum(len(one["content"]) for one in logprobs if one)
    assert count == usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len(whole["choices"][0]["logprobs"]["content"]) == count


async def test_a_cut_call_is_returned_and_says_so() -> None:
    async with serving_tools(saying(CALL[:50], FinishReason.LENGTH)) as server:
        (choice,) = (await answer(server, CHAT))["choices"]
        said = [one["choices"][0] for one in await chunks(server, CHAT)]
    (call,) = choice["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"])
    assert choice["finish_reason"] == said[-1]["finish_reason"] == "length"


async def test_auto_and_required_generate_under_a_grammar() -> None:
    async with serving_tools(saying("Hi")) as server:
        await answer(server, CHAT)
        await answer(server, CHAT | {"tool_choice": "required"})
        grammars = [request.grammar for request in server.loop.requests]
    assert [one and one.kind for one in grammars] == [GrammarKind.LARK] * 2
    assert grammars[0] != grammars[1]


async def test_none_neither_shows_nor_constrains_nor_reads() -> None:
    async with serving_tools(saying(CALL)) as server:
        (choice,) = (await answer(server, CHAT | {"tool_choice": "none"}))["choices"]
        (request,) = server.loop.requests
    assert request.grammar is None
    assert "weather" not in request.prompt_text
    assert choice["message"]["content"] == CALL


async def test_without_grammars_auto_runs_and_required_does_not() -> None:
    async with serving_tools(saying(CALL), compile_grammar=None) as server:
        (choice,) = (await answer(server, CHAT))["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert server.loop.requests[0].grammar is None
        text = await error(server, CHAT | {"tool_choice": "required"})
    assert text == "Input validation error: grammar is not supported"


async def test_a_template_that_reads_tools_gets_them_unchanged() -> None:
    async with serving_tools(saying("Hi"), template=QWEN) as server:
        await answer(server, CHAT)
        prompt = server.loop.requests[0].prompt_text
    assert json.loads(prompt.partition("<tool_call>")[0]) == [TOOL]
    assert prompt.endswith("<|user|>Weather?\n<|assistant|>")


async def test_other_templates_get_them_behind_the_last_message() -> None:
    async with serving_tools(saying("Hi")) as server:
        await answer(server, CHAT)
        prompt = server.loop.requests[0].prompt_text
    begin, listed, told = prompt.split("\n", 3)[0], *prompt.split("\n", 3)[2:]
    assert begin == "<|user|>Weather?"
    assert json.loads(listed) == [TOOL]
    assert '<tool_call>\n{"name": "NAME", "arguments": {…}}\n</tool_call>' in told


async def test_a_tool_prompt_replaces_our_own_note() -> None:
    async with serving_tools(saying("Hi")) as server:
        await answer(server, CHAT | {"tool_prompt": "Use them."})
        prompt = server.loop.requests[0].prompt_text
    assert prompt.endswith("]\nUse them.\n<|assistant|>")


async def test_arguments_reach_the_template_as_an_object() -> None:
    source = (
        "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }} "
        "{{ m.tool_calls[0].function.arguments }} {{ '' + m.tool_calls[0].function.arguments }}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}"
    )
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    async with serving_tools(saying("Hi"), template=ChatTemplate(source, TOKENS)) as server:
        async with server.post("/chat_tokenize", {"messages": messages}) as response:
            text = (await response.json())["templated_text"]
    assert text == f"Rome {ARGUMENTS} {ARGUMENTS}{ARGUMENTS}"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
async def test_a_message_of_calls_is_seen_whatever_its_content(content: dict[str, Any]) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]} | content,
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "Sun"}]},
        {"role": "tool", "tool_call_id": "b", "content": "Rain"},
    ]
    async with serving_tools(saying("Hi")) as server:
        await answer(server, {"messages": messages})
        prompt = server.loop.requests[0].prompt_text
    assert f"<|assistant|>{CALL}\n" in prompt
    results = "<tool_response>\nSun\n</tool_response>\n<tool_response>\nRain\n</tool_response>"
    assert f"<|user|>{results}\n" in prompt


async def test_a_call_of_ours_comes_back_to_mistrals_template_with_its_own_id() -> None:
    loop = saying(f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS}")
    async with serving_tools(loop, template=ChatTemplate(WITH_CALL_ID, TOKENS)) as server:
        message = (await answer(server, CHAT))["choices"][0]["message"]
        call_id = message["tool_calls"][0]["id"]
        result = {"role": "tool", "tool_call_id": call_id, "content": "Sun"}
        await answer(server, CHAT | {"messages": [*MESSAGES, message, result]})
    called, behind = loop.requests[-1].prompt_text.split("[ARGS]", 1)
    assert called.endswith(f"weather[CALL_ID]{call_id}")
    assert f"[TOOL_RESULTS]{call_id}[TOOL_CONTENT]Sun" in behind


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tool_choice": "foo"}, "Tool error: Tool with name foo not found"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "foo"}}},
            "Tool error: Tool with name foo not found",
        ),
        ({"tools": [TOOL, TOOL]}, "Tool error: `tools[1]` has a name that was given before"),
        ({"tools": [], "tool_choice": "required"}, "Tool error: `tool_choice` is only allowed"),
        ({"tool_choice": 3}, "Tool error: `tool_choice` must be"),
        ({"tools": [{"type": "function"}]}, "Tool error: `tools[0]` must be"),
    ],
)
async def test_what_cannot_be_served_is_a_tool_error(fields: dict[str, Any], text: str) -> None:
    async with serving_tools(saying("Hi")) as server:
        assert (await error(server, CHAT | fields)).startswith(text)


async def test_the_tool_whose_schema_does_not_compile_is_named() -> None:
    async def compile_grammar(grammar: Grammar) -> None:
        if "unknowable" in grammar.source:
            raise InvalidRequest("no such type: unknowable")

    bad = {"function": {"name": "bad", "parameters": {"properties": {"a": {"type": "unknowable"}}}}}
    async with serving_tools(saying("Hi"), compile_grammar=compile_grammar) as server:
        text = await error(server, CHAT | {"tools": [TOOL, bad]})
    assert text == "Tool error: `parameters` of the tool bad: no such type: unknowable"
