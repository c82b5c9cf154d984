"""SageMaker's /invocations and Vertex AI's predictions."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_router.api.answering.conversation import AnswerParser, read_answer
from kagami_router.api.native import generate
from kagami_router.api.native.service import Front, front_of, json_response
from kagami_router.api.openai import chat, completions
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.native import GenerateRequest
from kagami_router.api.schemas.openai import ChatRequest
from kagami_router.api.schemas.platforms import VertexRequest, VertexResponse
from kagami_router.api.web.call import Call, Finished, log_success, whole_headers
from kagami_router.api.web.errors import Family
from kagami_router.api.web.middleware import FAMILY, read_body, reason_of
from kagami_router.request.validation import GenerationParams
from kagami_router.request.values import ValidRequest
from kagami_router.serving.infer import Generation
from kagami_router.tools.parser import TextOnly

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_VERTEX = msgspec.json.Decoder(VertexRequest)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
# The member by which a body is known, in TGI's order.
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
    front, call = front_of(request), Call.of(request)
    if not body.instances:
        raise InvalidRequest("`instances` cannot be empty")
    with front.infer.permits(len(body.instances)):
        asked = [await _ask(front, index, one) for index, one in enumerate(body.instances)]
        valid = [await _validated(front, call, one) for one in asked]
        generations = await front.infer.collect_all(valid, call.tally)
    finished = [Finished(one.request, one.end) for one in generations]
    log_success(call, finished)
    texts = [
        _text(generation, one.parser) for generation, one in zip(generations, asked, strict=True)
    ]
    headers = whole_headers(front.compute_type, [one.prompt_text for one in valid], call, finished)
    return json_response(VertexResponse(texts), **headers)


class _Asked(NamedTuple):
    """One instance, understood."""

    prompt: str
    params: GenerationParams
    adds_special_tokens: bool
    parser: AnswerParser


async def _ask(front: Front, index: int, instance: Mapping[str, Any]) -> _Asked:
    place = f"instances[{index}]"
    if "messages" in instance:
        plan, prepared = await chat.prepare(front, _converted(place, instance, ChatRequest))
        _refuse_samples(place, plan.num_samples)
        return _Asked(prepared.prompt, plan.params, False, prepared.new_parser())
    parameters = instance.get("parameters")
    if isinstance(parameters, Mapping):
        instance = {**instance, "parameters": {"do_sample": True, **parameters}}
    elif parameters is None:  # null is allowed here
        instance = {key: value for key, value in instance.items() if key != "parameters"}
    body = _converted(place, instance, GenerateRequest)
    params = generate.params_of(generate.given(body.parameters))
    _refuse_samples(place, params.num_samples)
    return _Asked(body.inputs, params, True, TextOnly())


def _converted(place: str, instance: Mapping[str, Any], body: type[_Body]) -> _Body:
    try:
        return msgspec.convert(instance, body)
    except msgspec.ValidationError as error:
        raise MalformedBody(reason_of(error, place)) from error


def _refuse_samples(place: str, count: int) -> None:
    if count > 1:
        raise InvalidRequest(f"`{place}` may ask for one sample. Given: {count}")


async def _validated(front: Front, call: Call, asked: _Asked) -> ValidRequest:
    return await front.validation.validate(
        asked.prompt, asked.params, add_special_tokens=asked.adds_special_tokens
    )


def _text(generation: Generation, parser: AnswerParser) -> str:
    """The text of an answer; calls of tools as JSON."""
    if isinstance(parser, TextOnly):
        return generation.end.generated_text
    answer = read_answer(generation, parser)
    if not answer.calls:
        return answer.text or ""
    calls: Sequence[Mapping[str, str]] = [
        {"name": one.name, "arguments": one.arguments} for one in answer.calls
    ]
    return encode(calls).decode()
