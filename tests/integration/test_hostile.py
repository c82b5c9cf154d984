"""Hostile clients against the real server: everybody else is served meanwhile.

The attackers come from one address, the probe from another. The limits here are those of a hang, so
that a slow machine does not fail: each of these attacks kept others waiting for 6 to 75 seconds, or
took more than a gigabyte. `pytest -s` prints the figures.
"""

import asyncio
import contextlib
import gzip
import io
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from .conftest import Server, running

HANG_S = 5.0
MAX_ROUTER_MB = 400
ATTACKERS, PROBE = "127.0.0.1", "127.0.0.2"
BODY_BYTES = 1_900_000
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def hostile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--max-total-tokens", "2048", "--header-timeout", "3")
    with running(tmp_path_factory.mktemp("hostile"), *flags) as server:
        yield server


def router_of(server: Server) -> int:
    """The process id of the router."""
    for child in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
        for pid in child.read_text().split():
            if b"text-generation-router" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    raise LookupError("no router")


def peak_mb(pid: int) -> float:
    """The most memory since `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise LookupError("no VmHWM")


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@contextlib.asynccontextmanager
async def client(server: Server, address: str) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(local_addr=(address, 0), limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as session:
        yield session


@dataclass
class Seen:
    """The worst that somebody else saw, in seconds."""

    health: float = 0.0
    stream_gap: float = 0.0
    short_request: float = 0.0


async def watch_health(http: aiohttp.ClientSession, seen: Seen) -> None:
    while True:
        began = time.monotonic()
        async with http.get("/health") as response:
            assert response.status == 200
        seen.health = max(seen.health, time.monotonic() - began)
        await asyncio.sleep(0.02)


async def watch_stream(http: aiohttp.ClientSession, seen: Seen) -> None:
    """Streams without end: how long the client waits for a token behind the first."""
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 400}}
    while True:
        async with http.post("/generate_stream", json=body) as response:
            assert response.status == 200
            last = 0.0
            async for _ in response.content:
                now = time.monotonic()
                seen.stream_gap = max(seen.stream_gap, now - last if last else 0.0)
                last = now


async def ask_briefly(http: aiohttp.ClientSession, seen: Seen) -> None:
    """A short request with a prompt of 3 KB and a small grammar."""
    parameters = {
        "max_new_tokens": 8,
        "grammar": {"type": "json", "value": {"type": "object", "properties": {}}},
    }
    while True:
        began = time.monotonic()
        body = {"inputs": "A short story. " * 200, "parameters": parameters}
        async with http.post("/generate", json=body) as response:
            assert response.status == 200, await response.text()
        seen.short_request = max(seen.short_request, time.monotonic() - began)
        await asyncio.sleep(0.1)


Attack = Callable[[aiohttp.ClientSession], Awaitable[None]]


async def post_all(
    http: aiohttp.ClientSession, path: str, bodies: list[bytes], headers: dict[str, str]
) -> list[int]:
    async def post(body: bytes) -> int:
        with contextlib.suppress(aiohttp.ClientError):  # refused before the body was read
            async with http.post(path, data=io.BytesIO(body), headers=headers) as response:
                await response.read()
                return response.status
        return 0

    return list(await asyncio.gather(*map(post, bodies)))


async def compressed_bodies(http: aiohttp.ClientSession) -> None:
    body = gzip.compress(bytes(1_500_000_000 // 10), 9)
    for path in ("/generate", "/nowhere", "/health"):
        statuses = await post_all(http, path, [body] * 4, JSON | {"content-encoding": "gzip"})
        assert not {200, 500} & set(statuses)


async def digits_to_tokenize(http: aiohttp.ClientSession) -> None:
    body = json.dumps({"inputs": "1" * BODY_BYTES}).encode()
    assert set(await post_all(http, "/tokenize", [body] * 8, JSON)) == {422}


async def answers_that_nobody_reads(http: aiohttp.ClientSession) -> None:
    body = json.dumps({"inputs": "1" * 32_000}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
    message = head + b"content-length: %d\r\n\r\n%b" % (len(body), body)
    writers = []
    for _ in range(100):
        _, writer = await asyncio.open_connection(
            "127.0.0.1", http._base_url.port if http._base_url else 0, limit=1
        )
        writer.write(message)
        writers.append(writer)
    await asyncio.sleep(2)
    for writer in writers:
        writer.close()


async def prompts_that_cannot_fit(http: aiohttp.ClientSession) -> None:
    words = json.dumps({"inputs": ("the quick brown fox " * 100_000)[:BODY_BYTES]}).encode()
    cut = json.dumps(
        {"inputs": "abcdefgh" * (BODY_BYTES // 8), "parameters": {"truncate": 5}}
    ).encode()
    assert set(await post_all(http, "/generate", [words] * 24, JSON)) == {422}
    assert set(await post_all(http, "/generate", [cut] * 12, JSON)) <= {422, 429, 200}


async def large_schemas(http: aiohttp.ClientSession) -> None:
    def body(number: int) -> bytes:
        names = {f"name_{number}_{index}": {"type": "string"} for index in range(1700)}
        schema = {"type": "object", "properties": names}
        parameters = {"max_new_tokens": 1, "grammar": {"type": "json", "value": schema}}
        return json.dumps({"inputs": "a", "parameters": parameters}).encode()

    bodies = []
    for number in range(100):
        bodies.append(body(number))
        await asyncio.sleep(0)  # the probe runs on this loop too
    await post_all(http, "/generate", bodies, JSON)


async def long_prompts(http: aiohttp.ClientSession) -> None:
    def body(number: int) -> bytes:
        parameters = {"max_new_tokens": 2}
        return json.dumps(
            {"inputs": f"{number} " + "word " * 1500, "parameters": parameters}
        ).encode()

    flood = asyncio.ensure_future(
        post_all(http, "/generate", [body(number) for number in range(127)], JSON)
    )
    await asyncio.wait([flood], timeout=8)
    flood.cancel()


async def silent_connections(http: aiohttp.ClientSession) -> None:
    port = http._base_url.port if http._base_url else 0
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(600)]
    async with asyncio.timeout(30):
        ends = await asyncio.gather(*(reader.read() for reader, _ in opened))
    assert len(ends) == 600  # the server has closed all of them
    for _, writer in opened:
        writer.close()


async def wild_headers(http: aiohttp.ClientSession) -> None:
    for host in ("a:99999999", "[", "a b", "a:-1", "é"):
        async with http.get("/health", headers={"host": host}) as response:
            assert response.status in (200, 400)


ATTACKS: list[Attack] = [
    compressed_bodies,
    digits_to_tokenize,
    answers_that_nobody_reads,
    prompts_that_cannot_fit,
    large_schemas,
    long_prompts,
    silent_connections,
    wild_headers,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
async def test_everybody_else_is_served_meanwhile(hostile_server: Server, attack: Attack) -> None:
    server, seen = hostile_server, Seen()
    router = router_of(server)
    forget_peak(router)
    async with client(server, ATTACKERS) as attackers, client(server, PROBE) as probe:
        watchers = [
            asyncio.ensure_future(watch(probe, seen))
            for watch in (watch_health, watch_stream, ask_briefly)
        ]
        try:
            await attack(attackers)
            await asyncio.sleep(0.5)
            ended = [watcher for watcher in watchers if watcher.done()]
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.wait(watchers)
        assert not [watcher.exception() for watcher in ended]
    peak = peak_mb(router)
    sys.stdout.write(f"{attack.__name__}: {seen}, router {peak:.0f} MB\n")
    assert seen.health < HANG_S
    assert seen.stream_gap < HANG_S
    assert seen.short_request < HANG_S
    assert peak < MAX_ROUTER_MB
    assert server.process.poll() is None
