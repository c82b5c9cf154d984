import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import ClientSession, web

from kagami_router.api import sse


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
