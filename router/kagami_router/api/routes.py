"""The URL table of all routes, and the web application that serves it."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from kagami_proto.tracing import NO_TRACING, Tracing
from kagami_router.api.anthropic import messages
from kagami_router.api.docs import openapi, page
from kagami_router.api.docs.openapi import Operation, Route, Section
from kagami_router.api.native import generate, service
from kagami_router.api.openai import chat, completions
from kagami_router.api.platforms import clouds, kserve
from kagami_router.api.responses import responses
from kagami_router.api.schemas.chunks import ChatChunk, CompletionChunk
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.messages import (
    CountTokensRequest,
    MessageAnswer,
    MessageEvent,
    MessagesRequest,
    TokensCount,
)
from kagami_router.api.schemas.native import (
    ChatTokenizeResponse,
    CompatGenerateRequest,
    DetokenizeRequest,
    GenerateRequest,
    GenerateResponse,
    Info,
    SimpleToken,
    StreamResponse,
    TextAnswer,
    TokenizeRequest,
    TokensAnswer,
)
from kagami_router.api.schemas.openai import (
    ChatChoice,
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    Model,
    ModelList,
    OpenAIAnswer,
)
from kagami_router.api.schemas.platforms import (
    InferRequest,
    InferResponse,
    Live,
    ServerMetadata,
    VertexRequest,
    VertexResponse,
)
from kagami_router.api.schemas.response_events import (
    RESPONSE_EVENTS,
)
from kagami_router.api.schemas.responses import (
    InputTokens,
    ResponseObject,
    ResponsesRequest,
)
from kagami_router.api.web import sending, sse
from kagami_router.api.web.app_state import READINESS, TGI_VERSION, Readiness
from kagami_router.api.web.body_room import ROOM, BodyRoom
from kagami_router.api.web.call import TRACES_CONTENT
from kagami_router.api.web.caller import CALLER_HEADER
from kagami_router.api.web.errors import Families, Family
from kagami_router.api.web.headers import cors
from kagami_router.api.web.middleware import FAMILIES, api_key, count_calls, errors, last_resort
from kagami_router.api.web.request_span import trace_calls

_HELLO = {"inputs": "The three primary colours are", "parameters": {"max_new_tokens": 12}}
_CHAT = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8}
_TGI = Section("Text generation", Family.NATIVE)
_OPENAI = Section("OpenAI", Family.OPENAI)
_ANTHROPIC = Section("Anthropic", Family.ANTHROPIC)
_PLATFORMS = Section("Platforms", Family.NATIVE)
_SERVER = Section("Server", Family.NATIVE)

# Open routes need no API key: probes and scrapers send none. TGI leaves /info, /v1/models,
# /chat_tokenize and the docs open too; here they need the key, see notes/0003.
_HEALTH = Operation(_SERVER, is_open=True, may_fail=(503,))
_GENERATE = Operation(_TGI, GenerateRequest, GenerateResponse, generates=True, example=_HELLO)
_COMPAT = Operation(
    _TGI,
    CompatGenerateRequest,
    list[GenerateResponse],
    StreamResponse,
    generates=True,
    example=_HELLO,
)
_CHATS = Operation(
    _OPENAI, ChatRequest, OpenAIAnswer[ChatChoice], ChatChunk, generates=True, example=_CHAT
)
_COMPLETIONS = Operation(
    _OPENAI,
    CompletionRequest,
    OpenAIAnswer[CompletionChoice],
    CompletionChunk,
    generates=True,
    example={"prompt": "Once upon a time", "max_tokens": 12},
)
_RESPONSES = Operation(
    _OPENAI,
    ResponsesRequest,
    ResponseObject,
    RESPONSE_EVENTS,
    generates=True,
    example={"input": "Say hi.", "max_output_tokens": 8},
)
_VERTEX = Operation(
    _PLATFORMS,
    VertexRequest,
    VertexResponse,
    generates=True,
    example={"instances": [_HELLO]},
)
_LIVE = Operation(_PLATFORMS, answer=Live, is_open=True)
_READY = Operation(_PLATFORMS, answer=Live, is_open=True, may_fail=(503,))
_MODEL_PATH = "/v2/models/{model}/versions/{version}"


async def openapi_document(request: web.Request) -> web.Response:
    """The OpenAPI document."""
    return web.Response(body=_document_bytes(), content_type="application/json")


ROUTES: Sequence[Route] = (
    Route("GET", "/", service.health, _HEALTH),
    Route("GET", "/health", service.health, _HEALTH),
    Route("GET", "/ping", service.health, _HEALTH),
    Route("GET", "/health/ready", service.health, _HEALTH),
    Route("GET", "/health/live", service.alive, Operation(_SERVER, is_open=True)),
    Route("GET", "/info", service.info, Operation(_SERVER, answer=Info)),
    Route("GET", "/metrics", service.metrics, Operation(_SERVER, text="text/plain", is_open=True)),
    Route("POST", "/", generate.compat_generate, _COMPAT),
    Route("POST", "/generate", generate.generate, _GENERATE),
    Route(
        "POST",
        "/generate_stream",
        generate.generate_stream,
        Operation(_TGI, GenerateRequest, event=StreamResponse, generates=True, example=_HELLO),
    ),
    Route(
        "POST",
        "/tokenize",
        service.tokenize,
        Operation(
            _TGI,
            TokenizeRequest,
            (list[SimpleToken], TokensAnswer),
            example={"inputs": "Hello"},
        ),
    ),
    Route(
        "POST",
        "/detokenize",
        service.detokenize,
        Operation(_TGI, DetokenizeRequest, TextAnswer, example={"tokens": [1, 2]}),
    ),
    Route(
        "GET",
        "/tokenizer_info",
        service.tokenizer_info,
        Operation(_TGI, answer=dict[str, str | None]),
    ),
    Route(
        "POST",
        "/chat_tokenize",
        chat.chat_tokenize,
        Operation(_TGI, ChatRequest, ChatTokenizeResponse, example=_CHAT),
    ),
    Route("POST", "/v1/chat/completions", chat.chat_completions, _CHATS),
    Route("POST", "/v1/completions", completions.completions, _COMPLETIONS),
    Route("POST", "/v1/responses", responses.responses, _RESPONSES),
    Route(
        "POST",
        "/v1/responses/input_tokens",
        responses.input_tokens,
        Operation(_OPENAI, ResponsesRequest, InputTokens, example={"input": "Say hi."}),
    ),
    Route(
        "POST",
        "/v1/messages",
        messages.messages,
        Operation(
            _ANTHROPIC,
            MessagesRequest,
            MessageAnswer,
            MessageEvent,
            generates=True,
            example=_CHAT,
        ),
    ),
    Route(
        "POST",
        "/v1/messages/count_tokens",
        messages.count_tokens,
        Operation(_ANTHROPIC, CountTokensRequest, TokensCount, example=_CHAT),
    ),
    Route("GET", "/v1/models", service.models, Operation(_OPENAI, answer=ModelList)),
    Route(
        "GET",
        "/v1/models/{name:.+}",
        service.model,
        Operation(_OPENAI, answer=Model, may_fail=(404,)),
    ),
    Route(
        "POST",
        "/invocations",
        clouds.invocations,
        Operation(
            _PLATFORMS,
            (CompatGenerateRequest, ChatRequest, CompletionRequest),
            (list[GenerateResponse], OpenAIAnswer[ChatChoice], OpenAIAnswer[CompletionChoice]),
            (StreamResponse, ChatChunk, CompletionChunk),
            generates=True,
            families=(Family.NATIVE, Family.OPENAI),
            example=_HELLO,
        ),
    ),
    Route("POST", "/vertex", clouds.vertex, _VERTEX),
    Route("GET", "/v2/health/live", kserve.live, _LIVE),
    Route("GET", "/v2/health/ready", kserve.ready, _READY),
    Route("GET", "/v2", kserve.server_metadata, Operation(_PLATFORMS, answer=ServerMetadata)),
    Route("GET", _MODEL_PATH, kserve.model_metadata, Operation(_PLATFORMS, answer=ServerMetadata)),
    Route("GET", f"{_MODEL_PATH}/ready", kserve.ready, _READY),
    Route(
        "POST",
        f"{_MODEL_PATH}/infer",
        kserve.infer,
        Operation(
            _PLATFORMS,
            InferRequest,
            InferResponse,
            generates=True,
            example={"inputs": [{"name": "prompt", "data": ["Hello"]}]},
        ),
    ),
    Route(
        "GET", "/api-doc/openapi.json", openapi_document, Operation(_SERVER, answer=dict[str, Any])
    ),
    Route("GET", "/docs", page.to_page, Operation(_SERVER, text="text/html")),
    Route(
        "GET",
        "/docs/{file:[^/]*}",
        page.page,
        Operation(_SERVER, text="text/html", may_fail=(404,)),
    ),
)


FAMILIES_OF_ROUTES = Families((route.path, route.operation.family) for route in ROUTES)


def document() -> str:
    """The OpenAPI document as JSON."""
    return encode(openapi.document(ROUTES, TGI_VERSION)).decode()


@cache  # the table does not change
def _document_bytes() -> bytes:
    return document().encode()


def make_app(
    readiness: Readiness,
    *,
    payload_limit: int,
    allowed_origins: Sequence[str],
    key: str | None,
    aip_routes: tuple[str | None, str | None] = (None, None),
    tracing: Tracing = NO_TRACING,
    traces_content: bool = False,
    caller_header: str = "",
) -> web.Application:
    """The application; it answers 503 until `readiness` is open.

    `payload_limit` is in bytes. `aip_routes` are the paths where Vertex AI asks for predictions and
    for health. `caller_header` names the header that tells callers apart; "" = their addresses do.
    """
    routes = [*ROUTES, *_aip_routes(*aip_routes)]
    generating = frozenset(route.path for route in routes if route.operation.generates)
    # From the outside in. Only inside of `last_resort` a header is looked at. `errors` is
    # inside of the span, which tells the status of the answer. The key comes before any body.
    middlewares: list[Middleware] = [
        last_resort,
        trace_calls(tracing, lambda: readiness.model_id, generating),
        errors,
    ]
    if key:
        is_open = frozenset(route.path for route in routes if route.operation.is_open)
        middlewares.append(api_key(key, is_open))
    middlewares.append(count_calls(readiness.metrics, generating))
    app = web.Application(middlewares=middlewares, client_max_size=payload_limit)
    app[READINESS] = readiness
    app[FAMILIES] = FAMILIES_OF_ROUTES
    app[TRACES_CONTENT] = traces_content
    app[CALLER_HEADER] = caller_header
    app[sse.OUTBOX] = sse.Outbox()
    app[ROOM] = BodyRoom(payload_limit)
    app[sending.UNREAD] = sending.Unread()
    app.on_response_prepare.append(cors(allowed_origins, FAMILIES_OF_ROUTES))
    for route in routes:
        add = app.router.add_get if route.method == "GET" else app.router.add_post
        add(route.path, route.handler)
    return app


def _aip_routes(predict: str | None, health: str | None) -> list[Route]:
    """The paths from a Vertex AI container's environment, without those in the table."""
    known = {(route.method, route.path) for route in ROUTES}
    asked = [
        *([Route("POST", predict, clouds.vertex, _VERTEX)] if predict else []),
        *([Route("GET", health, service.health, _HEALTH)] if health else []),
    ]
    return [route for route in asked if (route.method, route.path) not in known]


def make_metrics_app(readiness: Readiness, allowed_origins: Sequence[str]) -> web.Application:
    """Only /metrics, for a port of its own."""
    app = web.Application(middlewares=[errors])
    app[READINESS] = readiness
    app[FAMILIES] = FAMILIES_OF_ROUTES
    app.on_response_prepare.append(cors(allowed_origins, FAMILIES_OF_ROUTES))
    app.add_routes([web.get("/metrics", service.metrics)])
    return app
