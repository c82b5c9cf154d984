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
from kagami_router.api import openai, sse
from kagami_router.api.answers import Call, Finished, log_success, stream_headers, whole_headers
from kagami_router.api.middleware import read_body
from kagami_router.api.schemas import Completion, CompletionChoice, CompletionRequest, encode
from kagami_router.api.service import Front, front_of, json_response
from kagami_router.requests import StreamEvent, ValidRequest
from kagami_router.validation import samples

_COMPLETION = msgspec.json.Decoder(CompletionRequest)


async def completions(request: web.Request) -> web.StreamResponse:
    """One answer, or one chunk for each token; choices stand in the order of the prompts."""
    body = await read_body(request, _COMPLETION)
    front, call = front_of(request), Call.of(request)
    prompts = _prompts(front, body)
    _check_supported(body)
    params = openai.params(body, body.max_tokens)
    num_samples = openai.num_samples(front, body)
    with front.infer.permits(len(prompts) * num_samples):
        valid = [
            await front.validation.validate(
                prompt, params, add_special_tokens=True, trace=call.trace
            )
            for prompt in prompts
        ]
        requests = [sample for one in valid for sample in samples(one, num_samples)]
        if body.stream:
            chunks = _ChunkWriter(front, call, body, valid, requests)
            return await sse.respond(
                request,
                front.infer.stream_all(requests, call.received),
                render=chunks.render,
                render_error=openai.error_event,
                last=chunks.last,
                headers=stream_headers(front.compute_type, prompts),
            )
        generations = await front.infer.collect_all(requests, call.received)
    finished = [Finished(one.request, one.end) for one in generations]
    log_success(call, finished)
    return json_response(
        Completion(
            object="text_completion",
            id=f"cmpl-{call.id}",
            created=call.created,
            model=front.served_model(body.model),
            system_fingerprint=front.system_fingerprint,
            choices=[
                CompletionChoice(
                    index,
                    one.end.generated_text,
                    None,
                    openai.FINISH_REASON[one.end.finish_reason],
                )
                for index, one in enumerate(generations)
            ],
            usage=openai.usage_of(valid, finished),
        ),
        **whole_headers(front.compute_type, prompts, call, finished),
    )


class _ChunkWriter:
    """Writes the chunks of one completions stream; what all chunks share is encoded once.

    Usage comes as OpenAI sends it where `stream_options` asks for it, else as TGI does: each
    prompt's own in its last chunk.
    """

    def __init__(
        self,
        front: Front,
        call: Call,
        body: CompletionRequest,
        prompts: Sequence[ValidRequest],
        requests: Sequence[ValidRequest],
    ) -> None:
        self._call = call
        self._prompts = prompts
        self._requests = requests
        self._has_usage = openai.wants_usage(body)
        self._head = b"data: " + openai.chunk_head(
            "text_completion",
            f"cmpl-{call.id}",
            call.created,
            front.served_model(body.model),
            front.system_fingerprint,
        )
        self._finished: list[Finished] = []

    def render(self, turn: Sequence[tuple[int, StreamEvent]]) -> bytes:
        """The chunks of one turn."""
        return b"".join([self._chunk(index, event) for index, event in turn])

    def last(self) -> bytes:
        """Usage where asked for, and the end marker."""
        log_success(self._call, self._finished)
        if not self._has_usage:
            return sse.DONE
        usage = encode(openai.usage_of(self._prompts, self._finished))
        return self._head + b'"choices":[],"usage":%b}\n\n' % usage + sse.DONE

    def _chunk(self, index: int, event: StreamEvent) -> bytes:
        finish_reason, usage = b"null", b"null"
        if event.end is not None:
            finished = Finished(self._requests[index], event.end)
            self._finished.append(finished)
            finish_reason = openai.FINISH_REASON_JSON[event.end.finish_reason]
            if not self._has_usage:
                usage = encode(openai.usage_of([finished.request], [finished]))
        return (
            b'%b"choices":[{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b}],"usage":%b}'
            b"\n\n"
        ) % (self._head, index, encode(openai.text_of(event)), finish_reason, usage)


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
