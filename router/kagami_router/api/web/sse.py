"""Server-sent events: framing, headers, keep-alive, and errors after the status line.

Knows bytes and connections; what an event says is the route's business. Compression is never used:
an event must leave when it is written.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Generic, TypeVar

from aiohttp import hdrs, web
from opentelemetry import trace

from kagami_proto.errors import KagamiError
from kagami_proto.span_names import Key
from kagami_router.api.web.errors import error_event
from kagami_router.api.web.middleware import (
    FAILURE_CAUSE,
    failure_cause,
    family_of,
    report,
    report_dropped,
)
from kagami_router.serving.step_events import Divertible

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

    Turns of a stream that hands them over are written within the batching loop's pass; this task
    sleeps until the end, or until a client reads slower than its tokens come.

    What fails before `turns` is entered is raised and gets a status of its own; what fails later
    becomes an event, by `failed` or else in the family's shape. A client that goes away cancels
    this task, and leaving `turns` the generation.
    """
    trace.get_current_span().set_attribute(Key.REQUEST_STREAM, True)
    response = web.StreamResponse(headers={**HEADERS, **headers})
    try:
        async with turns as stream:
            await response.prepare(request)
            async with _keep_alive(response, keep_alive_s) as pulse:
                if isinstance(stream, Divertible):
                    stream.divert(_Direct(request, response, render, pulse))
                async for turn in stream:
                    pulse.last_write = pulse.now()
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


class _Direct(Generic[_Turn]):
    """Writes a turn to its connection at once, unless bytes still wait there.

    Goes past aiohttp's writer, which is three coroutines deep and as dear as all else that is done
    for a token; what it would add is the frame of a chunk (RFC 9112, section 7.1).
    """

    __slots__ = ("_is_chunked", "_outbox", "_pulse", "_render", "_transport")

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        render: Callable[[_Turn], bytes],
        pulse: "_Pulse",
    ) -> None:
        self._transport = request.transport
        self._outbox = request.app[OUTBOX]
        self._is_chunked = response.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"
        self._render = render
        self._pulse = pulse

    def __call__(self, turn: _Turn) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size():
            return False
        if data := self._render(turn):
            self._outbox.put(
                transport, b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data
            )
        self._pulse.last_write = self._pulse.now()
        return True


class Outbox:
    """What one pass of the loop says to all clients, written in a row when the pass is over.

    A client that waits is woken by the first bytes; as long as more come it need not be woken
    again, and that is half of what a write costs.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.WriteTransport, bytes]] = []

    def put(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Write `data` soon, and before any task goes on that is woken from now on."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append((transport, data))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)


OUTBOX = web.AppKey("outbox", Outbox)


class _Pulse:
    """When a stream was written to last, in the loop's time."""

    __slots__ = ("last_write", "now")

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.last_write = now()


@asynccontextmanager
async def _keep_alive(response: web.StreamResponse, interval_s: float) -> AsyncIterator[_Pulse]:
    """Write a comment whenever nothing was written for `interval_s`.

    The timer looks back when it fires, instead of being restarted by each event.
    """
    pulse = _Pulse(asyncio.get_running_loop().time)

    async def comment() -> None:
        with suppress(ConnectionError):
            while True:
                await asyncio.sleep(pulse.last_write + interval_s - pulse.now())
                if pulse.now() - pulse.last_write >= interval_s:
                    pulse.last_write = pulse.now()
                    await response.write(KEEP_ALIVE)

    timer = asyncio.ensure_future(comment())  # ends with this context
    try:
        yield pulse
    finally:
        timer.cancel()
