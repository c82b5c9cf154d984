import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import ClientSession, web

from kagami_proto.errors import KagamiError
from kagami_router.api.anthropic.message_blocks import PING
from kagami_router.api.web import sse
from kagami_router.request.values import text_event
from kagami_router.serving.generation_stream import Events, Sink


class Verbatim:
    """Writes the texts of tokens without a frame."""

    def push(self, index: int, events: Events) -> bytes | None:
        return b"".join(event.token.text.encode() for event in events)

    async def pull(self, backlog: sse.Backlog) -> bytes:
        return b"".join(self.push(index, events) or b"" for index, events in backlog)

    def end(self) -> bytes:
        return b"last"

    def failed(self, error: KagamiError) -> bytes:
        return b"failed"


def said(text: str) -> Events:
    return (text_event(1, text, -0.5),)


@pytest.mark.parametrize("sign", [sse.KEEP_ALIVE, PING])
async def test_a_silent_stream_says_that_it_lives(sign: bytes) -> None:
    @asynccontextmanager
    async def start(sink: Sink) -> AsyncIterator[AsyncIterator[sse.Backlog]]:
        async def silent() -> AsyncIterator[sse.Backlog]:
            await written_twice.wait()
            yield [(0, said("x"))]

        yield silent()

    written: list[bytes] = []
    written_twice = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        options = {"headers": {}, "keep_alive_s": 0.001, "keep_alive": sign}
        return await sse.respond(request, start, Verbatim(), **options)

    app = web.Application()
    app[sse.OUTBOX] = sse.Outbox()
    app.add_routes([web.get("/", handler)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with (
            ClientSession() as http,
            http.get(f"http://127.0.0.1:{runner.addresses[0][1]}") as response,
        ):
            written += [await response.content.readuntil(b"\n\n") for _ in range(2)]
            written_twice.set()
            rest = await response.text()
        assert written == [sign, sign]
        assert rest.endswith("xlast")
    finally:
        await runner.cleanup()


class Pushed:
    """Lets a test push events, as the batching loop does."""

    def __init__(self) -> None:
        self.sink: Sink | None = None
        self.waiting: list[str] = []
        self._ended = asyncio.Event()

    def push(self, text: str) -> bool:
        assert self.sink is not None
        return self.sink(0, said(text))

    def end(self) -> None:
        self._ended.set()

    @asynccontextmanager
    async def start(self, sink: Sink) -> AsyncIterator["Pushed"]:
        self.sink = sink
        yield self

    def __aiter__(self) -> "Pushed":
        return self

    async def __anext__(self) -> sse.Backlog:
        await self._ended.wait()
        if not self.waiting:
            raise StopAsyncIteration
        return [(0, said(self.waiting.pop(0)))]


@asynccontextmanager
async def responding(
    pushed: Pushed, version: str = "1.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, web.Request]]:
    """A raw connection to a handler that answers with `pushed`; the response's head is read."""
    requests: list[web.Request] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        requests.append(request)
        return await sse.respond(request, pushed.start, Verbatim(), headers={})

    app = web.Application()
    app[sse.OUTBOX] = sse.Outbox()
    app.add_routes([web.get("/", handler)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    reader, writer = await asyncio.open_connection(*runner.addresses[0])
    try:
        writer.write(f"GET / HTTP/{version}\r\nhost: h\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        yield reader, requests[0]
    finally:
        writer.close()
        await runner.cleanup()


async def test_events_that_are_pushed_are_chunks_of_their_own() -> None:
    pushed = Pushed()
    async with responding(pushed) as (reader, _):
        assert pushed.push("one")
        assert pushed.push("and two")
        pushed.end()
        assert await reader.readuntil(b"0\r\n\r\n") == (
            b"3\r\none\r\n7\r\nand two\r\n4\r\nlast\r\n0\r\n\r\n"
        )


async def test_an_event_without_text_does_not_end_the_stream() -> None:
    pushed = Pushed()
    async with responding(pushed) as (reader, _):
        assert pushed.push("")
        pushed.end()
        assert await reader.readuntil(b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"


async def test_http_1_0_gets_no_chunks() -> None:
    pushed = Pushed()
    async with responding(pushed, "1.0") as (reader, _):
        assert pushed.push("one")
        pushed.end()
        assert await reader.read() == b"onelast"


async def test_a_client_that_reads_too_slowly_is_pushed_nothing() -> None:
    pushed = Pushed()
    async with responding(pushed) as (reader, _):
        megabyte = "x" * 2**20
        while pushed.push(megabyte):  # noqa: ASYNC110 - until the socket is full
            await asyncio.sleep(0)
        pushed.waiting.append("after all")
        pushed.end()
        rest = await _whole(reader)
    assert rest.endswith(b"x\r\n9\r\nafter all\r\n4\r\nlast\r\n0\r\n\r\n")


async def _whole(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        data += await reader.read(2**20)
    return data


async def test_nothing_is_pushed_to_a_closed_connection() -> None:
    pushed = Pushed()
    async with responding(pushed) as (_, request):
        assert request.transport is not None
        request.transport.close()
        assert not pushed.push("one")
