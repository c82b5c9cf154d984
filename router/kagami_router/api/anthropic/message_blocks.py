"""Writes answers of /v1/messages: blocks of text and of calls, as one body or as events."""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, get_args

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from kagami_proto.errors import KagamiError
from kagami_router.api.answering.conversation import read_deltas
from kagami_router.api.schemas import messages as schema
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.web.call import Finished
from kagami_router.api.web.errors import Family, error_event
from kagami_router.api.web.sse import named_event
from kagami_router.request.values import End, FinishReason, StreamEvent, ValidRequest
from kagami_router.serving.infer import Generation
from kagami_router.tools.deltas import (
    AnswerParser,
    CallArguments,
    CallStart,
    Delta,
    ReasoningDelta,
    TextDelta,
)

OutBlock = schema.ThinkingBlock | schema.TextBlock | schema.CallBlock

_NO_INPUT = Raw(b"{}")
_EMPTY_TEXT = schema.TextBlock("")
_NO_THOUGHT = schema.ThinkingBlock()
_NAMES: Mapping[type[schema.MessageEvent], str] = {
    kind: str(kind.__struct_config__.tag) for kind in get_args(schema.MessageEvent)
}
_STOP_REASONS: Mapping[FinishReason, schema.StopReason] = {
    FinishReason.EOS_TOKEN: "end_turn",
    FinishReason.STOP_SEQUENCE: "stop_sequence",
    FinishReason.LENGTH: "max_tokens",
}


class MessageWriter:
    """Writes one answer, as `respond.AnswerWriter` says."""

    def __init__(self, message_id: str, model: str, max_tokens: int, parser: AnswerParser) -> None:
        self._id = message_id
        self._model = model
        self._max_tokens = max_tokens
        self._parser = parser
        self._index = -1  # of the open block
        self._open: type[OutBlock] | None = None
        self._thoughts: list[str] = []

    def whole(self, generations: Sequence[Generation]) -> schema.MessageAnswer:
        """The answer in one piece."""
        (generation,) = generations
        content = _blocks(read_deltas(generation, self._parser))
        stop = self._stop(generation.request, generation.end)
        usage = _usage(generation.request, generation.end)
        return replace(
            self._empty(usage),
            content=content,
            stop_reason=stop.stop_reason,
            stop_sequence=stop.stop_sequence,
        )

    def chosen(self, generations: Sequence[Generation]) -> Sequence[Generation]:
        """The only one."""
        return generations

    def counted(self, end: End) -> End:
        """The end, unchanged."""
        return end

    def start(self, requests: Sequence[ValidRequest]) -> bytes:
        """The events before the first token."""
        (request,) = requests
        message = self._empty(_usage(request, None))
        return _written((schema.MessageStart(message), schema.Ping()))

    def event(self, index: int, event: StreamEvent) -> bytes:
        """The events that one token adds."""
        deltas = self._parser.push(event.token, event.tail)
        if event.end is not None:
            is_cut = event.end.finish_reason is FinishReason.LENGTH
            deltas += self._parser.finish(is_cut=is_cut)
        return _written(said for delta in deltas for said in self._said(delta))

    def end(self, finished: Sequence[Finished], comment: bytes) -> bytes:
        """The events that close the last block and give stop reason and usage."""
        ((request, end),) = finished
        events: list[schema.MessageEvent] = []
        if self._open in (None, schema.ThinkingBlock):
            events += self._opened(_EMPTY_TEXT)
        return comment + _written(
            (
                *events,
                *self._closed(),
                schema.MessageDelta(self._stop(request, end), _usage(request, end)),
                schema.MessageStop(),
            )
        )

    def failed(self, error: KagamiError) -> bytes:
        """The error that ends a stream."""
        return error_event(error, Family.ANTHROPIC)

    def _said(self, delta: Delta) -> list[schema.MessageEvent]:
        match delta:
            case ReasoningDelta(text):
                self._thoughts.append(text)
                opened = [] if self._open is schema.ThinkingBlock else self._opened(_NO_THOUGHT)
                return [*opened, schema.ContentBlockDelta(self._index, schema.ThinkingDelta(text))]
            case CallStart(_, call_id, name):
                return self._opened(schema.CallBlock(_call_id(call_id), name, _NO_INPUT))
            case CallArguments(_, text):
                return [schema.ContentBlockDelta(self._index, schema.InputJsonDelta(text))]
            case TextDelta(text):
                opened = [] if self._open is schema.TextBlock else self._opened(_EMPTY_TEXT)
                return [*opened, schema.ContentBlockDelta(self._index, schema.TextDelta(text))]

    def _opened(self, block: OutBlock) -> list[schema.MessageEvent]:
        before = self._closed()
        self._index += 1
        self._open = type(block)
        return [*before, schema.ContentBlockStart(self._index, block)]

    def _closed(self) -> list[schema.MessageEvent]:
        """The events that close the open block, if there is one."""
        if self._open is None:
            return []
        closed: list[schema.MessageEvent] = [schema.ContentBlockStop(self._index)]
        if self._open is schema.ThinkingBlock:
            signature = schema.SignatureDelta(_signature("".join(self._thoughts)))
            closed.insert(0, schema.ContentBlockDelta(self._index, signature))
        return closed

    def _empty(self, usage: schema.MessageUsage) -> schema.MessageAnswer:
        return schema.MessageAnswer(self._id, "assistant", self._model, [], None, None, usage)

    def _stop(self, request: ValidRequest, end: End) -> schema.Stop:
        """The stop reason. An answer cut by a limit says so, with or without calls.

        It also says whether the context was the limit.
        """
        reason = end.finish_reason
        if reason is FinishReason.LENGTH and request.stopping.max_new_tokens < self._max_tokens:
            return schema.Stop("model_context_window_exceeded", None)
        if reason is not FinishReason.LENGTH and self._parser.num_calls:
            return schema.Stop("tool_use", None)
        return schema.Stop(_STOP_REASONS[reason], end.stop)


def _blocks(deltas: Iterable[Delta]) -> list[OutBlock]:
    """The answer's blocks in order; at least one, because clients read the first."""
    groups: list[tuple[type[OutBlock], CallStart | None, list[str]]] = []
    for delta in deltas:
        match delta:
            case CallStart():
                groups.append((schema.CallBlock, delta, []))
            case CallArguments(_, text):
                groups[-1][2].append(text)
            case ReasoningDelta(text) | TextDelta(text):
                is_text = isinstance(delta, TextDelta)
                kind = schema.TextBlock if is_text else schema.ThinkingBlock
                if not groups or groups[-1][0] is not kind:
                    groups.append((kind, None, []))
                groups[-1][2].append(text)
    blocks = [_block(kind, call, "".join(pieces)) for kind, call, pieces in groups]
    # Clients read the first text.
    return (
        blocks
        if any(kind is not schema.ThinkingBlock for kind, _, _ in groups)
        else [
            *blocks,
            _EMPTY_TEXT,
        ]
    )


def _block(kind: type[OutBlock], call: CallStart | None, text: str) -> OutBlock:
    if call is not None:
        return schema.CallBlock(_call_id(call.id), call.name, _input(text))
    if kind is schema.ThinkingBlock:
        return schema.ThinkingBlock(text, _signature(text))
    return schema.TextBlock(text)


def _signature(thought: str) -> str:
    return b64encode(sha256(thought.encode()).digest()).decode()


def _input(text: str) -> Raw:
    """The arguments as the model wrote them if they are a JSON object, else `{}`."""
    try:
        msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return _NO_INPUT
    return Raw(text.encode())


def _call_id(call_id: str) -> str:
    return f"toolu_{call_id}"


def _usage(request: ValidRequest, end: End | None) -> schema.MessageUsage:
    """Anthropic's `input_tokens` excludes cached tokens; hits are unknown before the end."""
    num_cached = end.cached_tokens if end else 0
    return schema.MessageUsage(
        input_tokens=len(request.prompt_ids) - num_cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=num_cached,
        output_tokens=end.num_generated if end else 0,
    )


def _written(events: Iterable[schema.MessageEvent]) -> bytes:
    return b"".join([named_event(_NAMES[type(event)], encode(event)) for event in events])


PING = _written((schema.Ping(),))
"""What a stream says while a long prompt is computed: clients wait for events, not for comments"""
