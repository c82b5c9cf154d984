"""Server-sent events: framing, headers, keep-alive, and errors after the status line.

Knows bytes and connections; what an event says is the route's business. Compression is never used:
an event must leave when it is written.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Protocol

from aiohttp import hdrs, web
from opentelemetry import trace

from kagami_proto.errors import KagamiError
from kagami_proto.span_names import Key
from kagami_router.api.web.middleware import FAILURE_CAUSE, failure_cause, report, report_dropped
from kagami_router.serving.generation_stream import Events, Sink

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
KEEP_ALIVE_S = 15.0

HEADERS: Mapping[str, str] = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}

Backlog = Sequence[tuple[int, Events]]
"""Events that were not pushed, each with the index of its generation"""


class StreamWriter(Protocol):
    """Writes the events of one stream."""

    def push(self, index: int, events: Events) -> bytes | None:
        """The bytes of what one step brought; None: it takes too long for the event loop."""

    async def pull(self, backlog: Backlog) -> bytes:
        """The bytes of what was not pushed."""

    def end(self) -> bytes:
        """What the stream ends with."""

    def failed(self, error: KagamiError) -> bytes:
        """What it ends with if a generation fails."""


def event(body: bytes) -> bytes:
    """One event: its JSON on one line."""
    return b"data: %b\n\n" % body


def named_event(name: str, body: bytes) -> bytes:
    """One event that says what it is."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), body)


async def respond(
    request: web.Request,
    start: Callable[[Sink], AbstractAsyncContextManager[AsyncIterator[Backlog]]],
    writer: StreamWriter,
    *,
    headers: Mapping[str, str],
    keep_alive_s: float = KEEP_ALIVE_S,
) -> web.StreamResponse:
    """Answer with the stream that `start` starts: one write for what a step brought, then the end.

    Events are pushed: they are written within the batching loop's pass, and this task sleeps until
    the end. It writes only what could not be pushed, because the client reads slower than its
    tokens come or because it takes long to write.

    An error of `start` is raised and gets a status of its own; an error behind it becomes an event.
    A client that goes away cancels this task, and so the generations.
    """
    trace.get_current_span().set_attribute(Key.REQUEST_STREAM, True)
    response = web.StreamResponse(headers={**HEADERS, **headers})
    pushed = _Pushed(request, writer)
    try:
        async with start(pushed) as backlogs:
            await response.prepare(request)
            async with _keep_alive(response, pushed, keep_alive_s):
                pushed.open(response)
                async for backlog in backlogs:
                    pushed.last_write = pushed.now()
                    await response.write(await writer.pull(backlog))
        ending = writer.end()
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
            await response.write(writer.failed(known))
            await response.write_eof()
    return response


class _Pushed:
    """The sink of a stream: writes to the connection at once, unless bytes still wait there.

    Goes past aiohttp's writer, which is three coroutines deep and costs as much as all else that is
    done for a token; what it would add is the frame of a chunk (RFC 9112, section 7.1).
    """

    __slots__ = ("_is_chunked", "_is_open", "_outbox", "_push", "_transport", "last_write", "now")

    def __init__(self, request: web.Request, writer: StreamWriter) -> None:
        self._transport = request.transport
        self._outbox = request.app[OUTBOX]
        self._push = writer.push
        self._is_open = False
        self._is_chunked = False
        self.now = asyncio.get_running_loop().time
        self.last_write = self.now()
        """When the stream was last written to, in the event loop's time"""

    def open(self, response: web.StreamResponse) -> None:
        """The head of the response was written: events may follow."""
        self._is_chunked = response.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"
        self._is_open = True

    def __call__(self, index: int, events: Events) -> bool:
        transport = self._transport
        if (
            not self._is_open
            or transport is None
            or transport.is_closing()
            or transport.get_write_buffer_size()
        ):
            return False
        data = self._push(index, events)
        if data is None:
            return False
        if data:
            self._outbox.put(
                transport, b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data
            )
        self.last_write = self.now()
        return True


class Outbox:
    """What one pass of the loop writes to all clients, in a row when the pass is over.

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


@asynccontextmanager
async def _keep_alive(
    response: web.StreamResponse, pushed: _Pushed, interval_s: float
) -> AsyncIterator[None]:
    """Write a comment whenever nothing was written for `interval_s`.

    The timer looks back when it fires, instead of being restarted by each event.
    """

    async def comment() -> None:
        with suppress(ConnectionError):
            while True:
                await asyncio.sleep(pushed.last_write + interval_s - pushed.now())
                if pushed.now() - pushed.last_write >= interval_s:
                    pushed.last_write = pushed.now()
                    await response.write(KEEP_ALIVE)

    timer = asyncio.ensure_future(comment())  # ends with this context
    try:
        yield
    finally:
        timer.cancel()
