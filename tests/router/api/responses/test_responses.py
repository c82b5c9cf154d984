"""/v1/responses over a scripted model: the JSON of its answers, streams and refusals."""

import json
import re
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.fakes.fake_loop import EOS, FakeLoop, step_events_of
from tests.fakes.fake_server import TOKENS, FakeServer, flat_error
from tests.router.api.openai.test_chat_tools import ARGUMENTS, CALL, OTHER, serving_tools
from tests.router.text.test_call_ids import WITH_CALL_ID

from kagami_proto.errors import GenerationFailed
from kagami_proto.values import Grammar, GrammarKind
from kagami_router.request.values import FinishReason, Token
from kagami_router.text.chat_template import ChatTemplate

PATH = "/v1/responses"
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Says the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def saying(text: str, reason: FinishReason = FinishReason.EOS_TOKEN) -> FakeLoop:
    """A model that answers `text` in tokens of five characters."""
    pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
    tokens = [Token(number + 3, piece, -0.5, False) for number, piece in enumerate(pieces)]
    end = [EOS] if reason is FinishReason.EOS_TOKEN else []
    return FakeLoop(
        lambda request: [
            *step_events_of(
                [*tokens, *end],
                reason,
                top_tokens=tuple(tokens[: request.top_n_tokens]),
                cached_tokens=7,
            )
        ]
    )


def failing() -> FakeLoop:
    """A model whose generation fails after its first token."""
    turns = step_events_of([Token(3, "Hello", -0.5, False), EOS], FinishReason.EOS_TOKEN)
    return FakeLoop(lambda _: [turns[0], GenerationFailed("out of paper")])


async def answer(server: FakeServer, **body: Any) -> dict[str, Any]:
    async with server.post(PATH, {"input": "Hi"} | body) as response:
        assert response.status == 200, await response.text()
        whole: dict[str, Any] = await response.json()
        return whole


async def error(server: FakeServer, **body: Any) -> str:
    async with server.post(PATH, body) as response:
        assert response.status == 422, await response.text()
        return str((await flat_error(response))["error"])


async def events(server: FakeServer, **body: Any) -> list[dict[str, Any]]:
    """A stream's events; checks that names match the JSON and numbers count from 0."""
    async with server.post(PATH, {"input": "Hi", "stream": True} | body) as response:
        assert response.status == 200, await response.text()
        blocks = [one for one in (await response.text()).split("\n\n") if one[:1] not in ("", ":")]
    read = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        read.append(event)
    return read


def prompt_of(loop: FakeLoop) -> str:
    return loop.requests[-1].prompt_text


async def test_a_text_is_answered_by_one_message() -> None:
    async with serving_tools(saying("Hello there!")) as server:
        whole = await answer(server)
    (message,) = whole["output"]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [
            {"type": "output_text", "text": "Hello there!", "annotations": [], "logprobs": []}
        ],
    }
    assert whole["id"].startswith("resp_")
    assert (whole["object"], whole["status"], whole["error"]) == ("response", "completed", None)
    assert whole["completed_at"] >= whole["created_at"]


async def test_the_answer_is_what_the_sdks_model_describes() -> None:
    async with serving_tools(saying(f"I look.\n{CALL}")) as server:
        whole = await answer(
            server, tools=[TOOL], tool_choice={"type": "function", "name": "weather"}
        )
    Response.model_validate(whole, strict=True)


async def test_every_event_is_what_the_sdks_model_describes() -> None:
    event_type: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    async with serving_tools(saying(f"I look.\n{CALL}")) as server:
        read = await events(
            server, tools=[TOOL], include=["message.output_text.logprobs"], top_logprobs=2
        )
    for event in read:
        event_type.validate_python(event, strict=True)


async def test_usage_counts_input_and_output() -> None:
    async with serving_tools(saying("Hello there!")) as server:
        usage = (await answer(server))["usage"]
    assert usage == {
        "input_tokens": 24,
        "input_tokens_details": {"cached_tokens": 7, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 28,
    }


async def test_the_settings_come_back() -> None:
    settings: dict[str, Any] = {
        "instructions": "Be kind",
        "max_output_tokens": 40,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "top_p": 0.5,
        "tools": [TOOL],
        "tool_choice": "none",
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "user": "me",
        "top_logprobs": 1,
    }
    async with serving_tools(saying("Hello")) as server:
        whole = await answer(server, **settings)
    assert {name: whole[name] for name in settings} == settings


async def test_settings_that_are_not_given_have_openais_defaults() -> None:
    async with serving_tools(saying("Hello")) as server:
        whole = await answer(server, store=True, truncation="auto", tools=None, text=None)
    shown = ("tools", "tool_choice", "text", "temperature", "top_p", "store", "truncation")
    assert [whole[name] for name in shown] == [
        [],
        "auto",
        {"format": {"type": "text"}},
        1.0,
        1.0,
        False,  # nothing is stored
        "disabled",
    ]


async def test_sampling_reaches_the_model() -> None:
    loop = saying("Hello")
    async with serving_tools(loop) as server:
        await answer(server, max_output_tokens=9, temperature=0.5, top_p=0.25, seed=7, stop=["x"])
    (request,) = loop.requests
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.25)
    assert (request.sampling.seed, request.stopping.max_new_tokens) == (7, 9)
    assert request.stopping.stop == ("x",)


async def test_a_cut_answer_is_incomplete_and_says_why() -> None:
    async with serving_tools(saying("Hello", FinishReason.LENGTH)) as server:
        whole = await answer(server)
    assert whole["status"] == whole["output"][0]["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["completed_at"] is None


async def test_a_cut_stream_ends_as_incomplete() -> None:
    async with serving_tools(saying("Hello", FinishReason.LENGTH)) as server:
        last = (await events(server))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_an_empty_answer_is_an_empty_message() -> None:
    async with serving_tools(saying("")) as server:
        (message,) = (await answer(server))["output"]
    assert [part["text"] for part in message["content"]] == [""]


async def test_instructions_and_items_become_the_prompt() -> None:
    loop = saying("Hello")
    async with serving_tools(loop) as server:
        await answer(
            server,
            instructions="Be kind",
            input=[
                {"role": "developer", "content": "Be short"},
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Yes?", "annotations": []}],
                },
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "message", "role": "user", "content": "Why?"},
            ],
        )
    assert prompt_of(loop) == (
        "<|system|>Be kind\n<|system|>Be short\n"
        "<|user|>Hi\n<|assistant|>Yes?\n<|user|>Why?\n<|assistant|>"
    )


async def test_effort_reaches_the_template() -> None:
    loop = saying("Hello")
    template = ChatTemplate("{{ reasoning_effort }} {{ enable_thinking }}", TOKENS)
    async with serving_tools(loop, template=template) as server:
        whole = await answer(server, reasoning={"effort": "none", "summary": "auto"})
    assert prompt_of(loop) == "none False"
    assert whole["reasoning"] == {"effort": "none", "summary": None}


async def test_an_assistants_message_at_the_end_is_answered() -> None:
    loop = saying("Hello")
    async with serving_tools(loop) as server:
        await answer(server, input=[{"role": "assistant", "content": "Well"}])
    assert prompt_of(loop) == "<|assistant|>Well\n<|assistant|>"


async def test_calls_and_their_outputs_go_back_to_the_model() -> None:
    loop = saying("Sunny")
    async with serving_tools(loop) as server:
        await answer(
            server,
            tools=[TOOL],
            input=[
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "I look."},
                {
                    "type": "function_call",
                    "call_id": "call_1",
                    "name": "weather",
                    "arguments": ARGUMENTS,
                },
                {"type": "function_call_output", "call_id": "call_1", "output": "hot"},
            ],
        )
    prompt = prompt_of(loop)
    assert "<|assistant|>I look.\n" in prompt
    assert ARGUMENTS in prompt
    assert "<tool_response>\nhot\n</tool_response>" in prompt


async def test_ids_of_calls_have_the_form_that_the_template_takes() -> None:
    loop = saying(f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS}")
    async with serving_tools(loop, template=ChatTemplate(WITH_CALL_ID, TOKENS)) as server:
        (own,) = (await answer(server, tools=[TOOL]))["output"]
        foreign = own | {"call_id": "call_1", "id": "fc_1"}
        results = [
            {"type": "function_call_output", "call_id": one["call_id"], "output": "hot"}
            for one in (own, foreign)
        ]
        await answer(server, tools=[TOOL], input=[USER, own, foreign, *results])
    called = re.findall(r"CALL_ID\](\w{9})\[ARGS", prompt_of(loop))[:2]
    assert called[0] == own["call_id"]
    assert re.findall(r"RESULTS\](\w{9})\[", prompt_of(loop)) == called


async def test_text_and_calls_are_items_in_their_order() -> None:
    async with serving_tools(saying(f"I look.\n{CALL}\n{OTHER}")) as server:
        first, *calls = (await answer(server, tools=[TOOL]))["output"]
    assert first["content"][0]["text"] == "I look.\n"
    assert [call["type"] for call in calls] == ["function_call", "function_call"]
    other = ARGUMENTS.replace("Rome", "Oslo")
    assert [call["name"] for call in calls] == ["weather", "weather"]
    assert [call["arguments"] for call in calls] == [ARGUMENTS, other]
    assert len({call["id"] for call in calls} | {call["call_id"] for call in calls}) == 4


async def test_a_stream_of_text_has_openais_events() -> None:
    async with serving_tools(saying("Hello there!")) as server:
        read = await events(server)
    assert [event["type"].removeprefix("response.") for event in read] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event.get("delta", "") for event in read) == "Hello there!"
    assert read[-1]["response"]["output"] == [read[-2]["item"]]


async def test_a_stream_of_a_call_has_openais_events() -> None:
    async with serving_tools(saying(CALL)) as server:
        read = await events(server, tools=[TOOL])
    kinds = [event["type"].removeprefix("response.") for event in read]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert set(kinds[3:-3]) == {"function_call_arguments.delta"}
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert read[2]["item"]["arguments"] == ""
    assert "".join(event.get("delta", "") for event in read) == ARGUMENTS


async def test_a_stream_ends_as_the_whole_answer_is() -> None:
    async with serving_tools(saying(f"I look.\n{CALL}\n{OTHER}")) as server:
        whole = await answer(server, tools=[TOOL])
        streamed = (await events(server, tools=[TOOL]))[-1]["response"]
    assert _anonymous(streamed) == _anonymous(whole)


def _anonymous(response: dict[str, Any]) -> dict[str, Any]:
    own = ("id", "call_id", "created_at", "completed_at")
    items = [{k: v for k, v in item.items() if k not in own} for item in response["output"]]
    return {k: v for k, v in response.items() if k not in own} | {"output": items}


async def test_a_stream_has_headers_and_a_last_comment() -> None:
    async with (
        serving_tools(saying("Hello")) as server,
        server.post(PATH, {"input": "Hi", "stream": True}) as response,
    ):
        text = await response.text()
        assert response.headers["x-prompt-tokens"] == "24"
    assert text.split("\n\n")[-3].startswith(": x-compute-time=")
    assert "[DONE]" not in text


async def test_a_whole_answer_has_the_headers() -> None:
    async with (
        serving_tools(saying("Hello")) as server,
        server.post(PATH, {"input": "Hi"}) as response,
    ):
        assert response.headers["x-generated-tokens"] == "2"
        assert response.headers["x-request-id"]


async def test_the_call_is_counted() -> None:
    async with serving_tools(saying("Hello")) as server:
        await answer(server)
        async with server.http.get("/metrics") as metrics:
            assert "tgi_request_success 1" in await metrics.text()


async def test_a_call_needs_a_permit() -> None:
    async with serving_tools(saying("Hello"), max_concurrent_requests=0) as server:
        async with server.post(PATH, {"input": "Hi"}) as response:
            assert response.status == 429


async def test_a_failing_stream_has_an_error_event_and_a_failed_event() -> None:
    async with serving_tools(failing()) as server:
        *_, told, last = await events(server)
    assert told["type"] == "error"
    assert "out of paper" in told["message"]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"


async def test_a_stream_that_fails_at_once_has_a_beginning_too() -> None:
    loop = FakeLoop(lambda _: [GenerationFailed("out of paper")])
    async with serving_tools(loop) as server:
        read = await events(server)
    assert [event["type"] for event in read] == [
        "response.created",
        "response.in_progress",
        "error",
        "response.failed",
    ]


async def test_logprobs_come_where_they_are_included() -> None:
    async with serving_tools(saying("Hello there!")) as server:
        whole = await answer(server, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = whole["output"][0]["content"][0]["logprobs"]
    assert [entry["logprob"] for entry in entries] == [-0.5] * 3
    assert {len(entry["top_logprobs"]) for entry in entries} == {2}


async def test_a_streams_logprobs_are_those_of_the_whole_answer() -> None:
    async with serving_tools(saying(f"I look at it.\n{CALL}")) as server:
        body: dict[str, Any] = {"tools": [TOOL], "top_logprobs": 1}
        whole = await answer(server, **body)
        read = await events(server, **body)
    pieces = [one for event in read for one in event.get("logprobs", []) if "delta" in event]
    assert pieces == whole["output"][0]["content"][0]["logprobs"]


async def test_a_schema_holds_the_answer_and_comes_back() -> None:
    loop = saying('{"city":"Rome"}')
    form = {"type": "json_schema", "name": "place", "strict": True, "schema": SCHEMA}
    async with serving_tools(loop) as server:
        whole = await answer(server, text={"format": form})
    grammar = loop.requests[0].grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(grammar.source)["required"] == ["city"]
    assert whole["text"] == {"format": form}


async def test_a_json_object_is_any_object() -> None:
    loop = saying("{}")
    async with serving_tools(loop) as server:
        await answer(server, text={"format": {"type": "json_object"}})
    assert loop.requests[0].grammar == Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


async def test_allowed_tools_are_the_ones_that_may_be_called() -> None:
    loop = saying(CALL)
    other = {**TOOL, "name": "news"}
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "news"}],
    }
    async with serving_tools(loop) as server:
        await answer(server, tools=[TOOL, other], tool_choice=choice)
    grammar = loop.requests[0].grammar
    assert grammar is not None
    assert "news" in grammar.source
    assert "weather" not in grammar.source


async def test_null_is_absent() -> None:
    names = ("model", "instructions", "tools", "tool_choice", "text", "include", "metadata", "stop")
    loop = saying("Hello")
    async with serving_tools(loop) as server:
        await answer(server, input=[USER | {"type": None}], **dict.fromkeys(names))
    assert prompt_of(loop) == "<|user|>Hi\n<|assistant|>"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "missing field `input`"),
        ({"input": []}, "`input` cannot be empty"),
        ({"input": [{"type": "reasoning"}]}, "`input` has no message"),
        ({"input": "Hi", "previous_response_id": "resp_1"}, "`previous_response_id` is not"),
        ({"input": "Hi", "conversation": "conv_1"}, "`conversation` is not supported"),
        ({"input": "Hi", "background": True}, "`background` is not supported"),
        ({"prompt": {"id": "p"}}, "`prompt` is not supported"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "`input[0]` is an item_reference"),
        ({"input": [{"type": 3}]}, "`input[0].type` must be a text. Given: 3"),
        ({"input": [{"role": "robot", "content": "a"}]}, "`input[0].role` must be one of user,"),
        ({"input": [{"content": "a"}]}, "input[0]: missing field `role`"),
        ({"input": [{"role": "user"}]}, "input[0].content: expected a text or a list"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "`input[0].content[0]` is an image (`input_image`)",
        ),
        ({"input": "Hi", "tools": [{"name": "f"}]}, '`tools[0]` must be {"type":"function"'),
        ({"input": "Hi", "tools": [{"type": "namespace"}]}, "`tools[0]` must have a `name` and"),
        ({"input": "Hi", "tools": [{"type": "function"}]}, "`tools[0].name` must have"),
        ({"input": "Hi", "tools": [TOOL, TOOL]}, "`tools[1]` has a name that was given before"),
        ({"input": "Hi", "tools": [TOOL], "tool_choice": "weather"}, "`tool_choice` must be"),
        (
            {"input": "Hi", "tools": [TOOL], "tool_choice": {"type": "file_search"}},
            "`tool_choice` must be",
        ),
        ({"input": "Hi", "max_output_tokens": 0}, "`max_output_tokens` must be strictly positive"),
        ({"input": "Hi", "top_logprobs": 6}, "`top_logprobs` must be >= 0 and <= 5. Given: 6"),
        ({"input": "Hi", "temperature": -1}, "`temperature` must be strictly positive"),
        ({"input": "Hi", "text": {"format": {"type": "json_schema"}}}, "missing field `schema`"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(body: dict[str, Any], text: str) -> None:
    async with serving_tools(saying("Hello")) as server:
        assert text in await error(server, **body)
