import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer, make_mocked_request
from tests.fakes.fake_server import flat_error, serving
from tests.fakes.panics import panicking_tokenizer

from kagami_router.api.routes import make_metrics_app
from kagami_router.api.web.app_state import Readiness
from kagami_router.api.web.errors import Families
from kagami_router.api.web.middleware import (
    FAILURE_CAUSE,
    FAMILIES,
    count_calls,
    errors,
    failure_cause,
)
from kagami_router.telemetry.metric_names import FAILURES
from kagami_router.telemetry.metrics import Metrics

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "Failed to parse the request body as JSON: "),
        (b"{", 400, "Failed to parse the request body as JSON: "),
        (b'{"inputs":"\xff"}', 400, "Failed to parse the request body as JSON: "),
        (b'{"inputs":"\\ud800"}', 400, "Failed to parse the request body as JSON: "),
        (b'{"inputs":"a","parameters":{"top_p":NaN}}', 400, "Failed to parse"),
        (b"{}", 422, "missing required field `inputs`"),
        (b'["a"]', 422, "got `array`"),
        (b'{"inputs":null}', 422, ": inputs: Expected `str`, got `null`"),
        (b'{"inputs":["a"]}', 422, ": inputs: Expected `str`, got `array`"),
        (b'{"inputs":"a","parameters":null}', 422, ": parameters: Expected `object`"),
        (
            b'{"inputs":"a","parameters":{"temperature":"0.5"}}',
            422,
            ": parameters.temperature: Expected `float | null`, got `str`",
        ),
        (b'{"inputs":"a","parameters":{"max_new_tokens":-1}}', 422, ": parameters.max_new_tok"),
        (b'{"inputs":"a","parameters":{"max_new_tokens":1.5}}', 422, ": parameters.max_new_tok"),
        (b'{"inputs":"a","parameters":{"seed":-1}}', 422, ": parameters.seed: "),
        (b'{"inputs":"a","parameters":{"stop":"x"}}', 422, ": parameters.stop: "),
        (b'{"inputs":"a","parameters":{"do_sample":null}}', 422, ": parameters.do_sample: "),
    ],
)
async def test_a_bad_body_is_refused_with_the_path(body: bytes, status: int, text: str) -> None:
    async with serving() as server:
        async with server.http.post("/generate", data=body, headers=JSON) as response:
            assert response.status == status
            answer = await response.json()
            assert answer["error_type"] == "validation"
            assert text in answer["error"]


BODIES: dict[str, bytes] = {
    "/generate": b'{"inputs":"a"',
    "/tokenize": b'{"inputs":"a"',
    "/v1/chat/completions": b'{"messages":[{"role":"user","content":"a"}]',
    "/v1/completions": b'{"prompt":"a"',
    "/v1/responses": b'{"input":"a"',
    "/v1/messages": b'{"max_tokens":5,"messages":[{"role":"user","content":"a"}]',
    "/v1/messages/count_tokens": b'{"messages":[{"role":"user","content":"a"}]',
    "/invocations": b'{"inputs":"a"',
    "/vertex": b'{"instances":[{"inputs":"a","x":"\xc3\xa4"}]',
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "wrong",
    [
        b'"user_note":"\xff"',
        b'"a\xc3":1',
        b'"x":{"y":[1,"\xed\xa0\x80"]}',  # a surrogate
        b'"x":"\xc3\xa4\xc0\xaf"',  # an overlong form, behind a good character
        b'"x":"\xf5\x80\x80\x80"',
    ],
)
async def test_bytes_that_are_no_utf_8_are_refused_in_members_that_are_skipped(
    path: str, wrong: bytes
) -> None:
    async with serving() as server:
        body = BODIES[path] + b"," + wrong + b"}"
        async with server.http.post(path, data=body, headers=JSON) as response:
            assert response.status == 400, await response.text()
            assert "Failed to parse the request body as JSON: 'utf-8'" in await response.text()
        assert server.loop.requests == []


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_json_that_is_nested_too_deeply_is_refused(path: str) -> None:
    body = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    async with serving() as server:
        async with server.http.post(path, data=body, headers=JSON) as response:
            assert response.status == 400
            text = (await flat_error(response))["error"]
    assert text.startswith("Failed to parse the request body as JSON: ")


async def sent_raw(url: str, message: bytes, body: bytes | None = None) -> str:
    """The raw answer to bytes that no client library would send; `body` follows `100 Continue`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(message)
    async with asyncio.timeout(5):
        if body is not None:
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
        answer = await reader.readuntil(b"\r\n\r\n")
        answer += await reader.read(4096)
    writer.close()
    await writer.wait_closed()
    return answer.decode()


HEAD = b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


async def test_a_body_that_cannot_be_read_is_refused_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = HEAD + b"expect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving() as server:
        answer = await sent_raw(server.url, head, b"zz\r\n")
    assert answer.startswith("HTTP/1.1 400 ")
    assert "Failed to buffer the request body: The body is not framed as its headers" in answer
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].exc_info is None


@pytest.mark.parametrize(
    "message", [CHUNKED + b"zz\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nno header\r\n\r\n"]
)
async def test_what_is_no_http_is_a_warning_of_one_line(
    message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as server:
        answer = await sent_raw(server.url, message)
    head, _, body = answer.partition("\r\n\r\n")
    assert " 400 " in head
    assert '{"error":"Malformed HTTP: Invalid' in body
    (record,) = caplog.records
    assert f"x-request-id: {record.request_id}" in head.lower()
    assert record.levelno == logging.WARNING
    assert record.exc_info is None
    assert record.getMessage().startswith("Malformed HTTP: Invalid")
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("message", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"BAD / HTTX\r\n\r\n"])
async def test_what_is_no_http_is_answered_without_naming_our_software(message: bytes) -> None:
    async with serving() as server:
        answer = (await sent_raw(server.url, message)).lower()
    assert "content-type: application/json" in answer
    assert "access-control-allow-origin: *" in answer
    assert "\r\nserver:" not in answer
    assert "aiohttp" not in answer


async def test_a_key_in_a_broken_header_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server:
        answer = await sent_raw(server.url, HEAD + b"authorization: Bearer hunter2\0\r\n\r\n")
    assert "Malformed HTTP: Invalid header value char" in answer
    assert "hunter2" not in answer + caplog.text


async def test_unknown_fields_are_ignored() -> None:
    body = {"inputs": "a", "junk": 1, "parameters": {"junk": 2}}
    async with serving() as server, server.post("/generate", body) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("application/ld+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ],
)
async def test_only_json_is_read(content_type: str, status: int) -> None:
    async with serving() as server:
        headers = {"content-type": content_type}
        async with server.http.post(
            "/generate", data=b'{"inputs":"a"}', headers=headers
        ) as response:
            assert response.status == status


async def test_a_long_body_is_refused_naming_limit_and_flag() -> None:
    async with serving(payload_limit=100) as server:
        async with server.post("/generate", {"inputs": "a" * 200}) as response:
            assert response.status == 413
            error = (await flat_error(response))["error"]
    assert "100 bytes" in error
    assert "--payload-limit" in error


async def test_unknown_paths_and_methods_have_empty_answers() -> None:
    async with serving() as server:
        async with server.http.get("/nowhere") as response:
            assert (response.status, await response.read()) == (404, b"")
        async with server.http.get("/generate") as response:
            assert (response.status, await response.read()) == (405, b"")
            assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer Secret", 200),
        ("bearer Secret", 200),
        ("Bearer secret", 401),
        ("Bearer Secret2", 401),
        ("Secret", 401),
        ("Basic Secret", 401),
        (None, 401),
    ],
)
async def test_the_api_key_is_compared_exactly(header: str | None, status: int) -> None:
    headers = {"authorization": header} if header else {}
    async with serving(key="Secret") as server:
        async with server.post("/generate", {"inputs": "a"}, headers=headers) as response:
            assert response.status == status
            if status == 401:
                assert (await flat_error(response))["error_type"] == "unauthorized"
                assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/", 200),
        ("/ping", 200),
        ("/metrics", 200),
        ("/v2/health/live", 200),
        ("/v2/models/m/versions/1/ready", 200),
        ("/v2/models/m/versions/1", 401),
        ("/info", 401),
        ("/v1/models", 401),
        ("/nowhere", 404),
    ],
)
async def test_the_api_key_guards_all_but_health_and_metrics(path: str, status: int) -> None:
    async with serving(key="Secret") as server, server.http.get(path) as response:
        assert response.status == status


@pytest.mark.parametrize("path", ["/tokenize", "/chat_tokenize", "/v1/completions", "/"])
async def test_the_api_key_guards_every_post(path: str) -> None:
    async with serving(key="Secret") as server, server.post(path, {}) as response:
        assert response.status == 401


async def test_a_byte_that_is_no_text_does_not_stand_for_another() -> None:
    async with serving(key="a?b") as server:
        answer = await sent_raw(
            server.url, b"GET /info HTTP/1.1\r\nhost: a\r\nauthorization: Bearer a\xffb\r\n\r\n"
        )
    assert " 401 " in answer


async def test_preflight_allows_authorization_without_a_key() -> None:
    async with serving(key="Secret") as server:
        async with server.http.options("/v1/chat/completions") as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == "*"
            assert response.headers["access-control-allow-methods"] == "GET,POST"
            assert "authorization" in response.headers["access-control-allow-headers"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/nowhere"])
async def test_every_answer_has_the_cors_headers(path: str) -> None:
    async with serving() as server, server.post(path, {"inputs": "a"}) as response:
        assert response.headers["access-control-allow-origin"] == "*"
        assert "x-compute-time" in response.headers["access-control-expose-headers"]
        assert response.headers["vary"].startswith("origin")


async def test_a_list_of_origins_is_echoed() -> None:
    async with serving(origins=("https://a.example",)) as server:
        for origin, expected in (("https://a.example", "https://a.example"), ("https://b", None)):
            async with server.http.get("/health", headers={"origin": origin}) as response:
                assert response.headers.get("access-control-allow-origin") == expected


async def test_the_metrics_of_a_port_of_their_own_have_the_same_headers() -> None:
    async with (
        TestServer(make_metrics_app(Readiness(Metrics()), ())) as server,
        ClientSession() as http,
    ):
        async with http.get(server.make_url("/metrics")) as response:
            assert response.status == 200
            assert response.headers["x-request-id"]
            assert "server" not in response.headers


def test_every_cause_is_a_label() -> None:
    assert failure_cause(ValueError()) in FAILURES


async def counted_call(
    metrics: Metrics, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """POST / to `handler` behind the middlewares that answer and count errors."""
    count = count_calls(metrics, frozenset({"/"}))

    async def counted(request: web.Request) -> web.StreamResponse:
        return await count(request, handler)

    app = web.Application()
    app[FAMILIES] = Families(())
    request = make_mocked_request("POST", "/", app=app)
    request.match_info.route.resource.canonical = "/"
    return await errors(request, counted)


@pytest.mark.parametrize(
    ("cause", "counted", "num_lines"),
    [
        (None, 'tgi_request_failure{err="dropped"} 1', 1),
        ("", "tgi_request_success 1", 0),
        ("generation", 'tgi_request_failure{err="generation"} 1', 0),
    ],
)
async def test_a_client_that_leaves_during_the_last_bytes_changes_nothing(
    caplog: pytest.LogCaptureFixture, cause: str | None, counted: str, num_lines: int
) -> None:
    caplog.set_level(logging.INFO)

    async def last_bytes(request: web.Request) -> web.StreamResponse:
        if cause is not None:
            request[FAILURE_CAUSE] = cause
        raise asyncio.CancelledError

    metrics = Metrics()
    with pytest.raises(asyncio.CancelledError):
        await counted_call(metrics, last_bytes)
    assert counted in metrics.render()
    assert len(caplog.records) == num_lines


async def test_a_panic_of_a_library_is_answered_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def panic(request: web.Request) -> web.StreamResponse:
        panicking_tokenizer().decode([97])
        raise AssertionError("it did not panic")

    metrics = Metrics()
    response = await counted_call(metrics, panic)
    assert response.status == 500
    assert 'tgi_request_failure{err="generation"} 1' in metrics.render()
    (line,) = caplog.records
    assert line.getMessage() == "Internal error"
