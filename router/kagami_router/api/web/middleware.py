"""Middleware around every handler: checks the API key, answers errors, counts calls.

The only broad `except` of the HTTP code is here. An error outside the error tree is a bug: it is
logged with its traceback, and the client still gets an answer.
"""

import asyncio
import hmac
import logging
import re
from typing import TypeVar

import msgspec
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware
from opentelemetry import trace

from kagami_proto.errors import (
    BodyTooSlow,
    CodedBody,
    KagamiError,
    MalformedBody,
    MethodNotAllowed,
    NotFound,
    NotJson,
    Overloaded,
    Unauthorized,
    Unavailable,
    Unhealthy,
    UnsupportedMediaType,
    row_of,
)
from kagami_proto.panics import exception_of
from kagami_proto.span_names import EventName, Key
from kagami_proto.tracing import mark_failed
from kagami_router.api.web.body_room import ROOM, CrowdedOut
from kagami_router.api.web.body_rules import SlowBody, ask_for_body, without_body
from kagami_router.api.web.call_log import brought_until_now, origin_of
from kagami_router.api.web.errors import (
    Families,
    Family,
    error_body,
    error_kind,
    error_status,
    error_text,
)
from kagami_router.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


# Set once the log line of a stream is written: the `err` label of its failure, or "" if it was
# answered. A client that leaves before the last bytes are sent changes nothing of that.
FAILURE_CAUSE = web.RequestKey("failure_cause", str)
# The family of each path: it decides the format of errors.
FAMILIES = web.AppKey("families", Families)
# The family of a request whose path serves several; the body decides.
FAMILY = web.RequestKey("family", Family)


class InternalError(KagamiError):
    """A bug of ours, as the client sees it."""


class UnreadableBody(NotJson):
    """The body broke off, or its coding is not the one in its headers."""


def family_of(request: web.Request) -> Family:
    """The family that decides the error format of this request."""
    return request.get(FAMILY) or request.app[FAMILIES].of(request.path)


def on_one_line(error: BaseException) -> str:
    """The text of an aiohttp error, with newlines replaced by spaces."""
    text = error.message if isinstance(error, HttpProcessingError) else str(error)
    return " ".join(text.split())


def report(request: web.Request, error: Exception) -> KagamiError:
    """Write the log line of a failed call; returns the error that the client may see.

    An error outside the tree is logged with its traceback and returned as `InternalError`. Probes
    of a server that is not ready get no line.
    """
    if isinstance(error, RecursionError):  # the body was decoded, but is too deep to process
        error = MalformedBody("The request body is nested too deeply")
    mark_failed(trace.get_current_span(), error)
    if not isinstance(error, KagamiError):
        logger.error("Internal error", extra=_fields(request, error), exc_info=error)
        return InternalError("Internal error")
    is_probe = request.method in (hdrs.METH_GET, hdrs.METH_HEAD)
    if not isinstance(error, Unhealthy | Unavailable) or not is_probe:
        row = row_of(error)
        level = logging.WARNING if row is not None and row.is_refusal else logging.ERROR
        hint = {"limit": "--max-concurrent-requests"} if isinstance(error, Overloaded) else {}
        logger.log(level, "%s", error_text(error), extra={**_fields(request, error), **hint})
    return error


def _fields(request: web.Request, error: BaseException) -> dict[str, object]:
    kind = error_kind(error) if isinstance(error, KagamiError) else "internal"
    return {"error_type": kind, **brought_until_now(request), **origin_of(request)}


def failure_cause(error: BaseException) -> str:
    """The `err` label of tgi_request_failure."""
    if isinstance(error, RecursionError):  # of a body; see `report`
        error = MalformedBody(str(error))
    row = row_of(error)
    return "generation" if row is None else row.cause


def error_response(request: web.Request, error: KagamiError) -> web.Response:
    """A whole error answer, in the format of the route's family."""
    family = family_of(request)
    response = web.Response(
        body=error_body(error, family),
        status=error_status(error, family),
        content_type="application/json",
    )
    if isinstance(error, Overloaded | Unavailable):
        response.headers[hdrs.RETRY_AFTER] = "1"
    if isinstance(error, Unauthorized):
        response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    if isinstance(error, CodedBody):
        response.headers[hdrs.ACCEPT_ENCODING] = "identity"
    if isinstance(error, BodyTooSlow):
        response.force_close()
    return without_body(request, response)


@web.middleware
async def last_resort(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what fails outside of `errors`: it stands inside of the middleware that traces."""
    try:
        return await handler(request)
    except BaseException as error:
        return error_response(request, report(request, exception_of(error)))


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every request, whatever its handler raises."""
    if request.method == hdrs.METH_OPTIONS:
        return web.Response()  # the CORS headers come with the signal below
    try:
        return await handler(request)
    except web.HTTPException as refusal:
        return _refusal(request, without_frames(refusal))
    except asyncio.CancelledError:
        if FAILURE_CAUSE not in request:
            report_dropped(request)
        raise
    except BaseException as error:
        known = report(request, exception_of(error))
        without_frames(error)
        return error_response(request, known)


_Error = TypeVar("_Error", bound=BaseException)


def without_frames(error: _Error) -> _Error:
    """`error` without its traceback, once it has been logged, and without those of its causes.

    The frames hold the request and what has come of its body. Some errors are held by the request,
    and all of it would wait for the garbage collector.
    """
    part: BaseException | None = error
    while part is not None:
        part.__traceback__ = None
        part = part.__cause__ or part.__context__
    return error


def report_dropped(request: web.Request) -> None:
    """Write the log line of a call whose client went away before the end."""
    logger.info(
        "The connection was closed before the end",
        extra={"error_type": "dropped", **brought_until_now(request), **origin_of(request)},
    )
    trace.get_current_span().add_event(EventName.CANCELLED)
    trace.get_current_span().set_attribute(Key.ERROR_TYPE, "cancelled")


def _refusal(request: web.Request, refusal: web.HTTPException) -> web.Response:
    """404 and 405: without a body on native paths, as in TGI."""
    response = web.Response(status=refusal.status)
    if family_of(request) is not Family.NATIVE:
        is_there = isinstance(refusal, web.HTTPMethodNotAllowed)
        error = MethodNotAllowed if is_there else NotFound
        response = error_response(request, error(f"There is no {request.method} {request.path}"))
    if allowed := refusal.headers.get(hdrs.ALLOW):
        response.headers[hdrs.ALLOW] = allowed
    return without_body(request, response)


def count_calls(metrics: Metrics, paths: frozenset[str]) -> Middleware:
    """A middleware that counts POSTs to `paths` (paths of routes) and how each ended."""

    def ended(cause: str) -> None:
        if cause:
            metrics.request_failed(cause)
        else:
            metrics.request_succeeded()

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST" or _route_path(request) not in paths:
            return await handler(request)
        metrics.request_started()
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            ended(request.get(FAILURE_CAUSE, "dropped"))
            raise
        except BaseException as error:
            metrics.request_failed(failure_cause(exception_of(error)))
            raise
        ended(request.get(FAILURE_CAUSE, ""))
        return response

    return count


def _route_path(request: web.Request) -> str | None:
    """The path of the request's route, with variables as `{name}`; None without a route."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else None


_JSON_TYPE = re.compile(r"application/(?:[\w.!#$&^+-]+\+)?json", re.IGNORECASE)
_PLACE = re.compile(r"(?P<reason>.*) - at `(?:key in )?\$\.?(?P<path>.*)`", re.DOTALL)
_Body = TypeVar("_Body")


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[_Body]) -> _Body:
    """Read and decode the body; raises the subclass of `InvalidRequest` that fits."""
    if not _JSON_TYPE.fullmatch(request.content_type):
        raise UnsupportedMediaType("Expected request with `Content-Type: application/json`")
    await ask_for_body(request)
    try:
        body = await request.app[ROOM].read(request)
    except CrowdedOut as error:
        raise Overloaded("Too many long request bodies are coming at once") from error
    except SlowBody as error:
        raise BodyTooSlow(
            "Failed to buffer the request body: it came too slowly (see --body-timeout)"
        ) from error
    except web.RequestPayloadError as error:
        cause = on_one_line(error.__cause__ or error)
        raise UnreadableBody(f"Failed to buffer the request body: {cause}") from error
    try:
        if not body.isascii():
            body.decode()  # the decoder skips unknown members without a look at their bytes
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        place, reason = reason_of(error)
        raise MalformedBody(
            f"Failed to deserialize the JSON body into the target type: {reason}", field=place
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotJson(f"Failed to parse the request body as JSON: {error}") from error


def reason_of(error: msgspec.ValidationError, place: str = "") -> tuple[str | None, str]:
    """The wrong field and what is wrong with it; `place` is the path of the body's root."""
    text = str(error)
    if found := _PLACE.fullmatch(text):
        place, text = ".".join(filter(None, (place, found["path"]))), found["reason"]
    return (place, f"{place}: {text}") if place else (None, text)


def api_key(key: str, open_paths: frozenset[str]) -> Middleware:
    """A middleware that requires the API key, except on GETs of `open_paths` (paths of routes).

    Clients send `Authorization: Bearer {key}`; Anthropic's clients send `x-api-key: {key}`.
    """
    expected = key.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.http_exception is None and not _is_open(request, open_paths):
            if not hmac.compare_digest(
                _given_key(request).encode(errors="surrogateescape"), expected
            ):
                raise Unauthorized("The API key is missing or wrong")
        return await handler(request)

    return check


def _given_key(request: web.Request) -> str:
    scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")


def _is_open(request: web.Request, open_paths: frozenset[str]) -> bool:
    return request.method in ("GET", "HEAD") and _route_path(request) in open_paths
