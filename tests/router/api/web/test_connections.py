"""Connections to a real server with short time limits; what ends them is waited for."""

import asyncio
import socket

import pytest
from tests.fakes.fake_loop import FakeLoop
from tests.fakes.fake_server import FakeServer, serving

from kagami_router.api.web.time_limits import TimeLimits
from kagami_router.request.values import StreamEvent, Token
from kagami_router.serving.generation_stream import MAX_BACKLOG, Events, GenerationStream

SHORT = 0.2
HEAD = TimeLimits(head_s=SHORT)
BODY = TimeLimits(body_s=SHORT)
IDLE = TimeLimits(idle_s=SHORT)
PATIENCE_S = 60
LINES = b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
GENERATE, STREAM = LINES % b"/generate", LINES % b"/generate_stream"
CONTENT = b'{"inputs":"a"}'
REQUEST = GENERATE + b"content-length: 14\r\n\r\n" + CONTENT


async def connect(server: FakeServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*address_of(server))


def address_of(server: FakeServer) -> tuple[str, int]:
    return "127.0.0.1", int(server.url.rpartition(":")[2])


async def all_answers(server: FakeServer, *messages: bytes) -> bytes:
    """What comes until the server ends the connection."""
    reader, writer = await connect(server)
    async with asyncio.timeout(PATIENCE_S):
        for message in messages:
            writer.write(message)
            await writer.drain()
        try:
            return await reader.read()
        finally:
            writer.close()


async def test_many_silent_connections_are_ended_and_others_are_answered() -> None:
    async with serving(time_limits=HEAD) as server:
        silent = asyncio.gather(*(all_answers(server) for _ in range(100)))
        while not silent.done():
            async with server.http.get("/health") as response:
                assert response.status == 200
        assert set(await silent) == {b""}


@pytest.mark.parametrize(
    "beginning", [b"\r\n", b"G", b"GET / HT", b"GET / HTTP/1.1\r\nhost: a\r\nx: ", REQUEST[:70]]
)
async def test_a_head_that_is_not_ended_ends_the_connection(beginning: bytes) -> None:
    async with serving(time_limits=HEAD) as server:
        assert await all_answers(server, beginning) == b""


async def test_drops_of_a_head_do_not_lengthen_its_time() -> None:
    async with serving(time_limits=HEAD) as server:
        reader, writer = await connect(server)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n")
        ended = asyncio.ensure_future(reader.read())
        async with asyncio.timeout(PATIENCE_S):
            while not ended.done():
                writer.write(b"x: 1\r\n")
                await asyncio.wait((ended,), timeout=SHORT / 4)
        writer.close()
        assert ended.exception() or ended.result() == b""


async def test_a_second_head_has_the_same_limit() -> None:
    async with serving(time_limits=HEAD) as server:
        reader, writer = await connect(server)
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET / HT")
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()
        writer.close()


@pytest.mark.parametrize(
    "lines",
    [
        b"content-length: 14\r\n\r\n",
        b"content-length: 14\r\n\r\n{",
        b"transfer-encoding: chunked\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"transfer-encoding: chunked\r\n\r\n1;a",
    ],
)
async def test_a_body_that_does_not_come_is_408(lines: bytes) -> None:
    async with serving(time_limits=BODY) as server:
        answer = await all_answers(server, GENERATE + lines)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"it came too slowly (see --body-timeout)" in answer
    assert b"connection: close" in answer.lower()


async def test_an_idle_connection_ends_after_its_answer() -> None:
    async with serving(time_limits=IDLE) as server:
        assert (await all_answers(server, REQUEST)).startswith(b"HTTP/1.1 200 ")


async def test_a_long_stream_is_not_touched() -> None:
    loop = FakeLoop()
    loop.gate.clear()
    limits = TimeLimits(head_s=SHORT, body_s=SHORT, idle_s=SHORT, answer_s=SHORT)
    async with serving(loop, time_limits=limits) as server:
        stream = asyncio.ensure_future(
            all_answers(server, STREAM + b"content-length: 14\r\n\r\n" + CONTENT)
        )
        await loop.held.wait()
        for _ in range(3):  # each takes longer than any limit
            assert await all_answers(server) == b""
        assert not stream.done()
        loop.gate.set()
        assert (await stream).endswith(b"\r\n0\r\n\r\n")


async def ask_without_reading(server: FakeServer) -> None:
    """Ask for long answers, one behind the other, and read nothing."""
    asked = b"GET /api-doc/openapi.json HTTP/1.1\r\nhost: a\r\n\r\n" * 500
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address_of(server))
        client.setblocking(False)
        async with asyncio.timeout(PATIENCE_S):
            while True:  # until every buffer on the way is full
                await asyncio.get_running_loop().sock_sendall(client, asked)


class Steps(FakeLoop):
    """Plays one step in each pass of the event loop, which writes to clients in between."""

    async def _play(self, script: list[Events | Exception], stream: GenerationStream) -> None:
        for step in script:
            await super()._play([step], stream)
            await asyncio.sleep(0)


async def test_a_stream_whose_client_is_too_far_behind_is_dropped() -> None:
    long = StreamEvent(Token(40, "x" * 4096, -0.5, False))
    loop = Steps(lambda request: [(long,)] * (4 * MAX_BACKLOG))
    async with serving(loop) as server:
        _, writer = await asyncio.open_connection(*address_of(server), limit=1)
        writer.write(STREAM + b"content-length: 14\r\n\r\n" + CONTENT)
        async with asyncio.timeout(PATIENCE_S):
            await loop.left.wait()
            while not server.has_all_permits():  # noqa: ASYNC110 - the handler ends soon
                await asyncio.sleep(0)
        writer.close()


async def test_a_client_that_does_not_read_its_answer_is_dropped() -> None:
    async with serving(time_limits=TimeLimits(answer_s=SHORT)) as server:
        with pytest.raises(ConnectionError):
            await ask_without_reading(server)
