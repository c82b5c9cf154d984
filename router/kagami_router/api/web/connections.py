"""Connections: errors that aiohttp answers itself get our JSON, our headers and a log line.

A message that is not HTTP reaches no middleware and no route. aiohttp would answer it with a text
that names the server's software.
"""

import logging
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from kagami_proto.errors import KagamiError, NotJson
from kagami_router.api.web.body_rules import ExpectingRequests
from kagami_router.api.web.errors import Family, error_body, error_status
from kagami_router.api.web.middleware import on_one_line, report

logger = logging.getLogger(__name__)


class MalformedHttp(NotJson):
    """The message is not HTTP; its path may be unknown."""


class Runner(web.AppRunner):
    """Runs an application; a handler is cancelled when its client goes away."""

    def __init__(self, app: web.Application, *, shutdown_timeout: float) -> None:
        super().__init__(app, shutdown_timeout=shutdown_timeout)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=ExpectingRequests(made.request_factory),
            handler_cancellation=True,
            auto_decompress=False,
            app=self.app,
            access_log=None,
            logger=logger,
        )


class _Server(web.Server):
    """Makes one protocol for each connection."""

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    """One connection."""

    __slots__ = ("_app",)

    def __init__(self, *args: Any, app: web.Application, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._app = app

    def data_received(self, data: bytes) -> None:
        """A message where the rest of a body should be says that the body is broken.

        aiohttp queues that message behind the handler, which waits for the body.
        """
        super().data_received(data)
        if self._messages and (request := self._current_request) is not None:
            if not request.content.is_eof():
                broken = web.RequestPayloadError("The body is not framed as its headers say")
                request.content.set_exception(broken)

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
        if not isinstance(kwargs.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kwargs)


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
