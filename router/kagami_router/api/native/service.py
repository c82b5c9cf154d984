"""The routes that do not generate: health, info, models, metrics, tokenize."""

import msgspec
from aiohttp import hdrs, web
from msgspec import UNSET

from kagami_proto.errors import MalformedBody, NotFound, Unhealthy
from kagami_router.api.answering.token_lists import simple_tokens
from kagami_router.api.answering.tokenizing import respond_tokens
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.native import (
    DetokenizeRequest,
    SimpleToken,
    TextAnswer,
    TokenizeRequest,
    TokensAnswer,
)
from kagami_router.api.schemas.openai import Model, ModelList
from kagami_router.api.web.app_state import READINESS, AppState, state_of
from kagami_router.api.web.json_response import json_response
from kagami_router.api.web.middleware import read_body

MAX_NAME_SHOWN = 100
PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


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
    """TGI's form: ids, texts and byte offsets of `inputs`. vLLM's: the ids of `prompt`."""
    body = await read_body(request, _TOKENIZE)
    if (body.inputs is UNSET) == (body.prompt is UNSET):
        raise MalformedBody("one of `inputs` and `prompt` is needed", field="inputs")

    async def answer(state: AppState) -> list[SimpleToken] | TokensAnswer:
        if body.inputs is not UNSET:
            tokens = await state.validation.tokens(body.inputs, "inputs", add_special_tokens=True)
            return simple_tokens(tokens)
        assert body.prompt is not UNSET
        tokens = await state.validation.tokens(
            body.prompt, "prompt", add_special_tokens=body.add_special_tokens
        )
        ids = [token.id for token in tokens]
        texts = [state.decoder.text_of(one) for one in ids] if body.return_token_strs else None
        return TokensAnswer(len(ids), state.validation.limits.max_total_tokens, ids, texts)

    return await respond_tokens(request, answer)


async def detokenize(request: web.Request) -> web.StreamResponse:
    """The text of token ids, special tokens included."""
    body = await read_body(request, _DETOKENIZE)

    async def answer(state: AppState) -> TextAnswer:
        return TextAnswer(await state.validation.text_of(body.tokens, "tokens"))

    return await respond_tokens(request, answer)


async def tokenizer_info(request: web.Request) -> web.Response:
    """What clients that tokenize by themselves ask for: special tokens and chat template."""
    state = state_of(request)
    source = state.chat_format.template.source
    told = {**state.special_tokens, "chat_template": source or None}
    return web.Response(body=encode(told), content_type="application/json")
