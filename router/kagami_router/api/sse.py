"""Server-sent events: framing, headers, keep-alive, and errors after the status line.

Knows bytes and connections; what an event says is the route's business. Compression is never used:
an event must leave when it is written.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TypeVar

from aiohttp import web
from opentelemetry import trace

from kagami_proto.errors import KagamiError
from kagami_proto.span_names import Key
from kagami_router.api.error_shapes import error_event
from kagami_router.api.middleware import (
    FAILURE_CAUSE,
    failure_cause,
    family_of,
    report,
    report_dropped,
)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
KEEP_ALIVE_S = 15.0

HEADERS: Mapping[str, str] = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

_Turn = TypeVar("_Turn")


def event(body: bytes) -> bytes:
    """One event: its JSON on one line."""
    return b"data: %b\n\n" % body


def named_event(name: str, body: bytes) -> bytes:
    """One event that says what it is."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), body)


async def respond(
    request: web.Request,
    turns: AbstractAsyncContextManager[AsyncIterator[_Turn]],
    *,
    render: Callable[[_Turn], bytes],
    last: Callable[[], bytes],
    headers: Mapping[str, str],
    failed: Callable[[KagamiError], bytes] | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> web.StreamResponse:
    """Answer with a stream: one write for each turn, then `last()`.

    What fails before `turns` is entered is raised and gets a status of its own; what fails later
    becomes an event, by `failed` or else in the family's shape. A client that goes away cancels
    this task, and leaving `turns` the generation.
    """
    trace.get_current_span().set_attribute(Key.REQUEST_STREAM, True)
    response = web.StreamResponse(headers={**HEADERS, **headers})
    try:
        async with turns as stream:
            await response.prepare(request)
            async with _keep_alive(response, keep_alive_s) as touch:
                async for turn in stream:
                    touch()
                    await response.write(render(turn))
        ending = last()
        with suppress(ConnectionError):  # everything was said, and is in the log as answered
            await response.write(ending)
            await response.write_eof()
    except ConnectionError:  # the client is gone, and the write was the first to see it
        request[FAILURE_CAUSE] = "dropped"
        report_dropped(request)
    except Exception as error:
        if not response.prepared:
            raise
        known = report(request, error)
        request[FAILURE_CAUSE] = failure_cause(known)
        with suppress(ConnectionError):
            told = failed(known) if failed else error_event(known, family_of(request))
            await response.write(told)
            await response.write_eof()
    return response


@asynccontextmanager
async def _keep_alive(
    response: web.StreamResponse, interval_s: float
) -> AsyncIterator[Callable[[], None]]:
    """Write a comment whenever nothing was written for `interval_s`.

    The timer looks back when it fires, instead of being restarted by each event.
    """
    loop = asyncio.get_running_loop()
    last_write = loop.time()

    def touch() -> None:
        nonlocal last_write
        last_write = loop.time()

    async def comment() -> None:
        with suppress(ConnectionError):
            while True:
                await asyncio.sleep(last_write + interval_s - loop.time())
                if loop.time() - last_write >= interval_s:
                    touch()
                    await response.write(KEEP_ALIVE)

    timer = asyncio.ensure_future(comment())  # ends with this context
    try:
        yield touch
    finally:
        timer.cancel()
