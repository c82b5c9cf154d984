"""The whole URL table, and the web application that serves it."""

from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Middleware

from kagami_router.api import chat, completions, generate, service
from kagami_router.api.middleware import api_key, cors, count_calls, errors
from kagami_router.api.service import DOOR, Door

ROUTES = [
    web.get("/", service.health),
    web.get("/health", service.health),
    web.get("/ping", service.health),
    web.get("/info", service.info),
    web.get("/metrics", service.metrics),
    web.get("/v1/models", service.models),
    web.post("/tokenize", service.tokenize),
    web.post("/chat_tokenize", chat.chat_tokenize),
    web.post("/", generate.compat_generate),
    web.post("/generate", generate.generate),
    web.post("/generate_stream", generate.generate_stream),
    web.post("/v1/chat/completions", chat.chat_completions),
    web.post("/v1/completions", completions.completions),
]

GENERATING = frozenset(
    ("/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions")
)
# Served without the API key: probes and scrapers carry none. TGI leaves /info, /v1/models and
# /chat_tokenize open too; here they are closed, see notes/0003.
OPEN = frozenset(("/", "/health", "/ping", "/metrics"))


def make_app(
    door: Door, *, payload_limit: int, allowed_origins: Sequence[str], key: str | None
) -> web.Application:
    """The application; it serves 503 until `door` is open."""
    middlewares: list[Middleware] = [errors]
    if key:
        middlewares.append(api_key(key, OPEN))
    middlewares.append(count_calls(lambda: door.metrics, GENERATING))
    app = web.Application(middlewares=middlewares, client_max_size=payload_limit)
    app[DOOR] = door
    app.on_response_prepare.append(cors(allowed_origins))
    app.add_routes(ROUTES)
    return app


def make_metrics_app(door: Door) -> web.Application:
    """Only /metrics, for a port of its own."""
    app = web.Application(middlewares=[errors])
    app[DOOR] = door
    app.add_routes([web.get("/metrics", service.metrics)])
    return app
