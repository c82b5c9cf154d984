"""Connections: their time limits, and our answers to what reaches no route.

A message that is not HTTP reaches no middleware and no route. aiohttp would answer it with a text
that names the server's software.
"""

import asyncio
import logging
from contextlib import suppress
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from kagami_proto.errors import KagamiError, NotJson
from kagami_router.api.web.body_rules import ExpectingRequests, SlowBody
from kagami_router.api.web.errors import Family, error_body, error_status
from kagami_router.api.web.middleware import on_one_line, report, without_frames
from kagami_router.api.web.reading import SlicedReader
from kagami_router.api.web.time_limits import Patience, TimeLimits, Wait

logger = logging.getLogger(__name__)


# aiohttp's own timer of idle connections counts time in which the process did not run.
_NEVER_S = 1e8
# How long what follows the last answer is thrown away: a client that still writes would lose it.
_LINGER_S = 10.0


class MalformedHttp(NotJson):
    """The message is not HTTP; its path may be unknown."""


class Runner(web.AppRunner):
    """Runs an application; a handler is cancelled when its client goes away."""

    def __init__(
        self,
        app: web.Application,
        *,
        shutdown_timeout: float,
        limits: TimeLimits = TimeLimits(),  # noqa: B008 - it is frozen
    ) -> None:
        super().__init__(app, shutdown_timeout=shutdown_timeout)
        self._limits = limits

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=ExpectingRequests(made.request_factory),
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=_NEVER_S,
            lingering_time=min(_LINGER_S, self._limits.body_s),
            app=self.app,
            limits=self._limits,
            access_log=None,
            logger=logger,
        )


class _Server(web.Server):
    """Makes one protocol for each connection, and has each look at its time while there are any."""

    def __init__(self, *args: Any, limits: TimeLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._ticking: set[_Connection] = set()
        self._next_tick: asyncio.TimerHandle | None = None

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, limits=self._limits, **self._kwargs)

    def watch(self, connection: "_Connection") -> None:
        """Call `tick` of this connection from now on."""
        self._ticking.add(connection)
        if self._next_tick is None:
            self._next_tick = self._loop.call_later(self._limits.tick_s, self._tick)

    def unwatch(self, connection: "_Connection") -> None:
        """Its `tick` is not called any more."""
        self._ticking.discard(connection)

    def _tick(self) -> None:
        self._next_tick = None
        for connection in list(self._ticking):
            connection.tick()
        if self._ticking:
            self._next_tick = self._loop.call_later(self._limits.tick_s, self._tick)


class _Connection(SlicedReader):
    """One connection: its time, and what is said about what cannot be read."""

    __slots__ = ("_app", "_patience", "_server", "_wire")

    def __init__(
        self, server: _Server, *, app: web.Application, limits: TimeLimits, **kwargs: Any
    ) -> None:
        super().__init__(server, **kwargs)
        self._app = app
        self._server = server
        self._patience = Patience(limits)
        self._wire: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._task_handler is not None, "aiohttp starts it"
        self._task_handler.add_done_callback(_take_cancellation)
        self._wire = self.transport
        self._server.watch(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.unwatch(self)
        self._wire = None
        super().connection_lost(exc)

    def tick(self) -> None:
        """Look at the time, and end what takes too long."""
        assert self._wire is not None, "it is watched between its beginning and its end"
        wait, num_bytes = self._waits_for(self._wire.get_write_buffer_size())
        if self._patience.is_over(wait, self._request_count, num_bytes):
            self._give_up(wait, self._wire)

    def _waits_for(self, num_unsent: int) -> tuple[Wait, int]:
        """What this connection waits for now, and a count that grows with each step towards it."""
        request = self._current_request
        if num_unsent:
            # Events are pushed past the writer, but only while nothing is unsent.
            return Wait.ANSWER, (request.writer.output_size if request else 0) - num_unsent
        if request is not None and not request.content.is_eof() and not self._reading_paused:
            return Wait.BODY, request.content.total_bytes
        if self._waiter is None:
            return Wait.HANDLER, 0
        return Wait.HEAD if self._has_part_of_head else Wait.IDLE, 0

    def _give_up(self, wait: Wait, wire: asyncio.Transport) -> None:
        if wait is Wait.ANSWER:
            wire.abort()  # which cancels the handler
        elif wait is Wait.BODY and self._current_request is not None:
            self._current_request.content.set_exception(SlowBody())
        else:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a message that no handler saw, or to an error outside all handlers."""
        if request.writer.output_size > 0:
            raise ConnectionError("The answer has begun: there is no room for another")
        assert isinstance(request, web.Request), "the application makes every request"
        return _Answer(self._app, _known(request, exc))

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """Log the error, but not a body that broke off: `read_body` has reported it."""
        error = kwargs.get("exc_info")
        if isinstance(error, web.RequestPayloadError):
            without_frames(error)
        else:
            super().log_exception(*args, **kwargs)


def _take_cancellation(task: asyncio.Task[None]) -> None:
    """Take its exception from a task that was cancelled: its frames hold the task, and bodies."""
    if task.cancelled():
        with suppress(asyncio.CancelledError):
            task.exception()


def _known(request: web.Request, exc: BaseException | None) -> KagamiError:
    """Write the log line; returns the error that the client may see."""
    if isinstance(exc, HttpProcessingError):
        # aiohttp quotes the wrong line, and that line may contain the API key.
        reason = on_one_line(exc).partition(": b")[0]
        error = MalformedHttp(f"Malformed HTTP: {reason}")
        is_scan = isinstance(exc, BadHttpMethod)  # TLS, for example: no log line
        return error if is_scan else report(request, error)
    return report(request, exc if isinstance(exc, Exception) else RuntimeError("no cause is known"))


class _Answer(web.Response):
    """The answer to an error of a request without a route, with the application's headers."""

    def __init__(self, app: web.Application, error: KagamiError) -> None:
        super().__init__(
            body=error_body(error, Family.NATIVE),
            status=error_status(error),
            content_type="application/json",
        )
        self.force_close()
        self._app = app

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        if isinstance(self._req, web.Request):
            await self._app.on_response_prepare.send(self._req, self)
