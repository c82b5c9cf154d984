"""Turns an answer into the items of a Response, and the events of a stream.

Whole answers and streams both come from here; a whole answer drops the events.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET

from kagami_router.api.answering.logprobs import chat_logprobs
from kagami_router.api.responses.tools import Origin, input_of
from kagami_router.api.schemas.openai import ChatLogprob
from kagami_router.api.schemas.response_events import (
    CallArgumentsDelta,
    CallArgumentsDone,
    ContentPartAdded,
    ContentPartDone,
    CustomInputDelta,
    CustomInputDone,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    OutputTextDone,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseEvent,
)
from kagami_router.api.schemas.responses import (
    OutputCall,
    OutputCustomCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
)
from kagami_router.request.values import FinishReason, StreamEvent
from kagami_router.text.detokenize import TextDecoder
from kagami_router.tools.deltas import (
    AnswerParser,
    CallArguments,
    CallStart,
    Delta,
    ReasoningDelta,
    TextDelta,
)

IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"
_PART = 0  # every item of text has one part
_PREFIXES: Mapping[type[OutputItem], str] = {
    OutputReasoning: "rs",
    OutputMessage: "msg",
    OutputCall: "fc",
    OutputCustomCall: "ctc",
}


@dataclass(slots=True, eq=False)
class _Growing:
    """The item that is not complete yet."""

    id: str
    index: int
    kind: type[OutputItem]
    call: CallStart | None
    origin: Origin | None = None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[ChatLogprob] = field(default_factory=list)

    def item(self, status: str) -> OutputItem:
        text = "".join(self.pieces)
        if self.call is not None:
            origin = self.origin
            name, namespace = (
                (self.call.name, UNSET) if origin is None else (origin.name, origin.namespace)
            )
            if origin is not None and origin.is_custom:
                said = input_of(text)
                return OutputCustomCall(self.id, self.call.id, name, said, status, namespace)
            return OutputCall(self.id, self.call.id, name, text, status, namespace)
        is_empty = status == IN_PROGRESS
        if self.kind is OutputReasoning:
            return OutputReasoning(self.id, [], [] if is_empty else [ReasoningText(text)], status)
        part = OutputText(text, [], self.logprobs)
        return OutputMessage(self.id, status, "assistant", [] if is_empty else [part])


class Output:
    """Reads one answer: `push` every event. After the last one `items` is complete."""

    def __init__(
        self,
        answer_id: str,
        parser: AnswerParser,
        decoder: TextDecoder | None,
        origins: Mapping[str, Origin],
    ) -> None:
        """`origins` has the tools that are no plain functions, by name."""
        self._origins = origins
        self._answer_id = answer_id
        self._parser = parser
        self._decoder = decoder  # None: no logprobs
        self._logprobs: list[ChatLogprob] = []  # of tokens whose text is still held back
        self._growing: _Growing | None = None
        self._num_events = 0
        self.items: list[OutputItem] = []

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of reasoning until now."""
        return self._parser.num_reasoning_tokens

    def next_number(self) -> int:
        """Count one more event; returns its number, from 0."""
        number = self._num_events
        self._num_events += 1
        return number

    def push(self, event: StreamEvent) -> list[ResponseEvent]:
        """The events that this token adds; the last token also releases the text held back."""
        token, end = event.token, event.end
        if self._decoder is not None and not token.special:
            self._logprobs += chat_logprobs(self._decoder, [(token, event.top_tokens)]).content
        deltas = self._parser.push(token, event.tail)
        if end is None:
            return [one for delta in deltas for one in self._add(delta)]
        is_cut = end.finish_reason is FinishReason.LENGTH
        deltas += self._parser.finish(is_cut=is_cut)
        events = [one for delta in deltas for one in self._add(delta)]
        if self._growing is None:  # the answer is empty: one empty message
            events += self._open(OutputMessage)
        return [*events, *self._close(is_cut=is_cut)]

    def _add(self, delta: Delta) -> Iterator[ResponseEvent]:
        match delta:
            case ReasoningDelta(text):
                self._logprobs.clear()  # thoughts have none
                yield from self._opened(OutputReasoning)
                growing = self._known()
                growing.pieces.append(text)
                at = (growing.id, growing.index, _PART)
                yield ReasoningTextDelta(self.next_number(), *at, text)
            case TextDelta(text):
                yield from self._add_text(text)
            case CallStart():
                self._logprobs.clear()  # calls have none
                yield from self._close()
                origin = self._origins.get(delta.name)
                is_custom = origin is not None and origin.is_custom
                yield from self._open(OutputCustomCall if is_custom else OutputCall, delta)
            case CallArguments(_, text):
                self._logprobs.clear()
                growing = self._known()
                growing.pieces.append(text)
                if growing.kind is OutputCall:
                    yield CallArgumentsDelta(self.next_number(), growing.id, growing.index, text)

    def _add_text(self, text: str) -> Iterator[ResponseEvent]:
        yield from self._opened(OutputMessage)
        growing = self._known()
        logprobs, self._logprobs = self._logprobs, []
        growing.pieces.append(text)
        growing.logprobs += logprobs
        yield OutputTextDelta(self.next_number(), growing.id, growing.index, _PART, text, logprobs)

    def _known(self) -> _Growing:
        assert self._growing is not None, "arguments follow the start of their call"
        return self._growing

    def _opened(self, kind: type[OutputItem]) -> Iterator[ResponseEvent]:
        """The events that open an item of text, unless it is open already."""
        if self._growing is None or self._growing.kind is not kind:
            yield from self._close()
            yield from self._open(kind)

    def _open(
        self, kind: type[OutputItem], call: CallStart | None = None
    ) -> Iterator[ResponseEvent]:
        index = len(self.items)
        origin = self._origins.get(call.name) if call else None
        item_id = f"{_PREFIXES[kind]}_{self._answer_id}{index:02x}"
        growing = _Growing(item_id, index, kind, call, origin)
        self._growing = growing
        yield OutputItemAdded(self.next_number(), index, growing.item(IN_PROGRESS))
        if call is None:
            is_text = kind is OutputMessage
            part = OutputText("", [], []) if is_text else ReasoningText("")
            yield ContentPartAdded(self.next_number(), growing.id, index, _PART, part)

    def _close(self, *, is_cut: bool = False) -> Iterator[ResponseEvent]:
        growing = self._growing
        if growing is None:
            return
        self._growing = None
        item = growing.item(COMPLETED)
        if is_cut and not (isinstance(item, OutputCall) and _is_json(item.arguments)):
            item = growing.item(INCOMPLETE)
        self.items.append(item)
        number, at = self.next_number, (growing.id, growing.index)
        match item:
            case OutputCall():
                yield CallArgumentsDone(number(), *at, item.name, item.arguments)
            case OutputCustomCall():
                yield CustomInputDelta(number(), *at, item.input)
                yield CustomInputDone(number(), *at, item.input)
            case OutputReasoning(content=[thought]):
                yield ReasoningTextDone(number(), *at, _PART, thought.text)
                yield ContentPartDone(number(), *at, _PART, thought)
            case OutputMessage(content=[part]):
                yield OutputTextDone(number(), *at, _PART, part.text, part.logprobs)
                yield ContentPartDone(number(), *at, _PART, part)
            case _:
                raise AssertionError("an item that is complete has one part")
        yield OutputItemDone(number(), growing.index, item)


def _is_json(text: str) -> bool:
    """Whether `text`, the arguments of a call, is complete JSON."""
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
