"""Server-sent events: framing, headers, keep-alive, and errors after the status line.

Knows bytes and connections; the routes write the content of events. Compression is never used: an
event must be sent as soon as it is written.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Protocol

from aiohttp import hdrs, web
from opentelemetry import trace

from kagami_proto.errors import KagamiError
from kagami_proto.panics import exception_of
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
        """The bytes of one step's events; None = writing them takes too long for the event loop."""

    async def pull(self, backlog: Backlog) -> bytes:
        """The bytes of events that were not pushed."""

    def end(self) -> bytes:
        """The last bytes of the stream."""

    def failed(self, error: KagamiError) -> bytes:
        """The last bytes of the stream if a generation fails."""


def event(body: bytes) -> bytes:
    """One event; `body` is JSON on one line."""
    return b"data: %b\n\n" % body


def named_event(name: str, body: bytes) -> bytes:
    """One event with a name; `body` is JSON on one line."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), body)


async def respond(
    request: web.Request,
    start: Callable[[Sink], AbstractAsyncContextManager[AsyncIterator[Backlog]]],
    writer: StreamWriter,
    *,
    headers: Mapping[str, str],
    keep_alive_s: float = KEEP_ALIVE_S,
    keep_alive: bytes = KEEP_ALIVE,
) -> web.StreamResponse:
    """Answer with the stream that `start` starts: one write for each step's events, then the end.

    Events are pushed: the batching loop writes them itself while this task sleeps until the end.
    This task writes only the events that could not be pushed: the client reads more slowly than its
    tokens come, or the events take long to write. A client that is too far behind loses its
    connection (`MAX_BACKLOG`), as one that takes nothing does (`TimeLimits.answer_s`).

    An error of `start` is raised and gets its own status; a later error becomes an event. A client
    that goes away cancels this task, and with it the generations.
    """
    trace.get_current_span().set_attribute(Key.REQUEST_STREAM, True)
    response = web.StreamResponse(headers={**HEADERS, **headers})
    pushed = _Pushed(request, writer)
    try:
        async with start(pushed) as backlogs:
            await response.prepare(request)
            async with _keep_alive(response, pushed, keep_alive_s, keep_alive):
                pushed.open(response)
                async for backlog in backlogs:
                    pushed.last_write = pushed.now()
                    await response.write(await writer.pull(backlog))
        ending = writer.end()
        request[FAILURE_CAUSE] = ""
        with suppress(ConnectionError):  # the answer is complete and logged as answered
            await response.write(ending)
            await response.write_eof()
    except ConnectionError:  # the client is gone; this write noticed it first
        request[FAILURE_CAUSE] = "dropped"
        report_dropped(request)
    except BaseException as raised:
        error = exception_of(raised)
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

    It bypasses aiohttp's writer, which is three coroutines deep and costs as much as all other work
    for a token. That writer would only add the chunk's frame (RFC 9112, section 7.1).
    """

    __slots__ = ("_is_chunked", "_outbox", "_push", "_request", "_transport", "last_write", "now")

    def __init__(self, request: web.Request, writer: StreamWriter) -> None:
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._outbox = request.app[OUTBOX]
        self._push = writer.push
        self._is_chunked = False
        self.now = asyncio.get_running_loop().time
        self.last_write = self.now()
        """When the stream was last written to, in seconds of the event loop's clock"""

    def open(self, response: web.StreamResponse) -> None:
        """Allow events: the head of the response is written."""
        self._is_chunked = response.headers.get(hdrs.TRANSFER_ENCODING) == "chunked"
        self._transport = self._request.transport

    def __call__(self, index: int, events: Events) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size():
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

    def give_up(self) -> None:
        if (transport := self._request.transport) is not None:
            transport.abort()  # which cancels the handler


class Outbox:
    """Collects what the batching loop writes to all clients in one pass; writes it afterwards.

    The first bytes wake a waiting client. While more bytes follow closely it need not be woken
    again, and waking is half the cost of a write.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.WriteTransport, bytes]] = []

    def put(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Write `data` soon, before any task that is woken after this call continues."""
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
    response: web.StreamResponse, pushed: _Pushed, interval_s: float, said: bytes
) -> AsyncIterator[None]:
    """Write `said` whenever nothing was written for `interval_s` seconds.

    The timer checks the last write when it fires; no event restarts it.
    """

    async def say() -> None:
        with suppress(ConnectionError):
            while True:
                await asyncio.sleep(pushed.last_write + interval_s - pushed.now())
                if pushed.now() - pushed.last_write >= interval_s:
                    pushed.last_write = pushed.now()
                    await response.write(said)

    timer = asyncio.ensure_future(say())  # ends with this context
    try:
        yield
    finally:
        timer.cancel()
