"""KServe's v2 protocol (the Open Inference Protocol over HTTP), as TGI reads it.

Prompts come as BYTES: an array of byte numbers (TGI's form) or one text (the protocol's form).
There is one model; name and version in the path do not select another.
"""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from kagami_proto.errors import (
    InvalidRequest,
    InvalidUtf8,
    LengthMismatch,
    MalformedBody,
    Unhealthy,
)
from kagami_router.api.answering.respond import Asked, respond_whole
from kagami_router.api.native import generate
from kagami_router.api.schemas.platforms import (
    InferInput,
    InferOutput,
    InferRequest,
    InferResponse,
    Live,
    ServerMetadata,
)
from kagami_router.api.web.app_state import READINESS, TGI_VERSION, state_of
from kagami_router.api.web.call import HttpCall
from kagami_router.api.web.json_response import json_response
from kagami_router.api.web.middleware import read_body
from kagami_router.serving.infer import Generation

_INFER = msgspec.json.Decoder(InferRequest)


async def live(request: web.Request) -> web.Response:
    """The process answers."""
    return json_response(Live(True))


async def ready(request: web.Request) -> web.Response:
    """A request would be served."""
    if not request.app[READINESS].is_healthy:
        raise Unhealthy("unhealthy")
    return json_response(Live(True))


async def server_metadata(request: web.Request) -> web.Response:
    """Name, version and extensions of the server."""
    return json_response(
        ServerMetadata("text-generation-inference", TGI_VERSION, ["health", "models", "metrics"])
    )


async def model_metadata(request: web.Request) -> web.Response:
    """Name, version and extensions of the model."""
    path = request.match_info
    return json_response(ServerMetadata(path["model"], path["version"], ["infer", "ready"]))


async def infer(request: web.Request) -> web.StreamResponse:
    """One text for each input, in their order."""
    body = await read_body(request, _INFER)
    state_of(request)  # raises unless ready, before the body is checked
    call = HttpCall.of(request)
    names = [one.name for one in (body.outputs if body.outputs is not None else body.inputs)]
    if len(names) != len(body.inputs):
        raise LengthMismatch("Inputs and outputs length mismatch")
    if not body.inputs:
        raise InvalidRequest("`inputs` cannot be empty", field="inputs")
    prompts = [_prompt(index, one) for index, one in enumerate(body.inputs)]
    params = generate.params_of(generate.given(body.parameters))
    if params.num_samples > 1:
        raise InvalidRequest("`best_of` != 1 is not allowed for this endpoint", field="best_of")
    asked = [Asked(prompt, params, adds_special_tokens=True) for prompt in prompts]

    def write(generations: Sequence[Generation]) -> InferResponse:
        outputs = [
            _output(name, given, one.end.generated_text)
            for name, given, one in zip(names, body.inputs, generations, strict=True)
        ]
        return InferResponse(body.id, outputs)

    return await respond_whole(request, call, asked, write)


def _prompt(index: int, asked: InferInput) -> str:
    place = f"inputs[{index}].data"
    texts = [one for one in asked.data if isinstance(one, str)]
    numbers = [one for one in asked.data if isinstance(one, int)]
    if texts and (numbers or len(texts) > 1):
        raise MalformedBody(f"{place}: expected one text, or the numbers of its bytes", field=place)
    if texts:
        return texts[0]
    try:
        return bytes(numbers).decode()
    except UnicodeDecodeError as error:
        raise InvalidUtf8(f"{place}: {error}", field=place) from error
    except ValueError as error:
        raise MalformedBody(f"{place}: a byte is >= 0 and < 256", field=place) from error


def _output(name: str, asked: InferInput, text: str) -> InferOutput:
    if asked.data and isinstance(asked.data[0], str):
        return InferOutput(name, [1], "BYTES", [text])
    data = list(text.encode())
    return InferOutput(name, [1, len(data)], "BYTES", data)
