"""What chat and completions share: from parameters and prompts to the answer or the stream.

Each route says by its `Form` how it writes a choice; all else is here: OpenAI's parameters, finish
reasons, usage, chunks, errors.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from aiohttp import web

from kagami_proto.errors import InvalidRequest
from kagami_router.api.native.service import Front, front_of, json_response
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.openai import (
    ChatChoice,
    CompletionChoice,
    OpenAIAnswer,
    OpenAIRequest,
    PromptTokensDetails,
    Usage,
)
from kagami_router.api.web import sse
from kagami_router.api.web.call import (
    Call,
    Finished,
    log_success,
    stream_comment,
    stream_headers,
    whole_headers,
)
from kagami_router.request.prompt import Prompt
from kagami_router.request.validation import GenerationParams, samples
from kagami_router.request.values import (
    End,
    FinishReason,
    PrefillToken,
    StreamEvent,
    ValidRequest,
)
from kagami_router.serving.infer import Generation

FINISH_REASON: Mapping[FinishReason, str] = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}
_FINISH_REASON_JSON = {reason: encode(text) for reason, text in FINISH_REASON.items()}
_NULL = b"null"
# Writing a token with five alternatives takes some 10 us: longer answers are made in a thread.
INLINE_TOKENS = 1000
_MAX_ID_DIGITS = 10  # of 2**32
# As many as OpenAI takes. They travel with the sequence each time it is replayed.
MAX_BIASED_IDS = 1024


_Turn = list[tuple[int, StreamEvent]]


class Plan(NamedTuple):
    """What to do with each prompt of a call, and how many times."""

    params: GenerationParams
    num_samples: int


@dataclass(frozen=True, slots=True)
class Form:
    """How a route writes its answers."""

    kind: str
    chunk_kind: str
    id_prefix: str
    adds_special_tokens: bool
    has_own_usage: bool
    """A stream without `stream_options` tells each choice's usage in its last chunk, as TGI."""
    choices: Callable[[Sequence[Generation]], list[ChatChoice] | list[CompletionChoice]]
    chunk_choices: Callable[[int, StreamEvent, bytes], Sequence[bytes]]
    """The JSON of a choice, one for each chunk of an event: its index, the event, its finish
    reason's JSON."""
    plain_choice: tuple[bytes, bytes] | None = None
    """The JSON of a choice before (`%d`: its index) and behind the text it adds, in a chunk that
    is neither its first nor its last; None: `chunk_choices` writes those as well."""
    shows_output: bool = True
    """False: what was generated to come to the prompt's logprobs is neither shown nor counted."""
    take_prompt: Callable[[int, Sequence[PrefillToken]], None] | None = None
    """Gets the prompt's logprobs of a stream's choice, which come before its first chunk."""


def max_tokens_of(body: OpenAIRequest) -> int | None:
    """The newer name wins."""
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def plan(front: Front, body: OpenAIRequest, max_tokens: int | None, top_n_tokens: int = 0) -> Plan:
    """OpenAI's parameters in the native terms; refuses all that needs no prompt to be seen.

    Sampling is on unless temperature or top_p is 0; top_p 1 and top_k below 1 are off.
    """
    num_samples = _num_samples(front, body)
    stop = (body.stop,) if isinstance(body.stop, str) else filter(None, body.stop or ())
    params = GenerationParams(
        do_sample=True,
        temperature=body.temperature or None,
        top_p=None if body.top_p in (0, 1) else body.top_p,
        top_k=None if (body.top_k or 0) < 1 else body.top_k,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        max_new_tokens=max_tokens,
        stop=tuple(stop),
        keep_stop=False,
        ignore_eos=bool(body.ignore_eos),
        seed=body.seed,
        top_n_tokens=top_n_tokens,
        logit_bias=_logit_bias(body.logit_bias),
    )
    front.validation.check_params(params)
    if body.temperature == 0 or body.top_p == 0:
        params = replace(params, do_sample=False, temperature=None, top_p=None, top_k=None)
    return Plan(params, num_samples)


async def respond(
    request: web.Request,
    call: Call,
    body: OpenAIRequest,
    *,
    plan: Plan,
    prompts: Sequence[str | Prompt],
    form: Form,
) -> web.StreamResponse:
    """One answer, or one chunk for each token; choices stand in the order of the prompts."""
    front = front_of(request)
    identity = (
        f"{form.id_prefix}-{call.id}",
        call.created,
        front.served_model(body.model),
        front.system_fingerprint,
    )
    with front.infer.permits(len(prompts) * plan.num_samples):
        valid = [
            await front.validation.validate(
                prompt, plan.params, add_special_tokens=form.adds_special_tokens
            )
            for prompt in prompts
        ]
        texts = [one.prompt_text for one in valid]
        requests = [sample for one in valid for sample in samples(one, plan.num_samples)]
        if body.stream:
            head = _chunk_head(form.chunk_kind, *identity)
            chunks = _ChunkWriter(
                call, form, head, requests, plan.num_samples, wants_usage=_wants_usage(body)
            )
            return await sse.respond(
                request,
                _prompts_first(form, front.infer.stream_all(requests, call.tally)),
                render=chunks.render,
                last=chunks.last,
                headers=stream_headers(front.compute_type, call, valid),
            )
        generations = await front.infer.collect_all(requests, call.tally)
        if not form.shows_output:
            generations = [_without_output(one) for one in generations]
        choices = await _choices(form, generations)
    finished = [Finished(one.request, one.end) for one in generations]
    log_success(call, finished)
    usage = _usage_of(finished, plan.num_samples)
    answer: OpenAIAnswer[Any] = OpenAIAnswer(form.kind, *identity, choices, usage)
    return json_response(answer, **whole_headers(front.compute_type, texts, call, finished))


@asynccontextmanager
async def _prompts_first(
    form: Form, turns: AbstractAsyncContextManager[AsyncIterator[_Turn]]
) -> AsyncIterator[AsyncIterator[_Turn]]:
    """The same turns, the prompts of which the form has taken; long ones in a thread."""
    async with turns as stream:
        yield stream if form.take_prompt is None else _taken(form.take_prompt, stream)


async def _taken(
    take: Callable[[int, Sequence[PrefillToken]], None], turns: AsyncIterator[_Turn]
) -> AsyncIterator[_Turn]:
    async for turn in turns:
        for index, event in turn:
            if len(event.prefill) > INLINE_TOKENS:
                await asyncio.to_thread(take, index, event.prefill)
            elif event.prefill:
                take(index, event.prefill)
        yield turn


async def _choices(
    form: Form, generations: Sequence[Generation]
) -> list[ChatChoice] | list[CompletionChoice]:
    num_tokens = sum(len(one.prefill) + len(one.tokens) for one in generations)
    if num_tokens <= INLINE_TOKENS:
        return form.choices(generations)
    return await asyncio.to_thread(form.choices, generations)


def _without_output(generation: Generation) -> Generation:
    return replace(generation, tokens=(), top_tokens=(), end=_end_without_output(generation.end))


def _end_without_output(end: End) -> End:
    return replace(end, finish_reason=FinishReason.LENGTH, generated_text="", num_generated=0)


class _ChunkWriter:
    """Writes the chunks of one stream; what all of them share is encoded once."""

    def __init__(
        self,
        call: Call,
        form: Form,
        head: bytes,
        requests: Sequence[ValidRequest],
        num_samples: int,
        *,
        wants_usage: bool,
    ) -> None:
        self._call = call
        self._form = form
        self._head = b"data: " + head
        self._requests = requests
        self._num_samples = num_samples
        self._wants_usage = wants_usage
        self._finished: dict[int, Finished] = {}
        # By the index of a choice that has begun: what stands around its text.
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def render(self, turn: Sequence[tuple[int, StreamEvent]]) -> bytes:
        """The chunks of one turn."""
        if len(turn) == 1:
            return self._chunks(*turn[0])
        return b"".join([self._chunks(index, event) for index, event in turn])

    def last(self) -> bytes:
        """Usage where asked for, and the end marker."""
        finished = [self._finished[index] for index in range(len(self._requests))]
        log_success(self._call, finished)
        ending = stream_comment(self._call, finished) + sse.DONE  # clients stop reading at DONE
        if not self._wants_usage:
            return ending
        usage = encode(_usage_of(finished, self._num_samples))
        return self._head + b'"choices":[],"usage":%b}\n\n' % usage + ending

    def _chunks(self, index: int, event: StreamEvent) -> bytes:
        if event.end is None and (frame := self._frames.get(index)):
            return b"".join((frame[0], encode(text_of(event)), frame[1]))
        chunks = self._full_chunks(index, event)
        if self._form.plain_choice is not None:
            before, behind = self._form.plain_choice
            self._frames[index] = (
                b'%b"choices":[%b' % (self._head, before % index),
                behind + b'],"usage":null}\n\n',
            )
        return chunks

    def _full_chunks(self, index: int, event: StreamEvent) -> bytes:
        finish_reason, usage = _NULL, _NULL
        if event.end is not None:
            end = event.end if self._form.shows_output else _end_without_output(event.end)
            finished = self._finished[index] = Finished(self._requests[index], end)
            finish_reason = _FINISH_REASON_JSON[end.finish_reason]
            if self._form.has_own_usage and not self._wants_usage:
                usage = encode(_usage_of([finished], 1))
        return b"".join(
            b'%b"choices":[%b],"usage":%b}\n\n' % (self._head, choice, usage)
            for choice in self._form.chunk_choices(index, event, finish_reason)
        )


def _logit_bias(wire: Mapping[str, float] | list[float] | None) -> tuple[tuple[int, float], ...]:
    """JSON's keys are texts; here they are token ids. A list is TGI's form, which does nothing."""
    if not isinstance(wire, Mapping):
        return ()
    if len(wire) > MAX_BIASED_IDS:
        raise InvalidRequest(
            f"`logit_bias` supports up to {MAX_BIASED_IDS} token ids. Given: {len(wire)}"
        )
    for key in wire:
        if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_ID_DIGITS):
            raise InvalidRequest(f"`logit_bias` has token ids as its keys. Given: {key[:40]!r}")
    return tuple((int(key), bias) for key, bias in wire.items())


def _num_samples(front: Front, body: OpenAIRequest) -> int:
    """`n`, which --max-best-of limits as it limits `best_of`."""
    count = 1 if body.n is None else body.n
    limit = front.validation.limits.max_best_of
    if not 0 < count <= limit:
        raise InvalidRequest(f"`n` must be > 0 and <= {limit}. Given: {count}")
    return count


def text_of(event: StreamEvent) -> str:
    """The text that a chunk adds: special tokens have none."""
    return event.tail if event.token.special else event.token.text + event.tail


def _wants_usage(body: OpenAIRequest) -> bool:
    """Whether the stream ends with a chunk of usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _usage_of(finished: Sequence[Finished], num_samples: int) -> Usage:
    """Tokens of a call: each prompt once, whatever number of samples it has.

    A prompt's samples may find each other's blocks: cached is what the least lucky one found.
    """
    by_prompt = [finished[at : at + num_samples] for at in range(0, len(finished), num_samples)]
    prompt_tokens = sum(len(group[0].request.prompt_ids) for group in by_prompt)
    cached_tokens = sum(min(one.end.cached_tokens for one in group) for group in by_prompt)
    completion_tokens = sum(one.end.num_generated for one in finished)
    return Usage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(cached_tokens),
    )


def _chunk_head(kind: str, chunk_id: str, created: int, model: str, fingerprint: str) -> bytes:
    """What the chunks of a stream have in common: an object left open, up to `choices`."""
    return b'{"object":%b,"id":%b,"created":%d,"model":%b,"system_fingerprint":%b,' % (
        encode(kind),
        encode(chunk_id),
        created,
        encode(model),
        encode(fingerprint),
    )
