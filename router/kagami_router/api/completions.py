"""/v1/completions: one or several prompts, each continued as it stands."""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from kagami_proto.errors import (
    BatchSizeExceeded,
    InvalidRequest,
    MalformedBody,
    SuffixNotSupported,
)
from kagami_router.api import openai
from kagami_router.api.answers import Call
from kagami_router.api.middleware import read_body
from kagami_router.api.schemas import CompletionChoice, CompletionRequest, encode
from kagami_router.api.service import Front, front_of
from kagami_router.infer import Generation
from kagami_router.requests import StreamEvent

_COMPLETION = msgspec.json.Decoder(CompletionRequest)


async def completions(request: web.Request) -> web.StreamResponse:
    """One answer, or one chunk for each token."""
    body = await read_body(request, _COMPLETION)
    front, call = front_of(request), Call.of(request)
    prompts = _prompts(front, body)
    _check_supported(body)
    plan = openai.plan(front, body, body.max_tokens)
    return await openai.respond(request, call, body, plan=plan, prompts=prompts, form=_FORM)


def _choices(generations: Sequence[Generation]) -> list[CompletionChoice]:
    return [
        CompletionChoice(
            index, one.end.generated_text, None, openai.FINISH_REASON[one.end.finish_reason]
        )
        for index, one in enumerate(generations)
    ]


def _chunk_choice(index: int, event: StreamEvent, finish_reason: bytes) -> bytes:
    text = encode(openai.text_of(event))
    return b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b}' % (
        index,
        text,
        finish_reason,
    )


_FORM = openai.Form(
    kind="text_completion",
    chunk_kind="text_completion",
    id_prefix="cmpl",
    adds_special_tokens=True,
    has_own_usage=True,
    choices=_choices,
    chunk_choice=_chunk_choice,
)


def _prompts(front: Front, body: CompletionRequest) -> list[str]:
    if body.suffix is not None:
        raise SuffixNotSupported(
            "Suffix is not supported and can be achieved by preprocessing the prompt."
        )
    if isinstance(body.prompt, str):
        return [body.prompt]
    if not body.prompt:
        raise MalformedBody(
            "prompt: Empty array detected. Do not use an empty array for the prompt."
        )
    limit = front.validation.limits.max_client_batch_size
    if len(body.prompt) > limit:
        raise BatchSizeExceeded(
            f"Number of prompts exceeds the maximum allowed batch size of {limit}"
        )
    prompts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if len(prompts) < len(body.prompt):
        raise MalformedBody("prompt: expected a text or a list of texts")
    return prompts


def _check_supported(body: CompletionRequest) -> None:
    """What OpenAI has and this server has not: refused, but for the values that ask for nothing."""
    if body.logprobs is not None and body.logprobs is not False:
        raise InvalidRequest("`logprobs` is not supported yet on this route")
    if body.echo:
        raise InvalidRequest("`echo` is not supported yet")
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise InvalidRequest("`best_of` > `n` is not supported yet")
