"""Writes the choices of /v1/chat/completions: text, calls, logprobs, finish reasons."""

from collections.abc import Sequence

from msgspec import UNSET
from msgspec.structs import replace

from kagami_router.api.answering.conversation import Prepared, read_answer
from kagami_router.api.answering.logprobs import chat_logprobs
from kagami_router.api.openai.answer_writer import FINISH_REASON, text_of
from kagami_router.api.openai.tgi_client import TgiDeltas
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.openai import (
    ChatChoice,
    ChatDelta,
    ChatMessage,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
)
from kagami_router.request.values import FinishReason, StreamEvent
from kagami_router.serving.infer import Generation
from kagami_router.text.detokenize import TextDecoder
from kagami_router.tools.deltas import (
    AnswerParser,
    CallArguments,
    CallStart,
    Delta,
    ReasoningDelta,
    TextDelta,
)

_NULL = b"null"
_DELTA = (b'{"content":', b"}")
_TOOL_CALLS = "tool_calls"
_TOOL_CALLS_JSON = encode(_TOOL_CALLS)


class ChatChoices:
    """Writes the choices of one chat; in a stream the first chunk of each has the role.

    Without tools, each token is one chunk. With tools, each delta of the parser is one chunk, and
    an answer with calls ends with one more chunk for the finish reason.
    """

    def __init__(
        self, prepared: Prepared, decoder: TextDecoder | None, tgi: TgiDeltas | None = None
    ) -> None:
        """Without `decoder` there are no logprobs; `tgi` writes the deltas of TGI's clients."""
        self._prepared = prepared
        self._decoder = decoder
        self._tgi = tgi
        self._parsers: dict[int, AnswerParser] = {}
        self._started: set[int] = set()
        self._thought: dict[int, int] = {}  # tokens of reasoning, by choice

    @property
    def text_choice(self) -> tuple[bytes, bytes] | None:
        """As `ChoiceWriter` says."""
        if self._decoder is not None or not self._prepared.reading.is_plain:
            return None
        before, behind = self._tgi.text if self._tgi else _DELTA
        return b'{"index":%d,"delta":' + before, behind + b',"logprobs":null,"finish_reason":null}'

    @property
    def reasoning_tokens(self) -> Sequence[int] | None:
        """As `ChoiceWriter` says."""
        return list(self._thought.values()) if self._prepared.reading.may_think else None

    def choices(self, generations: Sequence[Generation]) -> list[ChatChoice]:
        """The choices of a whole answer."""
        return [self._choice(index, generation) for index, generation in enumerate(generations)]

    def _choice(self, index: int, generation: Generation) -> ChatChoice:
        logprobs = None
        if self._decoder is not None:
            logprobs = chat_logprobs(self._decoder, generation.tokens_with_alternatives())
        answer = read_answer(generation, self._prepared.new_parser())
        calls = [
            ToolCall(call.id, "function", FunctionCall(call.name, call.arguments))
            for call in answer.calls
        ]
        self._thought[index] = answer.num_reasoning_tokens
        reason = generation.end.finish_reason
        thought = UNSET if answer.reasoning is None else answer.reasoning
        return ChatChoice(
            index,
            ChatMessage("assistant", answer.text, calls or UNSET, thought, thought),
            logprobs,
            _TOOL_CALLS if _ends_in_calls(len(calls), reason) else FINISH_REASON[reason],
        )

    def chunk_choices(self, index: int, event: StreamEvent, finish_reason: bytes) -> list[bytes]:
        """The choices of one event's chunks."""
        logprobs = _NULL
        if self._decoder is not None:
            logprobs = encode(chat_logprobs(self._decoder, [(event.token, event.top_tokens)]))
        if self._prepared.reading.is_plain:
            deltas = [ChatDelta(content=text_of(event))]
        else:
            if index not in self._parsers:
                self._parsers[index] = self._prepared.new_parser()
            parser = self._parsers[index]
            deltas = _deltas(parser, event)
            self._thought[index] = parser.num_reasoning_tokens
            if event.end and _ends_in_calls(parser.num_calls, event.end.finish_reason):
                finish_reason = _TOOL_CALLS_JSON
            if not deltas and self._decoder is not None:
                deltas = [ChatDelta()]  # each token has its logprobs
        if deltas and index not in self._started:
            self._started.add(index)
            deltas[0] = replace(
                deltas[0],
                role="assistant",
                content=None if deltas[0].content is UNSET else deltas[0].content,
            )
        last = len(deltas) - 1
        return [
            b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}'
            % (
                index,
                self._tgi.written(index, delta) if self._tgi else encode(delta),
                _NULL if number else logprobs,
                finish_reason if number == last else _NULL,
            )
            for number, delta in enumerate(deltas)
        ]


def _ends_in_calls(num_calls: int, reason: FinishReason) -> bool:
    """Whether the finish reason is `tool_calls`; an answer cut by a limit keeps `length`."""
    return num_calls > 0 and reason is not FinishReason.LENGTH


def _deltas(parser: AnswerParser, event: StreamEvent) -> list[ChatDelta]:
    """The deltas of one event; the last event has at least one, for the finish reason."""
    said = parser.push(event.token, event.tail)
    if event.end is None:
        return [_delta(one) for one in said]
    said += parser.finish(is_cut=event.end.finish_reason is FinishReason.LENGTH)
    deltas = [_delta(one) for one in said]
    if parser.num_calls:
        return [*deltas, ChatDelta()]
    return deltas or [ChatDelta(content="")]


def _delta(said: Delta) -> ChatDelta:
    match said:
        case ReasoningDelta(text):
            return ChatDelta(reasoning_content=text, reasoning=text)
        case TextDelta(text):
            return ChatDelta(content=text)
        case CallStart(index, call_id, name):
            function = FunctionCallDelta(name, "")
            return ChatDelta(tool_calls=[ToolCallDelta(index, call_id, "function", function)])
        case CallArguments(index, text):
            function = FunctionCallDelta(arguments=text)
            return ChatDelta(tool_calls=[ToolCallDelta(index, function=function)])
