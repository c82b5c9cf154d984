"""Errors in the format of each family of routes, and as their clients raise them."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import huggingface_hub.errors
import langchain_core.exceptions
import openai
import pytest
import text_generation.errors
from huggingface_hub import AsyncInferenceClient
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from tests.fakes.fake_loop import FAILED, FakeLoop, step_events_of
from tests.fakes.fake_server import FakeServer, events_of, flat_error, serving
from text_generation import AsyncClient

from kagami_proto.errors import (
    GenerationFailed,
    IncompleteGeneration,
    InvalidRequest,
    KagamiError,
    MalformedBody,
    Overloaded,
    ShardLost,
    Unauthorized,
)
from kagami_router.api.routes import FAMILIES_OF_ROUTES
from kagami_router.api.web.errors import Family, error_body, error_event
from kagami_router.request.values import StreamEvent, Timings, ValidRequest

CHAT = {"messages": [{"role": "user", "content": "Say hi"}]}
CHAT_PATH = "/v1/chat/completions"


def failing(*script: Any) -> FakeLoop:
    return FakeLoop(lambda _: list(script))


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("/generate", Family.NATIVE),
        ("/v1x", Family.NATIVE),
        ("/v1/chat/completions", Family.OPENAI),
        ("/v1/nowhere", Family.OPENAI),
        ("/v1/messages", Family.ANTHROPIC),
        ("/v1/messages/count_tokens", Family.ANTHROPIC),
        ("/v1/messagesx", Family.OPENAI),
    ],
)
def test_the_path_decides_the_family(path: str, family: Family) -> None:
    assert FAMILIES_OF_ROUTES.of(path) is family


@pytest.mark.parametrize(
    ("error", "kind", "code", "param"),
    [
        (InvalidRequest("`top_p` must be > 0", field="top_p"),
         "invalid_request_error", "validation", "top_p"),
        (MalformedBody("a.b: Expected", field="a.b"),
         "invalid_request_error", "validation", "a.b"),
        (InvalidRequest("grammar is not valid"), "invalid_request_error", "validation", None),
        (Unauthorized("no"), "authentication_error", "unauthorized", None),
        (Overloaded("Model is overloaded"), "rate_limit_error", "overloaded", None),
        (GenerationFailed("`x` broke"), "server_error", "generation", None),
        (IncompleteGeneration("x"), "server_error", "incomplete_generation", None),
    ],
)  # fmt: skip
def test_openai_errors_name_type_code_and_field(
    error: KagamiError, kind: str, code: str, param: str | None
) -> None:
    answer = json.loads(error_body(error, Family.OPENAI))
    assert (answer["error"]["type"], answer["error"]["code"]) == (kind, code)
    assert answer["error"]["param"] == param
    assert answer["error_type"] == code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("`max_tokens` is missing"), "invalid_request_error"),
        (Unauthorized("no"), "authentication_error"),
        (Overloaded("Model is overloaded"), "rate_limit_error"),
        (ShardLost("x"), "api_error"),
        (IncompleteGeneration("x"), "api_error"),
    ],
)
def test_anthropic_errors_have_its_types(error: KagamiError, kind: str) -> None:
    answer = json.loads(error_body(error, Family.ANTHROPIC))
    assert (answer["type"], answer["error"]["type"]) == ("error", kind)
    event = error_event(error, Family.ANTHROPIC)
    assert event == b"event: error\ndata: %b\n\n" % error_body(error, Family.ANTHROPIC)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nowhere", 404), ("POST", "/v1/nowhere", 404), ("GET", CHAT_PATH, 405)],
)
async def test_below_v1_what_is_not_there_is_said_in_json(
    method: str, path: str, status: int
) -> None:
    async with serving() as server, server.http.request(method, path) as response:
        assert response.status == status
        assert f"There is no {method} {path}" in (await flat_error(response))["error"]
        assert response.headers.get("allow") == ("POST" if status == 405 else None)


# ---------------------------------------------------------------------- a full context

LIMIT = "This model's maximum context length is"
LONG = [{"role": "user", "content": "a" * 100}]
VERY_LONG = [{"role": "user", "content": "1" * 3000}]


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/v1/completions", {"prompt": [7] * 64},
         f"{LIMIT} 63 tokens. However, your messages resulted in 64 tokens."
         " Please reduce the length of the messages. (context_length_exceeded)"),
        ("/v1/completions", {"prompt": [7] * 60, "max_tokens": 5},
         f"{LIMIT} 64 tokens. However, you requested 65 tokens (60 in the messages, 5 in the"
         " completion). Please reduce the length of the messages or completion."
         " (context_length_exceeded)"),
        ("/v1/completions", {"prompt": "a" * 100, "stream": True},
         f"{LIMIT} 63 tokens. However, your messages resulted in 101 tokens."
         " Please reduce the length of the messages. (context_length_exceeded)"),
        (CHAT_PATH, {"messages": LONG, "max_tokens": 4, "stream": True},
         f"{LIMIT} 63 tokens. However, your messages resulted in 122 tokens."
         " Please reduce the length of the messages. (context_length_exceeded)"),
        (CHAT_PATH, {"messages": VERY_LONG},
         f"{LIMIT} 63 tokens. However, your messages resulted in 3000 tokens."
         " Please reduce the length of the messages."
         " (context_length_exceeded; the prompt has at least 3000 tokens)"),
        ("/v1/responses", {"input": "a" * 100},
         f"{LIMIT} 63 tokens. However, your messages resulted in 122 tokens."
         " Please reduce the length of the messages. (context_length_exceeded)"),
    ],
)  # fmt: skip
async def test_openais_clients_read_that_the_context_is_full(
    path: str, body: dict[str, Any], text: str
) -> None:
    async with serving() as server, server.post(path, {"model": "tgi"} | body) as response:
        assert response.status == 400
        answer = await response.json()
        assert answer["error_type"] == "validation"
        assert answer["error"]["code"] == "context_length_exceeded"
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["message"] == text
        assert answer["error"]["param"] in body
        assert server.loop.requests == []


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (LONG, "prompt is too long: 122 tokens > 63 maximum"),
        (VERY_LONG, "prompt is too long: 3000 tokens > 63 maximum"
         "; the prompt has at least 3000 tokens"),
    ],
)  # fmt: skip
async def test_anthropics_clients_read_that_the_context_is_full(
    messages: list[dict[str, str]], text: str, is_stream: bool
) -> None:
    body = {"model": "tgi", "max_tokens": 9, "messages": messages, "stream": is_stream}
    async with serving() as server, server.post("/v1/messages", body) as response:
        assert response.status == 400
        error = {"type": "invalid_request_error", "message": text}
        assert await response.json() == {"type": "error", "error": error}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_native_clients_read_tgis_text_for_a_full_context(path: str) -> None:
    async with serving() as server, server.post(path, {"inputs": "a" * 63}) as response:
        assert response.status == 422
        assert (await flat_error(response)) == {
            "error": "Input validation error: `inputs` must have less than 63 tokens. Given: 64",
            "error_type": "validation",
        }


@pytest.mark.parametrize("text", ["a" * 100, "1" * 3000])
async def test_langchain_raises_its_own_type_for_a_full_context(text: str) -> None:
    async with serving() as server:
        base = f"{server.url}/v1"
        chat = ChatOpenAI(model="tgi", base_url=base, api_key=SecretStr("k"), max_retries=0)
        with pytest.raises(langchain_core.exceptions.ContextOverflowError):
            await chat.ainvoke(text)


# ---------------------------------------------------------------------- clients


async def raised(server: FakeServer, **changes: Any) -> openai.APIError:
    """What the openai client raises for a chat."""
    asked = {"model": "tgi", **CHAT, **changes}
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    async with client:
        try:
            answer = await client.chat.completions.create(**asked)
            async for _ in answer:
                pass
        except openai.APIError as error:
            return error
    raise AssertionError("nothing was raised")


async def test_openai_raises_a_refusal_as_its_own_type() -> None:
    async with serving() as server:
        for stream in (False, True):
            error = await raised(server, temperature=-1, stream=stream)
            assert isinstance(error, openai.UnprocessableEntityError)
            assert error.message.endswith("`temperature` must be strictly positive")
            assert (error.param, error.code) == ("temperature", "validation")
            assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("serve", "kind"),
    [
        (lambda: serving(key="right"), openai.AuthenticationError),
        (lambda: serving(max_concurrent_requests=0), openai.RateLimitError),
        (lambda: serving(is_open=False), openai.InternalServerError),
        (lambda: serving(failing(ShardLost("gone"))), openai.APIStatusError),
        (lambda: serving(payload_limit=10), openai.APIStatusError),
    ],
)
async def test_openai_raises_each_status_as_its_own_type(
    serve: Callable[[], Any], kind: type[openai.APIError]
) -> None:
    async with serve() as server:
        error = await raised(server)
    assert isinstance(error, kind)
    assert error.message
    assert error.code


async def test_openai_raises_a_failure_within_a_stream() -> None:
    async with serving(failing((StreamEvent(FAILED),), GenerationFailed("boom"))) as server:
        error = await raised(server, stream=True)
    assert error.message == "Request failed during generation: boom"
    assert error.code == "generation"


async def test_openai_sees_a_path_that_is_not_there() -> None:
    async with (
        serving() as server,
        openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
    ):
        with pytest.raises(openai.NotFoundError, match="There is no"):
            await client.embeddings.create(model="x", input="y")


# The client uses names that newer pydantic has deprecated.
OLD_PYDANTIC = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NATIVE_FAILURES = [
    (Overloaded("Model is overloaded"), "OverloadedError"),
    (GenerationFailed("boom"), "GenerationError"),
    (IncompleteGeneration("boom"), "IncompleteGenerationError"),
    (InvalidRequest("boom"), "ValidationError"),
]


@OLD_PYDANTIC
@pytest.mark.parametrize(("error", "name"), NATIVE_FAILURES)
async def test_tgi_clients_raise_their_own_types(error: KagamiError, name: str) -> None:
    async with serving(failing(error)) as server:
        with pytest.raises(getattr(text_generation.errors, name)):
            await AsyncClient(server.url).generate("a", max_new_tokens=2)
        async with AsyncInferenceClient(server.url) as client:
            with pytest.raises(getattr(huggingface_hub.errors, name)):
                await client.text_generation("a", max_new_tokens=2)


@OLD_PYDANTIC
@pytest.mark.parametrize(("error", "name"), NATIVE_FAILURES[1:3])
async def test_tgi_clients_raise_what_fails_within_a_stream(error: KagamiError, name: str) -> None:
    async with serving(failing((StreamEvent(FAILED),), error)) as server:
        with pytest.raises(getattr(text_generation.errors, name)):
            async for _ in AsyncClient(server.url).generate_stream("a", max_new_tokens=2):
                pass
        async with AsyncInferenceClient(server.url) as client:
            with pytest.raises(getattr(huggingface_hub.errors, name)):
                async for _ in await client.text_generation("a", max_new_tokens=2, stream=True):
                    pass


async def test_hub_shows_the_text_of_an_openai_error() -> None:
    async with serving() as server, AsyncInferenceClient(server.url) as client:
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as failure:
            await client.chat_completion([], max_tokens=5)
    assert "`messages` cannot be empty" in failure.value.server_message


# ---------------------------------------------------------------------- request ids


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/generate", {"inputs": "a"}),
        ("POST", "/generate_stream", {"inputs": "a"}),
        ("POST", CHAT_PATH, CHAT | {"stream": True}),
        ("POST", "/generate", {"inputs": ""}),
        ("POST", CHAT_PATH, {}),
        ("GET", "/health", None),
        ("GET", "/nowhere", None),
        ("OPTIONS", "/generate", None),
    ],
)
async def test_every_answer_has_the_clients_request_id(
    method: str, path: str, body: object
) -> None:
    headers = {"x-request-id": "req-17"}
    async with serving() as server:
        async with server.http.request(method, path, json=body, headers=headers) as response:
            assert response.headers["x-request-id"] == "req-17"
        async with server.http.request(method, path, json=body) as first:
            async with server.http.request(method, path, json=body) as second:
                made = {first.headers["x-request-id"], second.headers["x-request-id"]}
    assert len(made) == 2
    assert "x-request-id" in first.headers.get("access-control-expose-headers", "x-request-id")


@pytest.mark.parametrize("given", ["", "a b", "é", "x" * 129])
async def test_an_id_that_is_not_sane_is_replaced(given: str) -> None:
    async with serving() as server:
        async with server.http.get("/health", headers={"x-request-id": given}) as response:
            made = response.headers["x-request-id"]
    assert made != given
    assert len(made) == 24


@pytest.mark.parametrize("body", [{"inputs": "a"}, {"inputs": ""}])
async def test_the_log_line_of_a_request_has_its_id(
    body: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with serving() as server:
            headers = {"x-request-id": "req-17"}
            async with server.post("/generate", body, headers=headers) as response:
                await response.read()
    (record,) = [one for one in caplog.records if hasattr(one, "request_id")]
    assert record.request_id == "req-17"


async def test_a_body_that_is_too_long_has_its_log_line(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(payload_limit=10) as server:
        headers = {"x-request-id": "req-17"}
        async with server.post("/generate", {"inputs": "a"}, headers=headers) as response:
            assert response.status == 413
    (record,) = caplog.records
    assert record.request_id == "req-17"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_call_whose_client_went_away_has_its_log_line(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = FakeLoop()
    loop.gate.clear()
    headers = {"x-request-id": "req-17"}
    with caplog.at_level(logging.INFO):
        async with serving(loop) as server:
            call = asyncio.ensure_future(server.post(path, {"inputs": "a"}, headers=headers))
            await loop.entered.wait()
            if path == "/generate":
                call.cancel()
            else:
                (await call).close()
            async with asyncio.timeout(5):
                await loop.left.wait()
    (record,) = [one for one in caplog.records if hasattr(one, "request_id")]
    assert record.request_id == "req-17"


# ---------------------------------------------------------------------- x-* headers

AT_THE_END = ("x-compute-time", "x-total-time", "x-queue-time", "x-inference-time",
              "x-time-per-token", "x-generated-tokens")  # fmt: skip
AT_THE_START = ("x-compute-type", "x-compute-characters", "x-validation-time", "x-prompt-tokens")
GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a"}),
    ("/", {"inputs": "a"}),
    (CHAT_PATH, CHAT),
    ("/v1/completions", {"prompt": ["a", "b"]}),
]


@pytest.mark.parametrize(("path", "body"), GENERATING)
async def test_a_whole_answer_has_every_header(path: str, body: object) -> None:
    async with serving() as server, server.post(path, body) as response:
        assert response.status == 200
        for name in AT_THE_START + AT_THE_END:
            float(response.headers[name]) if name != "x-compute-type" else None


@pytest.mark.parametrize(("path", "body"), [("/generate_stream", {"inputs": "a"}), *GENERATING[1:]])
async def test_a_stream_has_the_early_ones_and_the_rest_in_its_last_comment(
    path: str, body: dict[str, Any]
) -> None:
    async with serving() as server, server.post(path, body | {"stream": True}) as response:
        for name in AT_THE_START:
            assert response.headers[name]
        blocks = (await response.text()).removesuffix("\n\n").split("\n\n")
    is_openai = path.startswith("/v1")
    comment = blocks[-2 if is_openai else -1]
    assert comment.startswith(": ")
    told = dict(pair.split("=") for pair in comment[2:].split())
    assert set(AT_THE_END) <= set(told)
    assert told["x-generated-tokens"] == ("4" if path == "/v1/completions" else "2")


async def test_the_times_of_several_prompts_are_summed_as_in_tgi() -> None:
    def half_a_second(request: ValidRequest) -> list[Any]:
        now = time.monotonic()
        timings = Timings(now, now, now, now + 0.5)
        (event,) = step_events_of([FAILED])[0]
        assert event.end is not None
        return [(event._replace(end=replace(event.end, timings=timings)),)]

    async with serving(FakeLoop(half_a_second)) as server:
        async with server.post("/v1/completions", {"prompt": ["a", "b", "c"]}) as response:
            headers = response.headers
    assert headers["x-inference-time"] == "1500"
    assert headers["x-time-per-token"] == "1500"


async def test_errors_have_their_length() -> None:
    async with serving() as server, server.post(CHAT_PATH, {}) as response:
        assert int(response.headers["content-length"]) == len(await response.read())


async def test_an_overload_says_when_to_come_back_and_logs_the_flag(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(max_concurrent_requests=0) as server:
        async with server.post("/generate", {"inputs": "a"}) as response:
            assert response.status == 429
            assert response.headers["retry-after"]
            assert (await flat_error(response))["error"] == "Model is overloaded"
    assert caplog.records[0].limit == "--max-concurrent-requests"


# ---------------------------------------------------------------------- bodies and keys


async def test_the_api_key_may_come_as_anthropics_header() -> None:
    async with serving(key="Secret") as server:
        for given, status in (("Secret", 200), ("secret", 401)):
            headers = {"x-api-key": given}
            async with server.post("/generate", {"inputs": "a"}, headers=headers) as response:
                assert response.status == status


async def test_an_error_event_of_a_native_stream_is_its_last() -> None:
    async with serving(failing((StreamEvent(FAILED),), GenerationFailed("boom"))) as server:
        async with server.post("/generate_stream", {"inputs": "a"}) as response:
            events = await events_of(response)
    assert events[1:] == [
        'data: {"error":"Request failed during generation: boom","error_type":"generation"}',
        "",
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", '{"messages":[{"role":"user","content":"a"}],"tool_choice":%s}'),
        ("/v1/responses", '{"input":[{"type":%s}]}'),
    ],
)
async def test_a_body_that_is_just_shallow_enough_to_be_read_is_no_bug_of_ours(
    path: str, body: str
) -> None:
    statuses = set()
    async with serving() as server:
        for depth in range(900, 1000):
            deep = "[" * depth + "1" + "]" * depth
            async with server.http.post(
                path, data=body.replace("%s", deep), headers={"content-type": "application/json"}
            ) as response:
                statuses.add(response.status)
    assert statuses == {400, 422}
