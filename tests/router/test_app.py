"""The whole router in one process, over a shard that speaks the real protocol."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from aiohttp import ClientConnectionError, ClientSession
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tests.fakes.fake_server import TEMPLATE
from tests.fakes.fake_shard import FakeShard

from kagami_router.app import serve
from kagami_router.cli import RouterArgs, parse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's tokenizer and template."""
    byte_tokenizer_with_start().save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def args_for(folder: Path, *more: str) -> RouterArgs:
    return parse(
        [
            *("--tokenizer-name", str(folder), "--port", str(free_port())),
            *("--hostname", "127.0.0.1", "--master-shard-uds-path", f"{folder}/shard-0", *more),
        ],
        {},
    )


class Router(NamedTuple):
    http: ClientSession
    stop: asyncio.Event
    exit_code: asyncio.Task[int]


@asynccontextmanager
async def running(args: RouterArgs) -> AsyncIterator[Router]:
    stop = asyncio.Event()
    async with ClientSession(f"http://127.0.0.1:{args.port}") as http:
        exit_code = asyncio.ensure_future(serve(args, stop))
        try:
            yield Router(http, stop, exit_code)
        finally:
            stop.set()
            await exit_code


async def status_of(http: ClientSession, path: str = "/health") -> int:
    try:
        async with http.get(path) as response:
            return response.status
    except ClientConnectionError:
        return 0


async def until(http: ClientSession, status: int) -> None:
    async with asyncio.timeout(20):
        while await status_of(http) != status:  # noqa: ASYNC110 - another process would poll too
            await asyncio.sleep(0.01)


async def test_it_answers_503_until_the_shard_is_there_and_then_serves(folder: Path) -> None:
    async with running(args_for(folder)) as (http, stop, exit_code):
        await until(http, 503)
        async with FakeShard(f"{folder}/shard-0"):
            await until(http, 200)
            body = {"inputs": "abc", "parameters": {"max_new_tokens": 5, "details": True}}
            async with http.post("/generate", json=body) as response:
                assert response.status == 200
                assert (await response.json())["details"]["generated_tokens"] == 5
            async with http.get("/info") as response:
                info = await response.json()
            assert info["max_batch_total_tokens"] == info["max_total_tokens"] == 63 * 4
            assert info["max_input_tokens"] == 63 * 4 - 1
            assert (info["waiting_served_ratio"], info["max_waiting_tokens"]) == (0.3, 20)
            stop.set()
            assert await exit_code == 0


async def test_it_logs_what_operators_wait_for(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with FakeShard(f"{folder}/shard-0"), running(args_for(folder)) as (http, _, _):
        await until(http, 200)
        await http.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2}})
    messages = [record.getMessage() for record in caplog.records]
    expected = [
        "Warming up model",
        "Setting max batch total tokens to 252",
        "Connected",
        "Success",
        "signal received, starting graceful shutdown",
    ]
    assert [message for message in messages if message in expected] == expected
    success = next(record for record in caplog.records if record.message == "Success")
    assert vars(success)["prompt_tokens"] == 2
    assert vars(success)["generated_tokens"] == 2
    assert vars(success)["request_id"]


async def test_a_running_stream_ends_before_the_server_does(folder: Path) -> None:
    async with FakeShard(f"{folder}/shard-0") as shard:
        async with running(args_for(folder)) as (http, stop, _):
            await until(http, 200)
            shard.gate.clear()
            body = {"inputs": "a", "parameters": {"max_new_tokens": 3}}
            async with http.post("/generate_stream", json=body) as response:
                stop.set()
                await until(http, 503)
                shard.gate.set()
                assert (await response.text()).count("data: ") == 3


async def test_a_lost_shard_ends_the_router_with_an_error(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        FakeShard(f"{folder}/shard-0") as shard,
        running(args_for(folder)) as (http, _, exit_code),
    ):
        await until(http, 200)
        await shard.kill()
        async with asyncio.timeout(20):
            assert await exit_code == 1
    assert any(record.levelname == "ERROR" for record in caplog.records)


async def test_a_taken_port_is_one_line_and_exit_code_1(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = args_for(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", args.port))
        taken.listen()
        assert await serve(args, asyncio.Event()) == 1
    assert caplog.messages[-1].startswith("Failed to bind to addr: 127.0.0.1")


async def test_a_missing_tokenizer_is_exit_code_1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert await serve(args_for(tmp_path), asyncio.Event()) == 1
    assert "tokenizer.json does not exist" in caplog.text


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
async def test_a_broken_file_is_one_line_that_names_it_and_exit_code_1(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    (folder / name).write_bytes(content)
    assert await serve(args_for(folder), asyncio.Event()) == 1
    (record,) = [one for one in caplog.records if one.levelname == "ERROR"]
    assert f"{folder}/{name}" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert record.exc_info is None


async def test_a_second_port_serves_metrics_only(folder: Path) -> None:
    port = free_port()
    args = args_for(folder, "--prometheus-port", str(port))
    async with FakeShard(f"{folder}/shard-0"), running(args) as (http, _, _):
        await until(http, 200)
        async with ClientSession(f"http://127.0.0.1:{port}") as second:
            async with second.get("/metrics") as response:
                assert "tgi_request_count 0" in await response.text()
            assert await status_of(second, "/health") == 404


async def test_a_flag_without_effect_is_a_line(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = asyncio.Event()
    stop.set()
    assert await serve(args_for(folder, "--ngrok"), stop) == 0
    assert "Flag has no effect" in caplog.messages


async def test_a_name_is_resolved_and_nothing_else_listens(folder: Path) -> None:
    args = args_for(folder, "--hostname", "localhost")
    async with running(args) as (http, _, _):
        await until(http, 503)
        # The same port of another address is free.
        async with running(replace(args, hostname="127.0.0.2")) as (_, _, other):
            assert not other.done()


@pytest.mark.parametrize("name", ["a" * 64 + ".example", ".."])
async def test_a_name_that_cannot_be_resolved_ends_the_start_in_one_line(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = args_for(folder, "--hostname", name)
    assert await serve(args, asyncio.Event()) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"Failed to bind to addr: {name}:{args.port}: ")
    assert record.exc_info is None


async def test_contradicting_flags_end_at_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = args_for(folder, "--max-input-tokens", "10", "--max-total-tokens", "10")
    assert await serve(args, asyncio.Event()) == 1
    assert caplog.messages == ["`max_input_tokens` must be < `max_total_tokens`"]
