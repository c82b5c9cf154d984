"""What is parsed of a connection's bytes, and when; over a real server."""

import asyncio
import gc

import pytest
from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from tests.fakes.alive import num_alive
from tests.fakes.fake_loop import FakeLoop
from tests.fakes.fake_server import FakeServer, serving

LINES = b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
GENERATE, NOWHERE = LINES % b"/generate", LINES % b"/nowhere"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
CONTENT = b'{"inputs":"a"}'
SLICE_BYTES = 1 << 14
PATIENCE_S = 20


async def connect(server: FakeServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))


async def first_answer(server: FakeServer, message: bytes) -> bytes:
    """The beginning of the answer; the connection is closed by the client."""
    reader, writer = await connect(server)
    async with asyncio.timeout(PATIENCE_S):
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.read(1000)
    writer.close()
    return head + body


def chunks(content: bytes, size: int) -> bytes:
    parts = [content[at : at + size] for at in range(0, len(content), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each piece that aiohttp's parser got."""
    sizes: list[int] = []
    parse = RequestHandler.data_received

    def recording(handler: RequestHandler, data: bytes) -> None:
        sizes.append(len(data))
        parse(handler, data)

    monkeypatch.setattr(RequestHandler, "data_received", recording)
    return sizes


@pytest.mark.parametrize(
    "frame",
    [
        lambda content: b"content-length: %d\r\n\r\n" % len(content) + content,
        lambda content: CHUNKED + chunks(content, 24),
        lambda content: CHUNKED + chunks(content, 100_000),
    ],
)
async def test_a_long_body_is_parsed_in_slices_and_comes_whole(
    frame: object, parsed: list[int]
) -> None:
    content = b'{"inputs":"a","parameters":{"stop":["%b"]}}' % (b"x" * 300_000)
    async with serving() as server:
        two = (GENERATE + frame(content)) * 2  # type: ignore[operator] - a function
        reader, writer = await connect(server)
        writer.write(two)
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(2):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"}")
        writer.close()
    assert max(parsed) <= SLICE_BYTES
    assert sum(parsed) == len(two)


async def test_another_request_follows_a_body_with_much_framing() -> None:
    content = CONTENT + b" " * 1_000_000
    request = GENERATE + CHUNKED + chunks(content, 100)
    async with serving() as server:
        reader, writer = await connect(server)
        async with asyncio.timeout(PATIENCE_S):
            for message in (request, request, GENERATE + b"content-length: 14\r\n\r\n" + CONTENT):
                for part in (message[:-9], message[-9:]):
                    writer.write(part)
                    await writer.drain()
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"}")
        writer.close()


async def test_a_few_thousand_small_chunks_are_a_body() -> None:
    content = CONTENT + b" " * 4000
    async with serving() as server:
        answer = await first_answer(server, GENERATE + CHUNKED + chunks(content, 1))
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("size", [1, 8])
async def test_small_chunks_without_end_are_refused(size: int) -> None:
    content = CONTENT + b" " * 300_000
    async with serving() as server:
        answer = await first_answer(server, GENERATE + CHUNKED + chunks(content, size))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Its chunks are too small" in answer


@pytest.mark.parametrize(
    "rest", [b"1;" + b"x" * 80_000, b"0\r\n" + b"x: %b\r\n" % (b"y" * 4000) * 20]
)
async def test_extensions_and_trailers_without_end_are_refused(rest: bytes) -> None:
    async with serving() as server:
        answer = await first_answer(server, GENERATE + CHUNKED + rest)
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("size", [10, 1000, 8000])
async def test_a_head_without_end_is_refused(size: int, parsed: list[int]) -> None:
    lines = (b"x: %b\r\n" % (b"y" * size)) * (1_000_000 // size)
    async with serving() as server:
        answer = await first_answer(server, b"GET /health HTTP/1.1\r\nhost: a\r\n" + lines)
    assert b" 400 Bad Request\r\n" in answer
    assert sum(parsed) <= 4 * SLICE_BYTES


async def test_a_head_of_usual_size_is_read() -> None:
    lines = (b"x: %b\r\n" % (b"y" * 4000)) * 7 + b"\r\n"
    async with serving() as server:
        answer = await first_answer(server, b"GET /info HTTP/1.1\r\nhost: a\r\n" + lines)
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_requests_that_wait_behind_another_are_not_read_before_their_turn(
    parsed: list[int],
) -> None:
    loop = FakeLoop()
    loop.gate.clear()
    request = GENERATE + b"content-length: 10014\r\n\r\n" + CONTENT + b" " * 10_000
    async with serving(loop, max_concurrent_requests=1) as server:
        reader, writer = await connect(server)
        async with asyncio.timeout(PATIENCE_S):
            writer.write(request * 50)
            await loop.held.wait()
            async with server.http.get("/health") as response:
                assert response.status == 200
            assert sum(parsed) < 10 * len(request)
            parsed.clear()
            loop.gate.set()
            for _ in range(50):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"}")
        writer.close()
    assert sum(parsed) > 40 * len(request)


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (NOWHERE + b"content-length: 99999999\r\n\r\n", 404),
        (NOWHERE + CHUNKED + b"fffffff\r\n", 404),
        (GENERATE + b"content-length: 99999999\r\n\r\n", 413),
        (GENERATE + b"content-encoding: gzip\r\n" + CHUNKED + b"fffffff\r\n", 415),
        (b"\x16\x03\x01\x00", 400),
        (GENERATE + CHUNKED + b"zz\r\n", 400),
    ],
)
async def test_what_follows_the_last_answer_is_read_but_not_parsed(
    message: bytes, status: int, parsed: list[int]
) -> None:
    async with serving() as server:
        reader, writer = await connect(server)
        writer.write(message)
        async with asyncio.timeout(PATIENCE_S):
            head = await reader.readuntil(b"\r\n\r\n")
            num_parsed = sum(parsed)
            try:
                writer.write(b"x" * 1_000_000)
                await writer.drain()
            except ConnectionError:  # closed already
                pass
        writer.close()
    assert head.split()[1] == b"%d" % status
    assert head.startswith(b"HTTP/1.0 ") or b"connection: close" in head.lower()
    assert sum(parsed) == num_parsed


@pytest.mark.parametrize(
    "message",
    [
        GENERATE + b"content-length: 14\r\n\r\n" + CONTENT,
        GENERATE + b"content-length: 2\r\n\r\n{}",
        GENERATE + b"content-length: 99999999\r\n\r\n{",
        GENERATE + b"content-length: 99\r\n\r\n" + CONTENT,
        GENERATE + CHUNKED + b"zz\r\n",
        GENERATE + CHUNKED + b"1\r\nx\r\n" * 6000,
        NOWHERE + b"content-length: 99\r\n\r\n" + CONTENT,
        LINES % b"/generate_stream" + b"content-length: 14\r\n\r\n" + CONTENT,
        b"\x00" * 100_000,
    ],
)
async def test_no_request_waits_for_the_garbage_collector(message: bytes) -> None:
    async with serving() as server:
        gc.freeze()  # what is there does not count
        gc.disable()
        try:
            reader, writer = await connect(server)
            writer.write(message)
            await asyncio.wait((asyncio.ensure_future(reader.read(100)),), timeout=0.1)
            writer.close()
            async with asyncio.timeout(PATIENCE_S):
                while num_alive(web.Request, RequestHandler):  # noqa: ASYNC110 - the connection ends soon
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()
            gc.unfreeze()
