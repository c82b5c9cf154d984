"""The span of a call, over a fake loop: its attributes, and the headers for the client."""

import asyncio
import logging
import re
from typing import Any

import pytest
from tests.fakes.fake_loop import FakeLoop, failed_colon
from tests.fakes.fake_server import FakeServer, serving
from tests.fakes.traced import Traced, events_of

from kagami_proto import logs
from kagami_proto.errors import GenerationFailed
from kagami_proto.span_names import Key
from kagami_router.api.routes import ROUTES

TRACE, SPAN = "ab" * 16, "cd" * 8
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
SECRET = "kumquat"
BODIES = {
    "/v1/completions": {"prompt": SECRET, "stop": ["zz" + SECRET]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": SECRET}]},
    "/v1/responses": {"input": SECRET},
    "/v1/messages": {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4},
    "/vertex": {"instances": [{"inputs": SECRET}]},
    "/v2/models/{model}/versions/{version}/infer": {"inputs": [{"name": "x", "data": [SECRET]}]},
}
GENERATING = [route.path for route in ROUTES if route.operation.generates]


def attributes(traced: Traced, name: str) -> dict[str, Any]:
    return dict(traced.one(name).attributes or {})


async def post(server: FakeServer, path: str, headers: dict[str, str] = PARENT) -> dict[str, str]:
    body = BODIES.get(path, {"inputs": SECRET, "parameters": {"stop": ["zz" + SECRET]}})
    url = path.format(model="m", version="1")
    async with server.post(url, body, headers=headers) as response:
        assert response.status == 200, await response.text()
        await response.read()
        return {name.lower(): value for name, value in response.headers.items()}


@pytest.mark.parametrize("path", GENERATING)
async def test_every_generating_route_goes_on_the_clients_trace(path: str) -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        headers = await post(server, path)
    root = traced.one(f"POST {path}")
    assert root.parent is not None
    assert (f"{root.parent.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, SPAN)
    assert root.context.trace_state.to_header() == "vendor=1"
    assert headers["x-trace-id"] == TRACE
    assert headers["traceresponse"] == f"00-{TRACE}-{root.context.span_id:016x}-01"
    assert root.kind.name == "SERVER"
    assert attributes(traced, f"POST {path}")[Key.HTTP_STATUS] == 200
    assert (root.attributes or {})[Key.OUTPUT_TOKENS]


@pytest.mark.parametrize("path", GENERATING)
async def test_no_text_is_in_any_span(path: str) -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        await post(server, path)
    told = "".join(span.to_json() for span in traced.spans)
    assert SECRET not in told
    assert "failed:" not in told


async def test_text_is_there_where_it_is_asked_for() -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing, traces_content=True) as server:
        await post(server, "/generate")
    root = attributes(traced, "POST /generate")
    assert root[Key.INPUT_MESSAGES] == (
        f'[{{"role": "user", "parts": [{{"type": "text", "content": "{SECRET}"}}]}}]'
    )
    assert '"content": " failed:"' in root[Key.OUTPUT_MESSAGES]
    assert root[Key.STOP_SEQUENCES] == ("zz" + SECRET,)


async def test_the_span_of_a_chat_has_its_attributes() -> None:
    traced = Traced()
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "max_tokens": 5,
        "n": 2,
    }
    async with serving(tracing=traced.tracing) as server:
        async with server.post("/v1/chat/completions", body) as response:
            assert response.status == 200
    said = attributes(traced, "POST /v1/chat/completions")
    assert said[Key.TEMPERATURE] == 0.5
    assert said[Key.TOP_P] == pytest.approx(0.9)
    assert said[Key.TIME_TO_FIRST_CHUNK] >= 0
    assert {key: said[key] for key in EXPECTED} == EXPECTED


EXPECTED = {
    Key.OPERATION: "chat",
    Key.PROVIDER: "kagami",
    Key.REQUEST_MODEL: "M",
    Key.MAX_TOKENS: 5,
    Key.SEED: 8,  # of the last sample
    Key.CHOICE_COUNT: 2,
    Key.FINISH_REASONS: ("length", "length"),
    Key.OUTPUT_TOKENS: 4,
    Key.HTTP_METHOD: "POST",
    Key.HTTP_ROUTE: "/v1/chat/completions",
    Key.URL_SCHEME: "http",
    Key.SERVER_ADDRESS: "127.0.0.1",
}


DURATION = re.compile(r"\d+(\.\d+)?(s|ms|µs|ns)")
SEED = re.compile(r"None|Some\(\d+\)")
TGIS_TIMES = ("total_time", "validation_time", "queue_time", "inference_time", "time_per_token")


@pytest.mark.parametrize("path", GENERATING)
async def test_the_span_has_tgis_attributes_as_texts(path: str) -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        await post(server, path)
    said = attributes(traced, f"POST {path}")
    assert all(DURATION.fullmatch(said[name]) for name in TGIS_TIMES)
    assert SEED.fullmatch(said["seed"])


async def test_tgis_seed_is_written_as_rust_writes_it() -> None:
    traced = Traced()
    body = {"inputs": "a", "parameters": {"do_sample": True, "seed": (1 << 64) - 1}}
    async with serving(tracing=traced.tracing) as server:
        async with server.post("/generate", body) as response:
            assert response.status == 200
    assert attributes(traced, "POST /generate")["seed"] == "Some(18446744073709551615)"


async def test_latencies_are_seconds_under_the_names_of_vllm() -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        await post(server, "/v1/chat/completions")
    said = attributes(traced, "POST /v1/chat/completions")
    part = {name: said[f"gen_ai.latency.{name}"] for name in LATENCIES}
    assert all(isinstance(value, float) and value >= 0 for value in part.values())
    assert part["time_to_first_token"] == said[Key.TIME_TO_FIRST_CHUNK]
    assert part["time_in_model_inference"] == pytest.approx(
        part["time_in_model_prefill"] + part["time_in_model_decode"]
    )
    assert part["e2e"] >= part["time_in_queue"] + part["time_in_model_inference"]


LATENCIES = (
    "time_in_queue", "time_to_first_token", "e2e", "time_in_model_prefill",
    "time_in_model_decode", "time_in_model_inference",
)  # fmt: skip


async def test_template_and_validation_are_children() -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        await post(server, "/v1/chat/completions")
    root = traced.one("POST /v1/chat/completions").context.span_id
    for name in ("template", "validate"):
        parent = traced.one(name).parent
        assert parent is not None
        assert parent.span_id == root


async def test_the_clients_decision_not_to_sample_counts() -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        headers = await post(server, "/generate", NOT_SAMPLED)
    assert not traced.spans
    assert headers["traceresponse"].endswith("-00")


async def test_without_a_parent_a_trace_begins() -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        headers = await post(server, "/generate", {})
    assert traced.one("POST /generate").parent is None
    assert headers["x-trace-id"] == f"{traced.one('POST /generate').context.trace_id:032x}"


async def test_probes_and_scrapes_are_not_traced() -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        for path in ("/health", "/metrics", "/info", "/v1/models", "/nowhere"):
            async with server.http.get(path, headers=PARENT) as response:
                await response.read()
    assert not traced.spans


async def test_a_refusal_has_a_type_and_no_error_status() -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        async with server.post("/generate", {"inputs": ""}) as response:
            assert response.status == 422
    for name in ("POST /generate", "validate"):
        assert attributes(traced, name)[Key.ERROR_TYPE] == "validation"
        assert traced.one(name).status.is_unset


async def test_an_overload_is_recorded() -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing, max_concurrent_requests=0) as server:
        async with server.post("/generate", {"inputs": "a"}) as response:
            assert response.status == 429
    said = attributes(traced, "POST /generate")
    assert (said[Key.ERROR_TYPE], said[Key.HTTP_STATUS]) == ("overloaded", 429)


@pytest.mark.parametrize(("path", "status"), [("/generate", 424), ("/generate_stream", 200)])
async def test_a_generation_that_fails_is_an_error(path: str, status: int) -> None:
    traced = Traced()
    loop = FakeLoop(lambda request: [*failed_colon(request)[:1], GenerationFailed("no luck")])
    async with serving(loop, tracing=traced.tracing) as server:
        async with server.post(path, {"inputs": "a"}) as response:
            await response.read()
            assert response.status == status
    root = traced.one(f"POST {path}")
    assert (root.status.status_code.name, root.status.description) == ("ERROR", "no luck")
    assert attributes(traced, f"POST {path}")[Key.ERROR_TYPE] == "generation"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_client_that_leaves_is_an_event(path: str) -> None:
    traced, loop = Traced(), FakeLoop()
    loop.gate.clear()
    async with serving(loop, tracing=traced.tracing) as server:
        call = asyncio.ensure_future(post(server, path))
        await loop.held.wait()
        call.cancel()
        async with asyncio.timeout(20):
            await loop.left.wait()
            while not traced.named(f"POST {path}"):  # noqa: ASYNC110 - spans tell nobody
                await asyncio.sleep(0.01)
    assert "cancelled" in events_of(traced.one(f"POST {path}"))
    assert attributes(traced, f"POST {path}")[Key.ERROR_TYPE] == "cancelled"


async def test_without_traces_the_clients_id_comes_back() -> None:
    async with serving() as server:
        headers = await post(server, "/generate")
    assert headers["x-trace-id"] == TRACE
    assert "traceresponse" not in headers


async def test_without_traces_and_a_parent_there_is_no_id() -> None:
    async with serving() as server:
        assert "x-trace-id" not in await post(server, "/generate", {})


async def test_lines_of_a_request_end_with_its_trace_id(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = logging.getLogger().handlers[:]
    logs.configure("text_generation_router", level="info", json_output=False)
    try:
        async with serving() as server:
            await post(server, "/generate")
            async with server.post("/generate", {"inputs": ""}, headers=PARENT) as response:
                await response.read()
    finally:
        logging.getLogger().handlers[:] = before
        logging.captureWarnings(False)
    success, refusal = [
        line for line in capsys.readouterr().out.splitlines() if "request_id" in line
    ]
    for line in (success, refusal):
        assert re.search(rf"trace_id={TRACE}$", line), line


async def test_a_whole_answer_has_its_phases_in_a_header() -> None:
    async with serving() as server:
        timing = (await post(server, "/generate"))["server-timing"]
    phases = dict(part.split(";dur=") for part in timing.split(", "))
    assert list(phases) == ["validate", "queue", "prefill", "decode", "device", "total"]
    assert all(float(value) >= 0 for value in phases.values())


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/chat/completions"])
async def test_a_stream_has_its_phases_in_its_last_comment(path: str) -> None:
    body = BODIES.get(path, {"inputs": "a"}) | {"stream": True}
    async with serving() as server, server.post(path, body) as response:
        text = await response.text()
    (comment,) = [line for line in text.splitlines() if line.startswith(": ")]
    for phase in ("queue", "prefill", "decode", "device"):
        assert re.search(rf" {phase}-ms=\d+\.\d{{3}}\b", comment)


@pytest.mark.parametrize(
    "header",
    [
        b"host: a:99999999",
        b"host: a:b:c",
        b"host: [::1",
        b"host: [",
        b"host: \xff",
        b"host: a\r\nuser-agent: \xff\xfe",
        b"host: a\r\ntraceparent: \xff",
        b"host: a\r\ntraceparent: 00-%b-%b-01\r\ntracestate: \xff=," % (b"ab" * 16, b"cd" * 8),
        b"host: a\r\nbaggage: \xff=%ff,=;",
        b"host: a\r\nx-request-id: \xff",
        b"host: a\r\norigin: \xff",
    ],
)
async def test_no_header_of_a_client_can_fail_a_traced_call(header: bytes) -> None:
    traced = Traced()
    async with serving(tracing=traced.tracing) as server:
        port = int(server.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /generate HTTP/1.1\r\n%b\r\ncontent-type: application/json\r\n"
            b'connection: close\r\ncontent-length: 14\r\n\r\n{"inputs":"a"}' % header
        )
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")
    root = traced.one("POST /generate")
    for value in (root.attributes or {}).values():
        str(value).encode()  # else no exporter could write it
