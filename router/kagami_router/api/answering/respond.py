"""Answers every generating call: validate, generate, write the answer whole or as a stream.

A route says what to generate (`Asked`) and gives a writer that knows its JSON. The rest is the same
for all routes and lives here: permits, headers, the log line, threads for long answers, failures.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from kagami_proto.errors import ContextOverflow, KagamiError
from kagami_router.api.web import sse
from kagami_router.api.web.app_state import state_of
from kagami_router.api.web.call import (
    Finished,
    HttpCall,
    log_success,
    stream_comment,
    stream_headers,
    whole_headers,
)
from kagami_router.api.web.caller import caller_of
from kagami_router.api.web.json_response import JsonAnswer, json_response
from kagami_router.api.web.sending import sent
from kagami_router.request.prompt import Prompt
from kagami_router.request.validation import GenerationParams, Validation, samples
from kagami_router.request.values import End, StreamEvent, ValidRequest
from kagami_router.serving.generation_stream import Events
from kagami_router.serving.infer import Generation

# A token with five alternatives takes some 10 us to write: longer answers are written in a thread.
INLINE_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt of a call, and what to generate from it."""

    prompt: str | Prompt
    params: GenerationParams
    adds_special_tokens: bool
    """False: the chat template has written them already"""
    num_samples: int = 1
    field: str = "inputs"
    """Where the prompt stands in the body; an error that it is too long names it"""


class AnswerWriter(Protocol):
    """How a route writes its answer: `whole`, or `start`, each `event`, and `end` or `failed`.

    Generations are ordered by prompt; the samples of one prompt are neighbours. An `index` is the
    place of a generation in that order.
    """

    def whole(self, generations: Sequence[Generation]) -> JsonAnswer:
        """The answer in one piece; for a long answer this runs in a thread."""

    def chosen(self, generations: Sequence[Generation]) -> Sequence[Generation]:
        """The generations that headers and log line of a whole answer count."""

    def counted(self, end: End) -> End:
        """The end of a generation as headers, usage and log line report it."""

    def start(self, requests: Sequence[ValidRequest]) -> bytes:
        """The first bytes of a stream; they are sent together with the first event."""

    def event(self, index: int, event: StreamEvent) -> bytes:
        """The bytes of one event."""

    def end(self, finished: Sequence[Finished], comment: bytes) -> bytes:
        """The last bytes of a stream; `comment` has the times and precedes any end marker."""

    def failed(self, error: KagamiError) -> bytes:
        """The last bytes of a stream whose generation failed; `start` was sent before."""


async def respond(
    request: web.Request,
    call: HttpCall,
    asked: Sequence[Asked],
    writer: AnswerWriter,
    *,
    is_stream: bool,
    keep_alive: bytes = sse.KEEP_ALIVE,
) -> web.StreamResponse:
    """Generate what is asked; answer with one body or a stream, which says `keep_alive` at times.

    Errors are raised until the first byte of a stream is sent; later ones become its last event.
    """
    if not is_stream:
        return await respond_whole(
            request, call, asked, writer.whole, chosen=writer.chosen, counted=writer.counted
        )
    state = state_of(request)
    caller = caller_of(request)
    with state.infer.permits(_num_generations(asked), caller=caller):
        prompts = await _validated(state.validation, asked, caller)
        requests = _samples(prompts, asked)
        return await sse.respond(
            request,
            lambda sink: state.infer.stream(requests, call.stats, sink),
            _Stream(call, requests, writer),
            headers=stream_headers(state.compute_type, call, prompts),
            keep_alive=keep_alive,
        )


async def respond_whole(
    request: web.Request,
    call: HttpCall,
    asked: Sequence[Asked],
    write: Callable[[Sequence[Generation]], JsonAnswer],
    *,
    chosen: Callable[[Sequence[Generation]], Sequence[Generation]] = lambda all_: all_,
    counted: Callable[[End], End] = lambda end: end,
) -> web.StreamResponse:
    """Generate what is asked; answer with one body. `write` is `AnswerWriter.whole`, and so on."""
    state = state_of(request)
    caller = caller_of(request)
    with state.infer.permits(_num_generations(asked), caller=caller):
        prompts = await _validated(state.validation, asked, caller)
        generations = await state.infer.collect(_samples(prompts, asked), call.stats)
        num_tokens = sum(len(one.prefill) + len(one.tokens) for one in generations)
        if num_tokens <= INLINE_TOKENS:
            answer = write(generations)
        else:
            answer = await asyncio.to_thread(write, generations)
        finished = [Finished(one.request, counted(one.end)) for one in chosen(generations)]
        log_success(call, finished)
        headers = whole_headers(state.compute_type, prompts, call, finished)
        return await sent(request, json_response(answer, **headers))


def _num_generations(asked: Sequence[Asked]) -> int:
    return sum(one.num_samples for one in asked)


async def _validated(
    validation: Validation, asked: Sequence[Asked], caller: str
) -> list[ValidRequest]:
    """A request for each prompt."""
    return [await _valid(validation, one, caller) for one in asked]


async def _valid(validation: Validation, asked: Asked, caller: str) -> ValidRequest:
    try:
        return await validation.validate(
            asked.prompt,
            asked.params,
            add_special_tokens=asked.adds_special_tokens,
            caller=caller,
        )
    except ContextOverflow as error:
        error.field = asked.field
        raise


def _samples(prompts: Sequence[ValidRequest], asked: Sequence[Asked]) -> list[ValidRequest]:
    """A request for each generation."""
    return [
        sample
        for prompt, one in zip(prompts, asked, strict=True)
        for sample in samples(prompt, one.num_samples)
    ]


class _Stream:
    """Writes one stream, with the writer of its route."""

    def __init__(
        self, call: HttpCall, requests: Sequence[ValidRequest], writer: AnswerWriter
    ) -> None:
        self._call = call
        self._requests = requests
        self._writer = writer
        self._event = writer.event
        self._has_started = False
        self._finished: dict[int, Finished] = {}

    def push(self, index: int, events: Events) -> bytes | None:
        """As `sse.StreamWriter` says; None for a prompt with many logprobs."""
        first = events[0]
        if len(events) == 1 and first.end is None and self._has_started and not first.prefill:
            return self._event(index, first)  # nearly every call
        if len(first.prefill) > INLINE_TOKENS:
            return None
        return self._written(index, events)

    async def pull(self, backlog: sse.Backlog) -> bytes:
        """As `sse.StreamWriter` says."""
        if sum(len(events[0].prefill) for _, events in backlog) > INLINE_TOKENS:
            return await asyncio.to_thread(self._all, backlog)
        return self._all(backlog)

    def end(self) -> bytes:
        """As `sse.StreamWriter` says; also writes the call's log line."""
        finished = [self._finished[index] for index in range(len(self._requests))]
        log_success(self._call, finished)
        return self._writer.end(finished, stream_comment(self._call, finished))

    def failed(self, error: KagamiError) -> bytes:
        """As `sse.StreamWriter` says."""
        return self._start() + self._writer.failed(error)

    def _all(self, backlog: sse.Backlog) -> bytes:
        return b"".join([self._written(index, events) for index, events in backlog])

    def _written(self, index: int, events: Events) -> bytes:
        if (end := events[-1].end) is not None:
            self._finished[index] = Finished(self._requests[index], self._writer.counted(end))
        return self._start() + b"".join([self._event(index, event) for event in events])

    def _start(self) -> bytes:
        if self._has_started:
            return b""
        self._has_started = True
        return self._writer.start(self._requests)
