import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tests.fakes.fake_server import TEMPLATE
from tests.fakes.null_shard import NullShard
from tests.fakes.sse_server import sse_server

from kagami_benchmark.cli import BenchmarkArgs, parse
from kagami_benchmark.figures import ResultRow
from kagami_benchmark.prompts import Words
from kagami_benchmark.run import measure, run
from kagami_router import app
from kagami_router.cli import parse as parse_router


def parsed(*argv: str) -> BenchmarkArgs:
    args = parse(argv, {})
    assert isinstance(args, BenchmarkArgs)
    return args


async def measured(*argv: str) -> list[ResultRow]:
    rows: list[ResultRow] = []
    await measure(parsed(*argv), Words.common(), rows)
    return rows


@asynccontextmanager
async def router(folder: Path) -> AsyncIterator[str]:
    """The real router over a null shard; its URL."""
    byte_tokenizer_with_start().save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--tokenizer-name", str(folder), "--hostname", "127.0.0.1", "--port", str(port))
    args = parse_router([*flags, "--master-shard-uds-path", f"{folder}/shard-0"], {})
    stop = asyncio.Event()
    async with NullShard(f"{folder}/shard-0", tokens=(70,)), ClientSession() as http:
        serving = asyncio.ensure_future(app.serve(args, stop))
        url = f"http://127.0.0.1:{port}"
        try:
            async with asyncio.timeout(20):
                while not await _is_ready(http, url):  # noqa: ASYNC110 - as a client would
                    await asyncio.sleep(0.01)
            yield url
        finally:
            stop.set()
            await serving


async def _is_ready(http: ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/health") as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.parametrize("path", ["", "/v1/completions", "/v1/chat/completions"])
async def test_the_real_router_is_measured_by_each_of_its_routes(tmp_path: Path, path: str) -> None:
    async with router(tmp_path) as url:
        flags = ("-b", "3", "-n", "6", "-s", "5", "-d", "4", "-r", "2", "--prefix-length", "3")
        (row,) = await measured("--url", url + path, *flags)

    assert row.errors == {}
    assert (row.num_succeeded, row.output_tokens) == (12, 48)
    assert row.inter_token.count == 12 * 3
    assert row.prompt_tokens > 12 * 8
    assert row.client_us_per_token > 0


async def test_servers_are_measured_in_turn_with_the_same_prompts() -> None:
    last = {"token": {"id": 1}, "details": {"generated_tokens": 1, "input_length": 5}}
    async with sse_server(lambda _: [(1.0, last)]) as one, sse_server(lambda _: []) as other:
        for server in (one, other):
            server.clock.looked.wait = _at_once  # the benchmark has a clock of its own
        rows = await measured(
            "--url", one.url, "--peer", f"other={other.url}", "-b", "1", "-r", "2", "-w", "0"
        )

    assert [(row.target, row.num_succeeded) for row in rows] == [("server", 2), ("other", 0)]
    assert rows[1].errors == {"the answer had no token": 2}
    assert one.bodies == other.bodies


async def test_a_pause_lies_before_every_run() -> None:
    pauses: list[float] = []

    async with sse_server(lambda _: []) as server:
        server.clock.looked.wait = _at_once
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kagami_benchmark.run.sleep", _noting(pauses))
            await measured("--url", server.url, "-b", "1", "-r", "2", "-w", "1", "--pause", "7")

    assert pauses == [7, 7, 7]


def _noting(pauses: list[float]) -> Callable[[float], Awaitable[None]]:
    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    return sleep


async def test_every_run_is_a_turn_of_its_server() -> None:
    turns: list[str] = []

    @contextmanager
    def turn(name: str) -> Iterator[None]:
        turns.append(f"{name} begins")
        yield
        turns.append(f"{name} ends")

    async with sse_server(lambda _: []) as one, sse_server(lambda _: []) as other:
        args = parsed("--url", one.url, "--peer", f"b={other.url}", "-b", "1", "-r", "1", "-w", "1")
        await measure(args, Words.common(), [], turn)

    assert turns == ["server begins", "server ends", "b begins", "b ends"] * 2


async def _at_once() -> bool:
    return True


def test_nothing_succeeding_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]

    code = run(parsed("--url", f"http://127.0.0.1:{port}", "-b", "1", "-r", "1", "-w", "0"))

    assert code == 1
    assert "server B1: 1 x Cannot connect" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--url", "http://h/v1/completions", "--typical-p", "0.5"],
            "--typical-p: /v1/completions does not know typical_p",
        ),
        (["-t", "/nowhere"], "--tokenizer-name: there is no /nowhere"),
        (
            ["-t", "/nowhere", "--prompt-kind", "ids"],
            "--prompt-kind ids: /generate_stream takes texts only",
        ),
    ],
)
def test_flags_that_do_not_fit_get_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(parsed(*argv)) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
