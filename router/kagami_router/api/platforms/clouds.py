"""SageMaker's /invocations and Vertex AI's predictions."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_router.api.answering.conversation import read_answer
from kagami_router.api.answering.respond import Asked, respond_whole
from kagami_router.api.native import generate
from kagami_router.api.openai import chat, completions
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.native import GenerateRequest
from kagami_router.api.schemas.openai import ChatRequest
from kagami_router.api.schemas.platforms import VertexRequest, VertexResponse
from kagami_router.api.web.app_state import AppState, state_of
from kagami_router.api.web.call import HttpCall
from kagami_router.api.web.caller import caller_of
from kagami_router.api.web.errors import Family
from kagami_router.api.web.middleware import FAMILY, read_body, reason_of
from kagami_router.serving.infer import Generation
from kagami_router.tools.deltas import AnswerParser, TextOnly

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_VERTEX = msgspec.json.Decoder(VertexRequest)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# The member that decides which body it is, in TGI's order.
_INVOKED: Mapping[str, tuple[Family, _Handler]] = {
    "inputs": (Family.NATIVE, generate.compat_generate),
    "messages": (Family.OPENAI, chat.chat_completions),
    "prompt": (Family.OPENAI, completions.completions),
}
_NULL = b"null"
_Body = TypeVar("_Body")


async def invocations(request: web.Request) -> web.StreamResponse:
    """Answers as `/`, `/v1/chat/completions` or `/v1/completions` would, by what the body has."""
    members = await read_body(request, _MEMBERS)
    for name, (family, handler) in _INVOKED.items():
        if bytes(members.get(name, _NULL)) != _NULL:
            request[FAMILY] = family
            return await handler(request)
    raise MalformedBody(
        "Failed to deserialize the JSON body into the target type: "
        "expected one of the fields `inputs`, `messages`, `prompt`"
    )


async def vertex(request: web.Request) -> web.StreamResponse:
    """One text for each instance, all generated at once; sampled unless told otherwise."""
    body = await read_body(request, _VERTEX)
    state, call = state_of(request), HttpCall.of(request)
    if not body.instances:
        raise InvalidRequest("`instances` cannot be empty", field="instances")
    read = [
        await _ask(state, index, one, caller_of(request))
        for index, one in enumerate(body.instances)
    ]

    def write(generations: Sequence[Generation]) -> VertexResponse:
        texts = [
            _text(generation, parser)
            for generation, (_, parser) in zip(generations, read, strict=True)
        ]
        return VertexResponse(texts)

    return await respond_whole(request, call, [asked for asked, _ in read], write)


async def _ask(
    state: AppState, index: int, instance: Mapping[str, Any], caller: str
) -> tuple[Asked, AnswerParser]:
    """What to generate for one instance, and the parser of its answer."""
    place = f"instances[{index}]"
    if "messages" in instance:
        body = _converted(place, instance, ChatRequest)
        asked, prepared = await chat.ask(state.validation, state.chat_format, body, caller)
        _refuse_samples(place, asked.num_samples)
        return asked, prepared.new_parser()
    parameters = instance.get("parameters")
    if isinstance(parameters, Mapping):
        instance = {**instance, "parameters": {"do_sample": True, **parameters}}
    elif parameters is None:  # null is allowed here
        instance = {key: value for key, value in instance.items() if key != "parameters"}
    given = _converted(place, instance, GenerateRequest)
    params = generate.params_of(generate.given(given.parameters))
    _refuse_samples(place, params.num_samples)
    return Asked(given.inputs, params, adds_special_tokens=True), TextOnly()


def _converted(place: str, instance: Mapping[str, Any], body: type[_Body]) -> _Body:
    try:
        return msgspec.convert(instance, body)
    except msgspec.ValidationError as error:
        field, reason = reason_of(error, place)
        raise MalformedBody(reason, field=field) from error


def _refuse_samples(place: str, count: int) -> None:
    if count > 1:
        raise InvalidRequest(f"`{place}` may ask for one sample. Given: {count}", field=place)


def _text(generation: Generation, parser: AnswerParser) -> str:
    """The text of an answer; if it calls tools, the calls as JSON."""
    if isinstance(parser, TextOnly):
        return generation.end.generated_text
    answer = read_answer(generation, parser)
    if not answer.calls:
        return answer.text or ""
    calls: Sequence[Mapping[str, str]] = [
        {"name": one.name, "arguments": one.arguments} for one in answer.calls
    ]
    return encode(calls).decode()
