"""Each call has one log line, however it ends."""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable

import pytest
from tests.fakes.fake_loop import FakeLoop, failed_colon
from tests.fakes.fake_server import FakeServer, serving

from kagami_proto.errors import GenerationFailed
from kagami_router.api.web.call_log import duration

BODY = {"inputs": "ab", "parameters": {"max_new_tokens": 2}}
DURATION = re.compile(r"\d+(\.\d+)?(s|ms|µs|ns)")


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    known = vars(logging.makeLogRecord({})) | {"message": "", "asctime": ""}
    return {name: value for name, value in vars(record).items() if name not in known}


async def the_line(
    caplog: pytest.LogCaptureFixture,
    act: Callable[[FakeServer], Awaitable[object]],
    loop: FakeLoop | None = None,
    **options: bool,
) -> tuple[str, dict[str, object]]:
    """The only log line that `act` causes."""
    caplog.set_level("INFO")
    async with serving(loop, **options) as server:
        await act(server)
        async with asyncio.timeout(10):
            while not caplog.records:  # noqa: ASYNC110 - the server is another task
                await asyncio.sleep(0)
    (record,) = [one for one in caplog.records if one.name.startswith("kagami")]
    return record.getMessage(), fields_of(record)


async def generate(server: FakeServer, path: str = "/generate") -> None:
    async with server.post(path, BODY, headers={"x-request-id": "mine"}) as response:
        await response.read()


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_an_answered_call_logs_its_times_and_counts(
    caplog: pytest.LogCaptureFixture, path: str
) -> None:
    message, fields = await the_line(caplog, lambda server: generate(server, path))
    times = [name for name, value in fields.items() if DURATION.fullmatch(str(value))]
    assert message == "Success"
    assert times == [
        *("total_time", "validation_time", "queue_time", "inference_time", "time_per_token"),
        "time_to_first_token",
    ]
    assert {name: value for name, value in fields.items() if name not in times} == {
        "seed": None,
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "generated_tokens": 2,
        "finish_reason": "length",
        "path": path,
        "request_id": "mine",
    }


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_failed_call_logs_how_far_it_came(
    caplog: pytest.LogCaptureFixture, path: str
) -> None:
    loop = FakeLoop(lambda request: [failed_colon(request)[0], GenerationFailed("no")])
    message, fields = await the_line(caplog, lambda server: generate(server, path), loop)
    assert message == "Request failed during generation: no"
    assert (fields["prompt_tokens"], fields["generated_tokens"]) == (3, 1)
    assert fields["error_type"] == "generation"
    assert DURATION.fullmatch(str(fields["total_time"]))
    assert DURATION.fullmatch(str(fields["time_to_first_token"]))
    assert fields["request_id"] == "mine"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_cancelled_call_logs_how_far_it_came(
    caplog: pytest.LogCaptureFixture, path: str
) -> None:
    loop = FakeLoop()
    loop.gate.clear()

    async def give_up(server: FakeServer) -> None:
        call = asyncio.ensure_future(generate(server, path))
        await loop.held.wait()
        call.cancel()
        await loop.left.wait()

    message, fields = await the_line(caplog, give_up, loop)
    assert message == "The connection was closed before the end"
    assert fields["error_type"] == "dropped"
    assert (fields["prompt_tokens"], fields["generated_tokens"]) == (3, 1)


async def test_a_call_while_the_model_loads_has_its_line(caplog: pytest.LogCaptureFixture) -> None:
    message, fields = await the_line(caplog, generate, is_open=False)
    assert message == "The model is still loading"
    assert fields == {"error_type": "unavailable", "path": "/generate", "request_id": "mine"}


async def test_a_refused_call_has_no_counts(caplog: pytest.LogCaptureFixture) -> None:
    async def ask_too_much(server: FakeServer) -> None:
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1000}}
        await server.post("/generate", body)

    _, fields = await the_line(caplog, ask_too_much)
    assert fields["error_type"] == "validation"
    assert "prompt_tokens" not in fields


async def test_fields_are_json(caplog: pytest.LogCaptureFixture) -> None:
    _, fields = await the_line(caplog, generate)
    assert json.loads(json.dumps(fields)) == fields


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.5, "1.5s"),
        (0.286497811, "286.497811ms"),
        (0.0000125, "12.5µs"),
        (5e-8, "50ns"),
        (60.0, "60s"),
    ],
)
def test_a_duration_is_written_as_rust_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
