"""Thousands of broken bodies over raw connections to a real server, which then works as before."""

import asyncio
import contextlib
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.fakes.mutations import mutated
from tests.integration.conftest import Server, running
from tests.integration.test_processes import descendants, within
from tests.router.api.test_fuzz import POSTS

pytestmark = pytest.mark.slow

DURATION_S, WARM_UP_S = 10.0, 3.0
CONNECTIONS = 8
# A body that lost its `max_tokens` asks for a long answer, and the client leaves after this time.
# A request that hangs is found at the end: it still holds its permit.
PATIENCE_S = 0.3
ANSWER_S = 30
MIB = 2**20
IDLE = ("tgi_queue_size", "tgi_requests_running", "tgi_requests_waiting", "tgi_kv_blocks_used")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--max-total-tokens", "512", "--max-concurrent-requests", "16")
    with running(tmp_path_factory.mktemp("fuzz"), *flags) as started:
        yield started


@dataclass
class Answers:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    num_left: int = 0
    faults: list[str] = field(default_factory=list)


async def respond(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """One HTTP answer: its status and body, and whether the connection lives on."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    status = int(head.split()[1])
    stays = "connection: close" not in head
    if "transfer-encoding: chunked" not in head:
        length = next(line for line in head.splitlines() if line.startswith("content-length:"))
        return status, await reader.readexactly(int(length.split()[1])), stays
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return status, body, stays


async def talk(port: int, random: Random, until: float, answers: Answers) -> None:
    """Send one body after the other, over one connection for as long as it lives."""
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while time.monotonic() < until and await exchange(reader, writer, random, answers):
                pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, random: Random, answers: Answers
) -> bool:
    """One body and its answer; whether the connection is worth keeping."""
    path = random.choice(POSTS)
    body = mutated(random, path)
    target = path.format(model="m", version="1")
    head = f"POST {target} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(body)}\r\n"
    writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
    try:
        async with asyncio.timeout(PATIENCE_S):
            status, answer, stays = await respond(reader)
    except TimeoutError:
        answers.num_left += 1
        return False
    answers.statuses[status] += 1
    if status >= 500 or b"Internal error" in answer or b'"generation"' in answer:
        answers.faults.append(f"{path} {body!r}: {status} {answer!r}")
    return stays and random.random() > 0.01


def fuzz(server: Server, seed: int, seconds: float) -> Answers:
    port, answers, until = int(server.url.rpartition(":")[2]), Answers(), time.monotonic() + seconds

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CONNECTIONS):
                group.create_task(talk(port, Random(seed + number), until, answers))

    asyncio.run(main())
    return answers


def router_of(server: Server) -> Path:
    """The router's folder in /proc."""
    for pid in descendants(server.process.pid):
        folder = Path(f"/proc/{pid}")
        if b"text-generation-router" in (folder / "cmdline").read_bytes():
            return folder
    raise AssertionError("there is no router")


def resident_bytes(process: Path) -> int:
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def num_descriptors(process: Path) -> int:
    return len(list((process / "fd").iterdir()))


def say(server: Server) -> Any:
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 4}}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{server.url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        return json.load(response)


def test_broken_bodies_leave_no_trace(server: Server) -> None:
    said, router = say(server), router_of(server)
    fuzz(server, seed=0, seconds=WARM_UP_S)
    memory, descriptors = resident_bytes(router), num_descriptors(router)

    answers = fuzz(server, seed=1000, seconds=DURATION_S)

    assert answers.faults == []
    assert answers.statuses[200] > 50, answers
    assert answers.statuses.total() > 500, answers
    assert within(10, lambda: all(server.metric(name) == 0 for name in IDLE))
    assert within(5, lambda: num_descriptors(router) <= descriptors)
    assert resident_bytes(router) < memory + 40 * MIB
    assert say(server) == said
