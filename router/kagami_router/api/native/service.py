"""The routes that do not generate: health, info, models, metrics, tokenize."""

import msgspec
from aiohttp import hdrs, web

from kagami_proto.errors import NotFound, Unhealthy
from kagami_router.api.answering.token_lists import simple_tokens
from kagami_router.api.answering.tokenizing import respond_tokens
from kagami_router.api.schemas.native import GenerateRequest, SimpleToken
from kagami_router.api.schemas.openai import Model, ModelList
from kagami_router.api.web.app_state import READINESS, AppState, state_of
from kagami_router.api.web.json_response import json_response
from kagami_router.api.web.middleware import read_body

MAX_NAME_SHOWN = 100
PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKENIZE = msgspec.json.Decoder(GenerateRequest)


async def health(request: web.Request) -> web.Response:
    """200 without a body if a request would be served, else 503."""
    if not request.app[READINESS].is_healthy:
        raise Unhealthy("unhealthy")
    return web.Response()


async def alive(request: web.Request) -> web.Response:
    """200 without a body as long as the process answers."""
    return web.Response()


async def info(request: web.Request) -> web.Response:
    """The server's facts."""
    return json_response(state_of(request).info)


async def models(request: web.Request) -> web.Response:
    """The one model, as OpenAI lists it."""
    return json_response(ModelList("list", [_model(state_of(request))]))


async def model(request: web.Request) -> web.Response:
    """The one model, by its name."""
    state, name = state_of(request), request.match_info["name"]
    if name != state.info.model_id:
        raise NotFound(f"The model `{name[:MAX_NAME_SHOWN]}` does not exist")
    return json_response(_model(state))


def _model(state: AppState) -> Model:
    name = state.info.model_id
    return Model(name, "model", state.created, name)


async def metrics(request: web.Request) -> web.Response:
    """The Prometheus text, from the first moment on."""
    text = request.app[READINESS].metrics.render()
    return web.Response(body=text.encode(), headers={hdrs.CONTENT_TYPE: PROMETHEUS_TYPE})


async def tokenize(request: web.Request) -> web.StreamResponse:
    """Ids, texts and byte offsets of `inputs`."""
    body = await read_body(request, _TOKENIZE)

    async def answer(state: AppState) -> list[SimpleToken]:
        spans = await state.validation.tokens(body.inputs, "inputs", add_special_tokens=True)
        return simple_tokens(spans)

    return await respond_tokens(request, answer)
