"""The SERVER span of a call: its parent, its HTTP attributes, and the headers with its ids.

Attributes follow OpenTelemetry's semantic conventions for HTTP and for generative AI
(`span_names.SEMCONV_VERSION`).
"""

import asyncio
from collections.abc import Callable

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware
from opentelemetry import trace
from opentelemetry.context import Context

from kagami_proto.span_names import Key
from kagami_proto.tracing import Tracing
from kagami_router.api.web.call_log import request_id

# The headers that tell the client its trace ids; set while a call runs.
TRACE_HEADERS = web.RequestKey("trace_headers", dict[str, str])
_CHATS = frozenset(("/v1/chat/completions", "/v1/responses", "/v1/messages"))
# nginx's status for a client that went away; it is never sent.
_CLIENT_CLOSED_REQUEST = 499


def trace_calls(
    tracing: Tracing, model_of: Callable[[], str | None], generating: frozenset[str]
) -> Middleware:
    """A middleware that gives every POST a span; `generating` are the paths of generating routes.

    With tracing off it still takes the client's trace id, for the log and the answer.
    """

    @web.middleware
    async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if request.method != hdrs.METH_POST or resource is None:
            return await handler(request)
        if not tracing.is_on and "traceparent" not in request.headers:
            return await handler(request)
        route = resource.canonical
        parent = tracing.propagator.extract(request.headers, Context())
        span = tracing.tracer.start_span(
            f"{request.method} {route}", parent, trace.SpanKind.SERVER, _asked(request, route)
        )
        with trace.use_span(
            span, end_on_exit=True, record_exception=False, set_status_on_exception=False
        ):
            request[TRACE_HEADERS] = _headers(span.get_span_context(), tracing.is_on)
            if route in generating and span.is_recording():
                span.set_attributes(_generation(route, model_of()))
            try:
                response = await handler(request)
            except asyncio.CancelledError:
                span.set_attribute(Key.HTTP_STATUS, _CLIENT_CLOSED_REQUEST)
                raise
            span.set_attribute(Key.HTTP_STATUS, response.status)
            return response

    return traced


def _asked(request: web.Request, route: str) -> dict[str, str | int]:
    host, port = _server_of(request)
    attributes: dict[str, str | int] = {
        Key.HTTP_METHOD: request.method,
        Key.HTTP_ROUTE: route,
        Key.URL_PATH: _as_text(request.path),
        Key.URL_SCHEME: request.scheme,
        Key.REQUEST_ID: request_id(request),
    }
    if host:
        attributes[Key.SERVER_ADDRESS] = _as_text(host)
    if port:
        attributes[Key.SERVER_PORT] = port
    if request.remote:
        attributes[Key.CLIENT_ADDRESS] = request.remote
    if agent := request.headers.get(hdrs.USER_AGENT):
        attributes[Key.USER_AGENT] = _as_text(agent)
    return attributes


def _server_of(request: web.Request) -> tuple[str | None, int | None]:
    """What the client calls this server; nothing where its Host header is no host."""
    try:
        return request.url.host, request.url.port
    except ValueError:
        return None, None


def _as_text(header: str) -> str:
    """`header` without the bytes that are no UTF-8: one of them, and no span could be exported."""
    return header.encode(errors="surrogateescape").decode(errors="replace")


def _generation(route: str, model: str | None) -> dict[str, str]:
    attributes: dict[str, str] = {
        Key.OPERATION: "chat" if route in _CHATS else "text_completion",
        Key.PROVIDER: "kagami",
        Key.OUTPUT_TYPE: "text",
    }
    if model:
        attributes |= {Key.REQUEST_MODEL: model, Key.RESPONSE_MODEL: model}
    return attributes


def _headers(context: trace.SpanContext, is_on: bool) -> dict[str, str]:
    """`x-trace-id`; with tracing on also W3C's `traceresponse`.

    https://w3c.github.io/trace-context/#traceresponse-header
    """
    if not context.is_valid:
        return {}
    trace_id = trace.format_trace_id(context.trace_id)
    headers = {"x-trace-id": trace_id}
    if is_on:
        span_id = trace.format_span_id(context.span_id)
        headers["traceresponse"] = f"00-{trace_id}-{span_id}-{int(context.trace_flags) & 1:02x}"
    return headers
