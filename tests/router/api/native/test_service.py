import time
from collections.abc import Callable

import pytest
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tests.fakes.fake_loop import FakeLoop
from tests.fakes.fake_server import TEMPLATE, flat_error, serving

from kagami_router.api.schemas.encoding import MAX_MESSAGES
from kagami_router.api.web.app_state import TGI_VERSION
from kagami_router.request.validation import MIN_TEXT_TOKENS
from kagami_router.text.tokenizer import Tokenizer

GENERATING = [
    ("/", {"inputs": "a"}),
    ("/generate", {"inputs": "a"}),
    ("/generate_stream", {"inputs": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/completions", {"prompt": "a"}),
    ("/tokenize", {"inputs": "a"}),
]


@pytest.mark.parametrize("path", ["/health", "/", "/ping"])
async def test_health_is_empty_when_well(path: str) -> None:
    async with serving() as server, server.http.get(path) as response:
        assert response.status == 200
        assert await response.read() == b""
        assert not {"content-type", "server"} & {name.lower() for name in response.headers}


async def test_health_follows_the_loop() -> None:
    async with serving(FakeLoop(is_healthy=False)) as server:
        async with server.http.get("/health") as response:
            assert response.status == 503
            assert await response.read() == b'{"error":"unhealthy","error_type":"healthcheck"}'


async def test_head_works_where_get_does() -> None:
    async with serving() as server, server.http.head("/health") as response:
        assert response.status == 200


@pytest.mark.parametrize(("path", "body"), GENERATING)
async def test_before_the_model_is_warm_nothing_is_served(path: str, body: object) -> None:
    async with serving(is_open=False) as server:
        async with server.post(path, body) as response:
            assert response.status == 503
            assert await flat_error(response) == {
                "error": "The model is still loading",
                "error_type": "unavailable",
            }
        async with server.http.get("/health") as response:
            assert response.status == 503
        async with server.http.get("/metrics") as response:
            assert response.status == 200


async def test_a_stopping_server_refuses_new_work() -> None:
    async with serving() as server:
        server.readiness.close()
        async with server.post("/generate", {"inputs": "a"}) as response:
            assert response.status == 503
            assert (await flat_error(response))["error"] == "The server is shutting down"


async def test_info_is_the_union_of_both_versions() -> None:
    async with serving() as server, server.http.get("/info") as response:
        info = await response.json()
    assert list(info)[:14] == [
        "model_id",
        "model_sha",
        "model_pipeline_tag",
        "max_concurrent_requests",
        "max_best_of",
        "max_stop_sequences",
        "max_input_tokens",
        "max_total_tokens",
        "validation_workers",
        "max_client_batch_size",
        "router",
        "version",
        "sha",
        "docker_label",
    ]
    assert info["max_input_length"] == info["max_input_tokens"] == 63
    assert {"model_dtype", "model_device_type", "max_batch_total_tokens"} <= set(info)


def test_the_version_is_one_that_clients_accept() -> None:
    # llama-index refuses a server below 2.1.0
    assert tuple(int(part) for part in TGI_VERSION.split(".")) >= (2, 1, 0)


async def test_models_lists_the_one_model() -> None:
    async with serving() as server, server.http.get("/v1/models") as response:
        assert await response.read() == (
            b'{"object":"list","data":[{"id":"M","object":"model","created":%d,"owned_by":"M"}]}'
            % server.state.created
        )
        assert abs(server.state.created - time.time()) < 60


@pytest.mark.parametrize(("name", "status"), [("M", 200), ("m", 404), ("a/b", 404)])
async def test_a_model_is_found_by_its_name(name: str, status: int) -> None:
    async with serving() as server, server.http.get(f"/v1/models/{name}") as response:
        assert response.status == status
        if status == 404:
            assert (await flat_error(response))["error"] == f"The model `{name}` does not exist"


async def test_alive_is_not_ready() -> None:
    async with serving(is_open=False) as server:
        for path, status in (
            ("/health/live", 200),
            ("/health/ready", 503),
            ("/v2/health/live", 200),
            ("/v2/health/ready", 503),
        ):
            async with server.http.get(path) as response:
                assert response.status == status


@pytest.mark.parametrize("path", ["/health", "/info", "/v1/models", "/metrics", "/docs/"])
async def test_head_works_wherever_get_does(path: str) -> None:
    async with serving() as server, server.http.head(path) as response:
        assert response.status == 200
        assert await response.read() == b""


async def test_tokenize_counts_bytes() -> None:
    async with serving() as server, server.post("/tokenize", {"inputs": "Hé!"}) as response:
        assert await response.json() == [
            {"id": 0, "text": "", "start": 0, "stop": 0},
            {"id": id_of("H"), "text": "H", "start": 0, "stop": 1},
            {"id": id_of("Ã"), "text": "é", "start": 1, "stop": 3},
            {"id": id_of("©"), "text": "é", "start": 1, "stop": 3},
            {"id": id_of("!"), "text": "!", "start": 3, "stop": 4},
        ]


def id_of(token: str) -> int | None:
    return byte_tokenizer_with_start().token_to_id(token)


COUNTING = [
    ("/tokenize", lambda text: {"inputs": text}, "inputs"),
    ("/chat_tokenize", lambda text: {"messages": [{"role": "user", "content": text}]}, "messages"),
    (
        "/v1/messages/count_tokens",
        lambda text: {"model": "m", "messages": [{"role": "user", "content": text}]},
        "messages",
    ),
    ("/v1/responses/input_tokens", lambda text: {"model": "m", "input": text}, "input"),
]


@pytest.mark.parametrize(("path", "body", "field"), COUNTING)
async def test_a_text_that_surely_is_too_long_is_refused_before_it_is_tokenized(
    path: str, body: Callable[[str], object], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: object, *arguments: object) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(Tokenizer, "_encode", never)
    monkeypatch.setattr(Tokenizer, "_spans", never)
    async with serving() as server:
        async with server.post(path, body("1" * (MIN_TEXT_TOKENS + 1))) as response:
            text = await response.text()
            assert response.status in (400, 422)
    assert f"`{field}` must have at most 32768 tokens. Given: at least 32" in text


@pytest.mark.parametrize(("path", "body", "field"), COUNTING)
async def test_counting_has_permits_of_its_own(
    path: str, body: Callable[[str], object], field: str
) -> None:
    async with serving(max_concurrent_requests=1) as server:
        with server.state.infer.permits(1):
            async with server.post(path, body("a")) as response:
                assert response.status == 200
        with server.state.tokenize_permits.take():
            async with server.post(path, body("a")) as response:
                assert response.status == 429
            async with server.post("/generate", {"inputs": "a"}) as response:
                assert response.status == 200


async def test_metrics_are_prometheus_text() -> None:
    async with serving() as server:
        await server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}})
        async with server.http.get("/metrics") as response:
            text = await response.text()
    assert "\ntgi_request_count 1\n" in text
    assert "\ntgi_request_success 1\n" in text
    assert "\ntgi_request_generated_tokens_sum 2\n" in text
    assert "\ntgi_request_input_length_sum 2\n" in text


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "messages"),
        ("/chat_tokenize", "messages"),
        ("/v1/messages", "messages"),
        ("/v1/messages/count_tokens", "messages"),
        ("/v1/responses", "input"),
        ("/v1/responses/input_tokens", "input"),
    ],
)
async def test_a_conversation_has_so_many_messages_at_most(path: str, field: str) -> None:
    messages = [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)
    async with serving() as server:
        body = {field: messages, "max_tokens": 1, "model": "m"}
        async with server.post(path, body) as response:
            assert response.status in (400, 422)
            text = await response.text()
    assert f"{field}: Expected `array` of length <= {MAX_MESSAGES}" in text


async def test_the_tokenizer_answers_in_vllms_form() -> None:
    async with serving() as server:
        async with server.post("/tokenize", {"prompt": "Hi"}) as response:
            whole = await response.json()
        asked = {"prompt": "Hi", "add_special_tokens": False, "return_token_strs": True}
        async with server.post("/tokenize", asked) as response:
            bare = await response.json()
        async with server.post("/detokenize", {"tokens": whole["tokens"]}) as response:
            text = await response.json()
    assert whole == {
        "count": 3,
        "max_model_len": 64,
        "tokens": whole["tokens"],
        "token_strs": None,
    }
    assert bare["tokens"] == whole["tokens"][1:]
    assert bare["token_strs"] == ["H", "i"]
    assert text == {"prompt": "<s>Hi"}


async def test_the_tokenizer_tells_its_template() -> None:
    async with serving() as server, server.http.get("/tokenizer_info") as response:
        told = await response.json()
    assert told == {"chat_template": TEMPLATE}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "one of `inputs` and `prompt` is needed"),
        ("/tokenize", {"inputs": "a", "prompt": "a"}, "one of `inputs` and `prompt` is needed"),
        ("/detokenize", {"tokens": [99999]}, "`tokens[0]` must be a token id, >= 0 and <"),
    ],
)
async def test_what_the_tokenizer_cannot_read_is_named(
    path: str, body: dict[str, object], message: str
) -> None:
    async with serving() as server, server.post(path, body) as response:
        assert response.status == 422
        assert message in await response.text()
