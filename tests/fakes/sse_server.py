"""A server that streams by a schedule. Its clock moves only when the schedule says so."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

# An event that never comes.
HANG = "hang"


class Clock:
    """Seconds; `looked` is set whenever somebody asks."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looked = asyncio.Event()

    def __call__(self) -> float:
        self.looked.set()
        return self.now


@dataclass(eq=False)
class SseServer:
    """Answers each request with `events`, each a pause on the clock and what is said after it."""

    clock: Clock
    events: Callable[[dict[str, Any]], Sequence[tuple[float, object]]]
    url: str = ""
    status: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.Response(status=self.status, text="no room")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for pause, event in self.events(body):
            self.clock.now += pause
            self.clock.looked.clear()
            if event is HANG:
                await asyncio.Event().wait()
            data = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {data}\n\n".encode())
            await self.clock.looked.wait()  # the client has seen it at this time
        await response.write_eof()
        return response


@asynccontextmanager
async def sse_server(
    events: Callable[[dict[str, Any]], Sequence[tuple[float, object]]], *, status: int = 200
) -> AsyncIterator[SseServer]:
    server = SseServer(Clock(), events, status=status)
    app = web.Application()
    app.router.add_post("/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
