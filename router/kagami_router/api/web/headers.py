"""The headers of every answer: the request's id, trace ids, and CORS for browsers."""

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import hdrs, web

from kagami_router.api.web.call_log import request_id
from kagami_router.api.web.errors import Families, Family
from kagami_router.api.web.left_out import left_out_headers
from kagami_router.api.web.request_span import TRACE_HEADERS

EXPOSED_HEADERS = (
    "x-compute-type, x-compute-time, x-compute-characters, x-total-time, x-validation-time,"
    " x-queue-time, x-inference-time, x-time-per-token, x-prompt-tokens, x-generated-tokens,"
    " x-accel-buffering, x-request-id, request-id, retry-after, x-trace-id, traceresponse,"
    " server-timing, x-left-out"
)
# OpenAI's and Anthropic's clients describe themselves in x-stainless-*. A browser asks for
# permission to send each of them.
_ALLOWED_HEADERS = (
    "content-type,authorization,x-api-key,x-request-id,traceparent,tracestate,baggage,"
    "anthropic-version,anthropic-beta,anthropic-dangerous-direct-browser-access,"
    "openai-organization,openai-project,openai-beta,idempotency-key,"
    "x-stainless-arch,x-stainless-async,x-stainless-custom-event-handler,"
    "x-stainless-custom-poll-interval,x-stainless-helper,x-stainless-helper-method,"
    "x-stainless-lang,x-stainless-os,x-stainless-package-version,x-stainless-poll-helper,"
    "x-stainless-raw-response,x-stainless-read-timeout,x-stainless-retry-count,"
    "x-stainless-runtime,x-stainless-runtime-version,x-stainless-stream-helper,"
    "x-stainless-timeout"
)
_VARY = "origin, access-control-request-method, access-control-request-headers"


def cors(allowed_origins: Sequence[str], families: Families) -> Callable[..., Awaitable[None]]:
    """A signal that gives every response TGI's headers; no origins = any origin."""

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers["x-request-id"] = request_id(request)
        headers.update(request.get(TRACE_HEADERS, {}))
        headers.update(left_out_headers(request))
        if families.of(request.path) is Family.ANTHROPIC:
            headers["request-id"] = headers["x-request-id"]  # the name that its clients read
        headers.pop(hdrs.SERVER, None)  # aiohttp's own; it tells versions to anyone
        if isinstance(response, web.Response) and not response.body:
            headers.pop(hdrs.CONTENT_TYPE, None)
        origin = request.headers.get(hdrs.ORIGIN)
        if not allowed_origins:
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*"
        elif origin is not None and origin in allowed_origins:
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
        headers[hdrs.VARY] = _VARY
        if request.method == hdrs.METH_OPTIONS:
            headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET,POST"
            headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = _ALLOWED_HEADERS
        else:
            headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED_HEADERS

    return add_headers
