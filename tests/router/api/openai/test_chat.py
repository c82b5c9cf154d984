import asyncio
import json
from typing import Any

import pytest
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tests.fakes.fake_loop import EOS, FAILED, FakeLoop, step_events_of
from tests.fakes.fake_server import TOKENS, events_of, flat_error, serving

from kagami_proto.errors import GenerationFailed
from kagami_router.request.values import FinishReason, StreamEvent, Token
from kagami_router.text import chat_template
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Say hi"}]
CHAT = {"model": "tgi", "messages": MESSAGES, "max_tokens": 8}
HI = Token(40, "Hi", -0.25, False)
BANG = Token(41, "!", -0.5, False)


def hi_loop() -> FakeLoop:
    return FakeLoop(lambda _: [*step_events_of([HI, BANG, EOS], FinishReason.EOS_TOKEN)])


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [block for block in text.split("\n\n") if not block.startswith(":")]
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_answer_has_the_shape_of_the_golden_transcript() -> None:
    async with serving(hi_loop()) as server, server.post(PATH, CHAT) as response:
        answer = await response.json()
        assert list(answer) == [
            "object",
            "id",
            "created",
            "model",
            "system_fingerprint",
            "choices",
            "usage",
        ]
        assert answer["object"] == "chat.completion"
        assert answer["id"].startswith("chatcmpl-")
        assert answer["model"] == "M"
        assert answer["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi!"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        assert answer["usage"] == {
            "prompt_tokens": 28,
            "completion_tokens": 3,
            "total_tokens": 31,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert response.headers["x-compute-characters"] == "28"


async def test_the_template_has_the_special_tokens_so_none_are_added() -> None:
    async with serving(hi_loop()) as server:
        await server.post(PATH, CHAT)
        assert server.loop.requests[0].prompt_text == "<|user|>Say hi\n<|assistant|>"
        assert 0 not in server.loop.requests[0].prompt_ids


async def test_stream_with_usage() -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    async with serving(hi_loop()) as server, server.post(PATH, body) as response:
        chunks = chunks_of(await response.text())
    assert [chunk["choices"] for chunk in chunks] == [
        [_choice({"role": "assistant", "content": "Hi"}, None)],
        [_choice({"content": "!"}, None)],
        [_choice({"content": ""}, "stop")],
        [],
    ]
    assert [chunk["usage"] for chunk in chunks] == [
        None,
        None,
        None,
        {
            "prompt_tokens": 28,
            "completion_tokens": 3,
            "total_tokens": 31,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    ]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert list(chunks[0]) == list(chunks[-1])


def _choice(delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


async def test_without_stream_options_no_usage_chunk_comes() -> None:
    body = CHAT | {"stream": True, "stream_options": None}
    async with serving(hi_loop()) as server, server.post(PATH, body) as response:
        assert len(chunks_of(await response.text())) == 3


async def test_logprobs_have_alternatives_and_bytes() -> None:
    loop = FakeLoop(lambda _: [*step_events_of([HI], top_tokens=(HI, BANG))])
    body = CHAT | {"logprobs": True, "top_logprobs": 2}
    async with serving(loop) as server, server.post(PATH, body) as response:
        assert (await response.json())["choices"][0]["logprobs"] == {
            "content": [
                {
                    "token": "Hi",
                    "logprob": -0.25,
                    "bytes": [72, 105],
                    "top_logprobs": [
                        {"token": "Hi", "logprob": -0.25, "bytes": [72, 105]},
                        {"token": "!", "logprob": -0.5, "bytes": [33]},
                    ],
                }
            ],
            "refusal": None,
        }
        assert loop.requests[0].top_n_tokens == 2


async def test_half_a_character_shows_as_its_bytes() -> None:
    half = Token(byte_tokenizer_with_start().token_to_id("ð"), "", -0.25, False)  # b"\xf0"
    loop = FakeLoop(lambda _: [*step_events_of([half])])
    async with serving(loop) as server:
        async with server.post(PATH, CHAT | {"logprobs": True}) as response:
            (one,) = (await response.json())["choices"][0]["logprobs"]["content"]
    assert one["token"] == "\\xf0"
    assert one["bytes"] == [0xF0]


async def test_a_token_held_back_for_a_stop_string_has_its_own_text_in_logprobs() -> None:
    held = HI._replace(text="")
    loop = FakeLoop(lambda _: [*step_events_of([held])])
    async with serving(loop) as server:
        async with server.post(PATH, CHAT | {"logprobs": True, "stop": "Hi there"}) as response:
            (one,) = (await response.json())["choices"][0]["logprobs"]["content"]
    assert one["token"] == "Hi"


async def test_a_logprob_that_is_no_number_is_openais_impossible() -> None:
    never = Token(40, "Hi", float("-inf"), False)
    loop = FakeLoop(lambda _: [*step_events_of([never], top_tokens=(never,))])
    body = CHAT | {"logprobs": True, "top_logprobs": 1}
    async with serving(loop) as server, server.post(PATH, body) as response:
        (one,) = (await response.json())["choices"][0]["logprobs"]["content"]
    assert one["logprob"] == one["top_logprobs"][0]["logprob"] == -9999.0


async def test_n_makes_choices_with_seeds_of_their_own() -> None:
    async with serving(hi_loop()) as server:
        async with server.post(PATH, CHAT | {"n": 2, "seed": 2**64 - 1}) as response:
            answer = await response.json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["usage"]["prompt_tokens"] == 28
        assert answer["usage"]["completion_tokens"] == 6
        seeds = [request.sampling.seed for request in server.loop.requests]
        assert seeds == [2**64 - 1, 0]


async def test_n_streams_its_choices_by_index() -> None:
    body = CHAT | {"n": 2, "stream": True}
    async with serving(hi_loop()) as server, server.post(PATH, body) as response:
        chunks = chunks_of(await response.text())
    text = {0: "", 1: ""}
    for chunk in chunks:
        text[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    assert text == {0: "Hi!", 1: "Hi!"}
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
    assert roles.count("assistant") == 2


async def test_nulls_mean_absent() -> None:
    names = (
        "max_completion_tokens temperature top_p frequency_penalty presence_penalty stop stream"
        " stream_options seed n logit_bias logprobs top_logprobs tools tool_choice"
        " response_format model user ignore_eos"
    )
    body = CHAT | dict.fromkeys(names.split())
    async with serving(hi_loop()) as server, server.post(PATH, body) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"do_sample": True, "temperature": 1.0, "top_p": 1.0}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 0, "top_p": 0.5}, {"do_sample": False, "top_p": 1.0}),
        ({"top_p": 0}, {"do_sample": False}),
        ({"top_p": 1}, {"do_sample": True, "top_p": 1.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"presence_penalty": 0}, {"presence_penalty": 0.0, "repetition_penalty": 1.0}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5, "repetition_penalty": 1.0}),
        ({"top_k": -1}, {"top_k": 0}),
    ],
)
async def test_openai_parameters(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    async with serving(hi_loop()) as server:
        async with server.post(PATH, CHAT | fields) as response:
            assert response.status == 200
        sampling = server.loop.requests[0].sampling
        assert {name: getattr(sampling, name) for name in expected} == expected


async def test_stop_may_be_a_text_and_is_trimmed() -> None:
    async with serving(hi_loop()) as server:
        await server.post(PATH, CHAT | {"stop": "END", "ignore_eos": True})
        stopping = server.loop.requests[0].stopping
        assert stopping.stop == ("END",)
        assert not stopping.keep_stop
        assert stopping.ignore_eos


async def test_nulls_and_empty_texts_in_a_list_of_stop_strings_mean_nothing() -> None:
    async with serving(hi_loop()) as server:
        await server.post(PATH, CHAT | {"stop": [None, "", "a", None, "b", ""]})
        assert server.loop.requests[0].stopping.stop == ("a", "b")


async def test_cached_prompt_tokens_count_once_for_all_samples() -> None:
    cached = iter((3, 20))
    loop = FakeLoop(lambda _: [*step_events_of([HI], cached_tokens=next(cached))])
    async with serving(loop) as server, server.post(PATH, CHAT | {"n": 2}) as response:
        usage = (await response.json())["usage"]
    assert usage["prompt_tokens"] == 28
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_max_completion_tokens_wins() -> None:
    async with serving(hi_loop()) as server:
        await server.post(PATH, CHAT | {"max_completion_tokens": 5, "max_tokens": 9})
        assert server.loop.requests[0].stopping.max_new_tokens == 5


async def test_an_unknown_model_is_served_and_echoed() -> None:
    async with serving(hi_loop()) as server:
        async with server.post(PATH, CHAT | {"model": "dummy"}) as response:
            assert (await response.json())["model"] == "dummy"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n": 3}, "Input validation error: `n` must be > 0 and <= 2. Given: 3"),
        (
            {"response_format": {"type": "json_object"}},
            "Input validation error: grammar is not supported",
        ),
        (
            {"logit_bias": {"300": 2}},
            "Input validation error: `logit_bias` has ids of the vocabulary, >= 0 and < 300."
            " Given: 300",
        ),
        (
            {"logit_bias": {"cat": 2}},
            "Input validation error: `logit_bias` has token ids as its keys. Given: 'cat'",
        ),
        (
            {"logit_bias": {"9" * 5000: 2}},
            "Input validation error: `logit_bias` has token ids as its keys. Given: '"
            + "9" * 40
            + "'",
        ),
        (
            {"logprobs": True, "top_logprobs": 6},
            "Input validation error: `top_logprobs` must be >= 0 and <= 5. Given: 6",
        ),
        (
            {"top_logprobs": 2},
            "Input validation error: `top_logprobs` needs `logprobs`: true. Given: 2",
        ),
        ({"messages": []}, "Input validation error: `messages` cannot be empty"),
        (
            {"temperature": 0, "top_p": 7},
            "Input validation error: `top_p` must be > 0.0 and < 1.0",
        ),
        (
            {"presence_penalty": 2.5},
            "Input validation error: `presence_penalty` must be >= -2.0 and <= 2.0",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused_is_named(fields: dict[str, Any], text: str, stream: bool) -> None:
    async with serving() as server:
        async with server.post(PATH, CHAT | fields | {"stream": stream}) as response:
            assert response.status == 422
            assert await flat_error(response) == {"error": text, "error_type": "validation"}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"n": 1, "user": "me", "parallel_tool_calls": True},
    ],
)
async def test_neutral_values_are_accepted(fields: dict[str, Any]) -> None:
    async with serving(hi_loop()) as server, server.post(PATH, CHAT | fields) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "a"}, "messages[0]: missing field `role`"),
        ({"role": "user"}, "messages[0]: needs `content` or `tool_calls`"),
        ({"role": "user", "content": None}, "messages[0]: needs `content` or `tool_calls`"),
        ({"role": "user", "content": 3}, "messages[0].content: expected a text or a list"),
        ({"role": "user", "content": [{"type": "audio"}]}, "messages[0].content[0]: expected"),
        ({"role": "user", "content": None, "tool_calls": {}}, "messages[0].tool_calls: expected"),
        ({"role": "user", "tool_calls": [1]}, "messages[0].tool_calls[0]: expected"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "`messages[0].content[0]` is an image",
        ),
    ],
)
async def test_bad_messages_are_refused(message: dict[str, Any], text: str) -> None:
    async with serving() as server, server.post(PATH, {"messages": [message]}) as response:
        assert response.status == 422
        assert text in (await flat_error(response))["error"]


@pytest.mark.parametrize("content", [{}, {"content": None}])
async def test_a_message_of_tool_calls_alone_is_served(content: dict[str, Any]) -> None:
    call = {"id": "0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "tool_calls": [call]} | content
    body = {"messages": [*MESSAGES, message, {"role": "tool", "content": "7"}]}
    async with serving() as server, server.post("/chat_tokenize", body) as response:
        assert response.status == 200
        text = (await response.json())["templated_text"]
    assert text.endswith(
        '<|assistant|><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        "<|user|><tool_response>\n7\n</tool_response>\n<|assistant|>"
    )


async def test_text_chunks_are_joined() -> None:
    content = [{"type": "text", "text": "Say"}, {"type": "text", "text": " hi"}]
    body = CHAT | {"messages": [{"role": "user", "content": content, "name": None}]}
    async with serving(hi_loop()) as server:
        await server.post(PATH, body)
        assert server.loop.requests[0].prompt_text.startswith("<|user|>Say hi\n")


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "<|assistant|>Sure"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "<|assistant|>Sure "),
        ({"continue_final_message": False}, "<|assistant|>Sure \n<|assistant|>"),
        ({"add_generation_prompt": True}, "<|assistant|>Sure \n<|assistant|>"),
        ({"add_generation_prompt": False}, "<|assistant|>Sure \n"),
    ],
)
@pytest.mark.parametrize("path", ["/chat_tokenize", PATH])
async def test_how_the_prompt_ends(fields: dict[str, Any], end: str, path: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Sure "}]
    async with serving(hi_loop()) as server:
        async with server.post(path, CHAT | fields | {"messages": messages}) as response:
            answer = await response.json()
        prompt = answer.get("templated_text") or server.loop.requests[0].prompt_text
    assert prompt == "<|user|>Say hi\n" + end


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "`add_generation_prompt` and `continue_final_message` exclude each other",
        ),
        ({"chat_template": "{{ 1 }}"}, "`chat_template` may name one of the model's templates"),
        (
            {"chat_template_kwargs": {"messages": []}},
            "`chat_template_kwargs.messages` is no variable",
        ),
    ],
)
async def test_what_a_prompt_cannot_be_made_of_is_named(fields: dict[str, Any], text: str) -> None:
    async with serving() as server, server.post("/chat_tokenize", CHAT | fields) as response:
        assert response.status == 422
        assert text in (await flat_error(response))["error"]


async def test_variables_and_documents_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ documents[0].text }}", TOKENS)
    fields = {"chat_template_kwargs": {"enable_thinking": False}, "documents": [{"text": "α"}]}
    async with serving(template=template) as server:
        async with server.post("/chat_tokenize", CHAT | fields) as response:
            assert (await response.json())["templated_text"] == "Falseα"


async def test_names_and_ids_reach_the_template() -> None:
    source = "{% for m in messages %}{{ m.name }}{{ m.tool_call_id }}{{ m.tool_calls }}{% endfor %}"
    messages = [{"role": "tool", "content": "7", "name": "f", "tool_call_id": "a"}]
    async with serving(template=ChatTemplate(source, TOKENS)) as server:
        async with server.post("/chat_tokenize", {"messages": messages}) as response:
            assert (await response.json())["templated_text"] == "fa"


async def test_a_template_that_never_ends_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.3)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    async with serving(template=ChatTemplate(loop, TOKENS)) as server:
        hung = asyncio.ensure_future(server.http.post("/chat_tokenize", json=CHAT))
        async with server.http.get("/info") as response:
            assert response.status == 200
            assert not hung.done()
        async with await hung as response:
            assert response.status == 422
            assert (await flat_error(response))["error"].endswith("rendering took more than 0.3 s")


async def test_a_long_chat_is_rendered_all_the_same() -> None:
    async with serving() as server:
        async with server.post("/chat_tokenize", {"messages": MESSAGES * 800}) as response:
            assert (await response.json())["templated_text"].count("Say hi") == 800


async def test_an_assistant_message_at_the_end_is_continued() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Hello, I"}]
    async with serving(hi_loop()) as server:
        await server.post(PATH, CHAT | {"messages": messages})
        assert server.loop.requests[0].prompt_text.endswith("<|assistant|>Hello, I")


@pytest.mark.parametrize(
    "fields", [{"n": 3}, {"temperature": -1}, {"stop": ["a"] * 5}, {"max_tokens": 0}]
)
async def test_what_needs_no_prompt_is_refused_before_it_is_rendered(
    fields: dict[str, Any],
) -> None:
    missing = MissingTemplate("nobody should have asked")
    async with serving(template=missing) as server:
        async with server.post(PATH, CHAT | fields) as response:
            assert response.status == 422
            assert (await flat_error(response))["error_type"] == "validation"


async def test_no_template_is_an_error_of_its_own() -> None:
    missing = MissingTemplate("template not found (looked for one in x)")
    async with serving(template=missing) as server, server.post(PATH, CHAT) as response:
        assert response.status == 422
        assert await flat_error(response) == {
            "error": "Template error: template not found (looked for one in x)",
            "error_type": "template_error",
        }
        assert 'tgi_request_failure{err="template"} 1' in server.readiness.metrics.render()


async def test_a_failure_in_a_stream_has_its_real_status_and_then_done() -> None:
    loop = FakeLoop(lambda _: [(StreamEvent(FAILED),), GenerationFailed("Server error: boom")])
    async with serving(loop) as server:
        async with server.post(PATH, CHAT | {"stream": True}) as response:
            assert response.status == 200
            events = await events_of(response)
    assert events[1:] == [
        'data: {"error":{"message":"Request failed during generation: Server error: boom",'
        '"http_status_code":424,"type":"server_error","param":null,"code":"generation"}}',
        "data: [DONE]",
        "",
    ]


async def test_a_failure_of_one_of_two_choices_ends_both() -> None:
    plays = iter(([*step_events_of([HI, BANG])], [GenerationFailed("Server error: boom")]))
    loop = FakeLoop(lambda _: next(plays))
    async with serving(loop) as server:
        async with server.post(PATH, CHAT | {"n": 2}) as response:
            assert response.status == 424
        assert loop.num_open == 0


async def test_chat_tokenize_shows_the_prompt() -> None:
    async with serving() as server, server.post("/chat_tokenize", CHAT) as response:
        answer = await response.json()
        assert answer["templated_text"] == "<|user|>Say hi\n<|assistant|>"
        assert answer["tokenize_response"][0]["text"] == "<"


@pytest.mark.parametrize(("fields", "min_p"), [({}, 0.05), ({"temperature": 0}, 0.0)])
async def test_min_p_reaches_the_shard_unless_the_answer_is_greedy(
    fields: dict[str, object], min_p: float
) -> None:
    async with serving(hi_loop()) as server:
        await server.post(PATH, CHAT | {"min_p": 0.05} | fields)
        assert server.loop.requests[0].sampling.min_p == pytest.approx(min_p)
