"""Writes answers of OpenAI's routes: the frame of whole answers and chunks, usage, end marker.

The choices inside the frame differ between the routes: a `ChoiceWriter` writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from msgspec.structs import replace as changed

from kagami_proto.errors import KagamiError
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.openai import (
    ChatChoice,
    CompletionChoice,
    CompletionTokensDetails,
    OpenAIAnswer,
    OpenAIRequest,
    PromptTokensDetails,
    Usage,
)
from kagami_router.api.web.app_state import AppState
from kagami_router.api.web.call import Finished, HttpCall
from kagami_router.api.web.errors import Family, error_event
from kagami_router.api.web.sse import DONE
from kagami_router.request.values import End, FinishReason, StreamEvent, ValidRequest
from kagami_router.serving.infer import Generation

FINISH_REASON: Mapping[FinishReason, str] = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}
_FINISH_REASON_JSON = {reason: encode(text) for reason, text in FINISH_REASON.items()}
_NULL = b"null"


@dataclass(frozen=True, slots=True)
class Identity:
    """The fields that every answer and every chunk of a call have in common."""

    id: str
    created: int
    """Seconds since the epoch."""
    model: str
    system_fingerprint: str

    @classmethod
    def of(cls, prefix: str, call: HttpCall, state: AppState, model: str | None) -> "Identity":
        """The identity of a call that asked for `model`; `prefix` begins its id."""
        return cls(
            f"{prefix}-{call.id}", call.created, state.served_model(model), state.system_fingerprint
        )


@dataclass(frozen=True, slots=True)
class Form:
    """How a route writes its answers."""

    kind: str
    chunk_kind: str
    num_samples: int
    """Generations for each prompt"""
    wants_usage: bool
    """A stream ends with a chunk of usage."""
    has_own_usage: bool
    """Without `stream_options`, the last chunk of each choice has its usage, as in TGI."""
    shows_output: bool = True
    """False: only the prompt's logprobs are wanted; the output is neither shown nor counted."""
    end_marker: bytes = DONE


class ChoiceWriter(Protocol):
    """Writes what differs between the routes: the choices of an answer."""

    @property
    def text_choice(self) -> tuple[bytes, bytes] | None:
        """The JSON of a choice before its text (`%d` is its index) and after it.

        It is used for chunks that are neither the first nor the last of their choice. None:
        `chunk_choices` writes these too.
        """

    def choices(
        self, generations: Sequence[Generation]
    ) -> list[ChatChoice] | list[CompletionChoice]:
        """The choices of a whole answer."""

    def chunk_choices(
        self, index: int, event: StreamEvent, finish_reason: bytes
    ) -> Sequence[bytes]:
        """The JSON of one choice for each chunk of an event; `finish_reason` is JSON."""

    @property
    def reasoning_tokens(self) -> Sequence[int] | None:
        """Of each choice until now; None = the model does not think."""


class OpenAIWriter:
    """Writes one answer, as `respond.AnswerWriter` says; common parts are encoded once."""

    def __init__(self, identity: Identity, form: Form, choices: ChoiceWriter) -> None:
        self._identity = identity
        self._form = form
        self._choices = choices
        self._head = b"data: " + _chunk_head(form.chunk_kind, identity)
        self._requests: Sequence[ValidRequest] = ()
        # Index of a choice that has begun -> the bytes before and after its text.
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def whole(self, generations: Sequence[Generation]) -> OpenAIAnswer[Any]:
        """All choices and the usage of the call."""
        if not self._form.shows_output:
            generations = [
                replace(one, tokens=(), top_tokens=(), end=self.counted(one.end))
                for one in generations
            ]
        choices = self._choices.choices(generations)
        finished = [Finished(one.request, one.end) for one in generations]
        usage = self._usage(finished)
        which = self._identity
        return OpenAIAnswer(
            self._form.kind,
            which.id,
            which.created,
            which.model,
            which.system_fingerprint,
            choices,
            usage,
        )

    def chosen(self, generations: Sequence[Generation]) -> Sequence[Generation]:
        """Every generation counts."""
        return generations

    def counted(self, end: End) -> End:
        """The end; without the output if the output is not shown."""
        if self._form.shows_output:
            return end
        return replace(end, finish_reason=FinishReason.LENGTH, generated_text="", num_generated=0)

    def start(self, requests: Sequence[ValidRequest]) -> bytes:
        """Nothing precedes the first chunk."""
        self._requests = requests
        return b""

    def event(self, index: int, event: StreamEvent) -> bytes:
        """The chunks of one event."""
        if event.end is None and (frame := self._frames.get(index)):
            return b"".join((frame[0], encode(text_of(event)), frame[1]))
        chunks = self._full_chunks(index, event)
        if (text_choice := self._choices.text_choice) is not None:
            before, behind = text_choice
            self._frames[index] = (
                b'%b"choices":[%b' % (self._head, before % index),
                behind + b'],"usage":null}\n\n',
            )
        return chunks

    def end(self, finished: Sequence[Finished], comment: bytes) -> bytes:
        """Usage if wanted, then the end marker, where clients stop reading."""
        if not self._form.wants_usage:
            return comment + self._form.end_marker
        usage = encode(self._usage(finished))
        usage_chunk = self._head + b'"choices":[],"usage":%b}\n\n' % usage
        return usage_chunk + comment + self._form.end_marker

    def _usage(self, finished: Sequence[Finished]) -> Usage:
        usage = _usage_of(finished, self._form.num_samples)
        if (thought := self._choices.reasoning_tokens) is None:
            return usage
        return changed(usage, completion_tokens_details=CompletionTokensDetails(sum(thought)))

    def failed(self, error: KagamiError) -> bytes:
        """The error in OpenAI's format, and the end marker."""
        return error_event(error, Family.OPENAI)

    def _full_chunks(self, index: int, event: StreamEvent) -> bytes:
        finish_reason, usage = _NULL, _NULL
        if event.end is not None:
            finished = Finished(self._requests[index], self.counted(event.end))
            finish_reason = _FINISH_REASON_JSON[finished.end.finish_reason]
            if self._form.has_own_usage and not self._form.wants_usage:
                usage = encode(_usage_of([finished], 1))
        return b"".join(
            b'%b"choices":[%b],"usage":%b}\n\n' % (self._head, choice, usage)
            for choice in self._choices.chunk_choices(index, event, finish_reason)
        )


def text_of(event: StreamEvent) -> str:
    """The text that a chunk adds; special tokens add none."""
    return event.tail if event.token.special else event.token.text + event.tail


def wants_usage(body: OpenAIRequest) -> bool:
    """Whether the stream ends with a chunk of usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _usage_of(finished: Sequence[Finished], num_samples: int) -> Usage:
    """Tokens of a call; each prompt counts once, however many samples it has.

    The samples of a prompt may find each other's blocks in the cache, so the smallest count of
    cached tokens is reported.
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


def _chunk_head(kind: str, identity: Identity) -> bytes:
    """The common beginning of all chunks of a stream: a JSON object, open before `choices`."""
    return b'{"object":%b,"id":%b,"created":%d,"model":%b,"system_fingerprint":%b,' % (
        encode(kind),
        encode(identity.id),
        identity.created,
        encode(identity.model),
        encode(identity.system_fingerprint),
    )
