import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import ClientSession, web

from kagami_router.api.web import sse


async def test_a_silent_stream_sends_comments() -> None:
    @asynccontextmanager
    async def turns() -> AsyncIterator[AsyncIterator[bytes]]:
        async def silent() -> AsyncIterator[bytes]:
            await written_twice.wait()
            yield b"x"

        yield silent()

    written: list[bytes] = []
    written_twice = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        return await sse.respond(
            request,
            turns(),
            render=sse.event,
            last=lambda: sse.DONE,
            headers={},
            keep_alive_s=0.001,
        )

    app = web.Application()
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
        assert written == [b":\n\n", b":\n\n"]
        assert rest.endswith("data: x\n\ndata: [DONE]\n\n")
    finally:
        await runner.cleanup()


class Diverted:
    """A stream that hands over what `say` is given, as the batching loop does."""

    def __init__(self) -> None:
        self.sink: Callable[[bytes], bool] | None = None
        self.waiting: list[bytes] = []
        self._ended = asyncio.Event()

    def divert(self, sink: Callable[[bytes], bool]) -> None:
        self.sink = sink

    def end(self) -> None:
        self._ended.set()

    def __aiter__(self) -> "Diverted":
        return self

    async def __anext__(self) -> bytes:
        await self._ended.wait()
        if not self.waiting:
            raise StopAsyncIteration
        return self.waiting.pop(0)


@asynccontextmanager
async def responding(
    turns: Diverted, version: str = "1.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, web.Request]]:
    """A raw connection to a handler that answers with `turns`, its head read."""
    requests: list[web.Request] = []

    @asynccontextmanager
    async def entered() -> AsyncIterator[Diverted]:
        yield turns

    async def handler(request: web.Request) -> web.StreamResponse:
        requests.append(request)
        return await sse.respond(
            request, entered(), render=lambda turn: turn, last=lambda: b"last", headers={}
        )

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


async def test_turns_that_are_handed_over_are_chunks_of_their_own() -> None:
    turns = Diverted()
    async with responding(turns) as (reader, _):
        assert turns.sink is not None
        assert turns.sink(b"one")
        assert turns.sink(b"and two")
        turns.end()
        assert await reader.readuntil(b"0\r\n\r\n") == (
            b"3\r\none\r\n7\r\nand two\r\n4\r\nlast\r\n0\r\n\r\n"
        )


async def test_a_turn_without_words_does_not_end_the_stream() -> None:
    turns = Diverted()
    async with responding(turns) as (reader, _):
        assert turns.sink is not None
        assert turns.sink(b"")
        turns.end()
        assert await reader.readuntil(b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"


async def test_http_1_0_gets_no_chunks() -> None:
    turns = Diverted()
    async with responding(turns, "1.0") as (reader, _):
        assert turns.sink is not None
        assert turns.sink(b"one")
        turns.end()
        assert await reader.read() == b"onelast"


async def test_a_client_that_reads_too_slowly_is_handed_nothing() -> None:
    turns = Diverted()
    async with responding(turns) as (reader, _):
        assert turns.sink is not None
        megabyte = b"x" * 2**20
        while turns.sink(megabyte):  # noqa: ASYNC110 - until the socket is full
            await asyncio.sleep(0)
        turns.waiting.append(b"after all")
        turns.end()
        rest = await _whole(reader)
    assert rest.endswith(b"x\r\n9\r\nafter all\r\n4\r\nlast\r\n0\r\n\r\n")


async def _whole(reader: asyncio.StreamReader) -> bytes:
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        data += await reader.read(2**20)
    return data


async def test_a_connection_that_is_gone_is_handed_nothing() -> None:
    turns = Diverted()
    async with responding(turns) as (_, request):
        assert turns.sink is not None
        assert request.transport is not None
        request.transport.close()
        assert not turns.sink(b"one")
