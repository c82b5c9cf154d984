"""Malformed HTTP on real connections: each is answered or ended, nobody else waits for it."""

import asyncio
import gc
import logging
from collections import Counter
from random import Random

import pytest
from aiohttp import web
from tests.fakes.alive import num_alive
from tests.fakes.fake_server import FakeServer, serving
from tests.fakes.http_bytes import connection_bytes
from tests.fakes.traced import Traced

from kagami_router.api.web.time_limits import TimeLimits

SHORT = TimeLimits(head_s=0.3, body_s=0.3, idle_s=0.3, answer_s=0.3)
NUM_CONNECTIONS, AT_ONCE = 600, 60
# The time limits end every connection; this only says which one was not ended.
PATIENCE_S = 20
HEALTH_S = 10
"""Generous: the machine may have other work. What one connection costs is counted elsewhere."""


async def talk(server: FakeServer, number: int) -> Counter[bytes]:
    """Write the bytes of connection `number`; the statuses that came back."""
    random = Random(number)
    writes = connection_bytes(random)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    answer = b""
    try:
        for part in writes:
            writer.write(part)
            await asyncio.sleep(0)
        if random.random() < 0.7:  # the others leave
            async with asyncio.timeout(PATIENCE_S):
                answer = await reader.read()
    except ConnectionError:
        pass
    except TimeoutError:
        pytest.fail(f"connection {number} was not ended: {writes}")
    finally:
        writer.close()
    assert b"Internal error" not in answer, writes
    statuses = [line.split()[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.")]
    assert not any(status.startswith(b"5") for status in statuses), writes
    return Counter(statuses)


def num_requests() -> int:
    gc.collect()
    return num_alive(web.Request)


@pytest.mark.parametrize("seed", [0, 1])
async def test_malformed_http_is_never_our_fault_and_costs_nobody_else(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    statuses: Counter[bytes] = Counter()
    others = num_requests()  # the logs of other tests hold them
    async with serving(
        time_limits=SHORT, tracing=Traced().tracing, max_concurrent_requests=AT_ONCE
    ) as server:
        for first in range(0, NUM_CONNECTIONS, AT_ONCE):
            numbers = range(first, first + AT_ONCE)
            talks = asyncio.gather(*(talk(server, seed * 10**6 + number) for number in numbers))
            while not talks.done():
                async with asyncio.timeout(HEALTH_S), server.http.get("/health") as response:
                    assert response.status == 200
                await asyncio.sleep(0.01)
            for counted in await talks:
                statuses += counted
        async with server.post("/generate", {"inputs": "a"}) as response:
            assert response.status == 200
        assert server.has_all_permits()
        assert server.loop.num_open == 0
    assert {b"200", b"400", b"404", b"405", b"415", b"422"} <= statuses.keys()
    assert [one for one in caplog.records if one.exc_info or one.levelno >= logging.ERROR] == []
    assert num_requests() <= others
