"""One generation for one call, whole or as a stream of named events.

What /v1/responses and /v1/messages share: each says by its `AnswerWriter` how it writes an answer;
permits, headers, the line in the log and failures are here.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from kagami_proto.errors import KagamiError
from kagami_router.api.native.service import front_of, json_response
from kagami_router.api.openai.answers import INLINE_TOKENS
from kagami_router.api.web import sse
from kagami_router.api.web.call import (
    Call,
    Finished,
    log_success,
    stream_comment,
    stream_headers,
    whole_headers,
)
from kagami_router.request.validation import GenerationParams
from kagami_router.request.values import StreamEvent, ValidRequest
from kagami_router.serving.infer import Events, Generation


class AnswerWriter(Protocol):
    """How a route writes one answer: `whole`, or `start`, `events` of each turn, and `end`."""

    def whole(self, generation: Generation) -> msgspec.Struct:
        """The answer in one piece; long ones are written in a thread."""
        ...

    def start(self, request: ValidRequest) -> bytes:
        """What a stream begins with; it leaves together with the first turn."""
        ...

    def events(self, turn: Sequence[StreamEvent]) -> bytes:
        """What one turn adds."""
        ...

    def end(self) -> bytes:
        """What a stream ends with, after the turn that brought the generation's end."""
        ...

    def failed(self, error: KagamiError) -> bytes:
        """What it ends with instead when the generation fails, after `start` and any turns."""
        ...


async def respond(
    request: web.Request,
    call: Call,
    *,
    prompt: str,
    params: GenerationParams,
    is_stream: bool,
    writer: AnswerWriter,
) -> web.StreamResponse:
    """Generate from a prompt that a template has written."""
    front = front_of(request)
    with front.infer.permits():
        valid = await front.validation.validate(prompt, params, add_special_tokens=False)
        if is_stream:
            stream = _Stream(call, valid, writer)
            return await sse.respond(
                request,
                front.infer.stream(valid, call.tally),
                render=stream.render,
                last=stream.last,
                failed=stream.failed,
                headers=stream_headers(front.compute_type, call, [valid]),
            )
        generation = await front.infer.collect(valid, call.tally)
        if len(generation.tokens) <= INLINE_TOKENS:
            answer = writer.whole(generation)
        else:
            answer = await asyncio.to_thread(writer.whole, generation)
    finished = [Finished(valid, generation.end)]
    log_success(call, finished)
    return json_response(
        answer, **whole_headers(front.compute_type, [valid.prompt_text], call, finished)
    )


class _Stream:
    """Puts the start before the first turn, and the comment before the end."""

    def __init__(self, call: Call, request: ValidRequest, writer: AnswerWriter) -> None:
        self._call = call
        self._request = request
        self._writer = writer
        self._has_started = False
        self._finished: list[Finished] = []

    def render(self, turn: Events) -> bytes:
        start = self._start()
        if (end := turn[-1].end) is not None:
            self._finished = [Finished(self._request, end)]
        return start + self._writer.events(turn)

    def last(self) -> bytes:
        log_success(self._call, self._finished)
        return stream_comment(self._call, self._finished) + self._writer.end()

    def failed(self, error: KagamiError) -> bytes:
        return self._start() + self._writer.failed(error)

    def _start(self) -> bytes:
        if self._has_started:
            return b""
        self._has_started = True
        return self._writer.start(self._request)
