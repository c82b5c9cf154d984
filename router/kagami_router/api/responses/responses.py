"""/v1/responses, OpenAI's newer form of a chat, and its token count; nothing is stored."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web
from msgspec.structs import replace as changed

from kagami_proto.errors import InvalidRequest, KagamiError, MalformedBody
from kagami_proto.values import Grammar
from kagami_router.api.answering import conversation, grammars, thinking
from kagami_router.api.answering.conversation import Conversation, Prepared
from kagami_router.api.answering.openai_params import read_params
from kagami_router.api.answering.respond import Asked, respond
from kagami_router.api.answering.tokenizing import respond_tokens
from kagami_router.api.responses import items, tools
from kagami_router.api.responses.output import COMPLETED, IN_PROGRESS, INCOMPLETE, Output
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.openai import OpenAIRequest
from kagami_router.api.schemas.response_events import (
    ResponseCompleted,
    ResponseCreated,
    ResponseErrorEvent,
    ResponseEvent,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
)
from kagami_router.api.schemas.responses import (
    IncompleteDetails,
    InputTokens,
    InputTokensDetails,
    OutputTokensDetails,
    Reasoning,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    TextEcho,
    TextFormat,
    TextSettings,
)
from kagami_router.api.web import sse
from kagami_router.api.web.app_state import AppState, state_of
from kagami_router.api.web.call import Finished, HttpCall
from kagami_router.api.web.caller import caller_of
from kagami_router.api.web.errors import error_kind, error_text
from kagami_router.api.web.left_out import leave_out
from kagami_router.api.web.middleware import read_body
from kagami_router.request.validation import GenerationParams, Validation
from kagami_router.request.values import End, FinishReason, StreamEvent, ValidRequest
from kagami_router.serving.infer import Generation
from kagami_router.text.chat_template import PromptOptions
from kagami_router.text.detokenize import TextDecoder
from kagami_router.tools import offers

_BODY = msgspec.json.Decoder(ResponsesRequest)
_LOGPROBS = "message.output_text.logprobs"
_TEXT = TextFormat("text")
_REFUSED: Mapping[str, str] = {
    "background": "answers are made while the client waits",
    "conversation": "no conversation is kept; send its items as `input`",
    "previous_response_id": "no response is kept; send the items so far as `input`",
    "prompt": "no prompt is kept; send its text as `instructions` or `input`",
}


async def responses(request: web.Request) -> web.StreamResponse:
    """One Response, or the events in which it grows."""
    body = await _read(request)
    state, call = state_of(request), HttpCall.of(request)
    params = _params(state.validation, body)  # before the prompt, which costs more to make
    offered = _offered(body)
    leave_out(request, [*offered.left_out, *items.left_out(body)])
    prepared = await conversation.prepare(
        state.chat_format, state.validation, _conversation(body, offered), caller_of(request)
    )
    params = prepared.params(params)
    writer = ResponseWriter(
        _begun(state.served_model(body.model), call, body),
        prepared,
        state.decoder if _has_logprobs(body) else None,
        offered.origins,
    )
    asked = Asked(prepared.prompt, params, adds_special_tokens=False, field="input")
    return await respond(request, call, [asked], writer, is_stream=bool(body.stream))


async def input_tokens(request: web.Request) -> web.StreamResponse:
    """How long the prompt of such a Response is."""
    body = await _read(request)

    async def answer(state: AppState) -> InputTokens:
        prompt = await conversation.prompt(state.chat_format, _conversation(body, _offered(body)))
        return InputTokens(await state.validation.count_tokens(prompt, "input"))

    return await respond_tokens(request, answer)


async def _read(request: web.Request) -> ResponsesRequest:
    body = await read_body(request, _BODY)
    for name, reason in _REFUSED.items():
        if getattr(body, name):
            raise InvalidRequest(f"`{name}` is not supported: {reason}", field=name)
    return body


def _has_logprobs(body: ResponsesRequest) -> bool:
    return _LOGPROBS in (body.include or ()) or bool(body.top_logprobs)


def _params(validation: Validation, body: ResponsesRequest) -> GenerationParams:
    top_logprobs = body.top_logprobs or 0
    max_top = validation.limits.max_top_n_tokens
    if top_logprobs > max_top:
        raise InvalidRequest(
            f"`top_logprobs` must be >= 0 and <= {max_top}. Given: {top_logprobs}",
            field="top_logprobs",
        )
    if body.max_output_tokens == 0:
        raise InvalidRequest(
            "`max_output_tokens` must be strictly positive", field="max_output_tokens"
        )
    given = OpenAIRequest(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        stop=body.stop,
        seed=body.seed,
    )
    return read_params(validation, given, body.max_output_tokens, top_logprobs)


def _offered(body: ResponsesRequest) -> tools.Offered:
    is_none = items.read_choice(body.tool_choice) == offers.NONE
    return tools.read_tools(() if is_none else body.tools or ())


def _conversation(body: ResponsesRequest, offered: tools.Offered) -> Conversation:
    return Conversation(
        messages=items.read_messages(body),
        tools=offered.tools,
        choice=items.read_choice(body.tool_choice),
        is_parallel=body.parallel_tool_calls is not False,
        grammar=_grammar(_format(body)),
        options=_options(body),
    )


def _options(body: ResponsesRequest) -> PromptOptions:
    """Options that answer an assistant's message at the end, not continue it, as OpenAI does."""
    effort = body.reasoning.effort if body.reasoning else None
    return PromptOptions(add_generation_prompt=True, variables=thinking.variables(effort))


def _format(body: ResponsesRequest) -> TextFormat:
    return (body.text or TextSettings()).format or _TEXT


def _grammar(given: TextFormat) -> Grammar | None:
    if given.type == "text":
        return None
    if given.type == "json_object":
        return grammars.json_schema({"type": "object"})
    if given.schema is None:
        raise MalformedBody("text.format: missing field `schema`", field="text.format")
    return grammars.json_schema(given.schema)


def _begun(model: str, call: HttpCall, body: ResponsesRequest) -> ResponseObject:
    """The Response before its first token: identity and settings."""
    text = body.text or TextSettings()
    return ResponseObject(
        id=f"resp_{call.id}",
        created_at=call.created,
        status=IN_PROGRESS,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=Reasoning(body.reasoning.effort if body.reasoning else None),
        safety_identifier=body.safety_identifier,
        temperature=_or_one(body.temperature),
        text=TextEcho(_format(body), text.verbosity),
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=_or_one(body.top_p),
        user=body.user,
        metadata=body.metadata or {},
    )


def _or_one(given: float | None) -> float:
    return 1.0 if given is None else given


class ResponseWriter:
    """Writes one Response, as `respond.AnswerWriter` says."""

    def __init__(
        self,
        begun: ResponseObject,
        prepared: Prepared,
        decoder: TextDecoder | None,
        origins: Mapping[str, tools.Origin],
    ) -> None:
        self._begun = begun
        answer_id = begun.id.removeprefix("resp_")
        self._output = Output(answer_id, prepared.new_parser(), decoder, origins)
        self._num_input = 0

    def whole(self, generations: Sequence[Generation]) -> ResponseObject:
        """The Response in one piece."""
        (generation,) = generations
        self._num_input = len(generation.request.prompt_ids)
        last = len(generation.tokens) - 1
        spoken = zip(generation.tokens_with_alternatives(), generation.tails, strict=True)
        for number, ((token, alternatives), tail) in enumerate(spoken):
            end = generation.end if number == last else None
            self._output.push(StreamEvent(token, alternatives, tail, end))
        return self._finished(generation.end)

    def chosen(self, generations: Sequence[Generation]) -> Sequence[Generation]:
        """The only one."""
        return generations

    def counted(self, end: End) -> End:
        """The end, unchanged."""
        return end

    def start(self, requests: Sequence[ValidRequest]) -> bytes:
        """The two events before the first item."""
        (request,) = requests
        self._num_input = len(request.prompt_ids)
        number = self._output.next_number
        return _written(
            [ResponseCreated(number(), self._begun), ResponseInProgress(number(), self._begun)]
        )

    def event(self, index: int, event: StreamEvent) -> bytes:
        """The events that one token adds."""
        return _written(self._output.push(event))

    def end(self, finished: Sequence[Finished], comment: bytes) -> bytes:
        """The last event; it has the complete Response."""
        ((_, end),) = finished
        response = self._finished(end)
        kind = ResponseCompleted if response.status == COMPLETED else ResponseIncomplete
        return comment + _written([kind(self._output.next_number(), response)])

    def failed(self, error: KagamiError) -> bytes:
        """Two events: the error, and the failed Response, which has it too."""
        text, number = error_text(error), self._output.next_number
        response = changed(
            self._begun,
            status="failed",
            error=ResponseError("server_error", text),
            output=self._output.items,
        )
        return _written(
            [
                ResponseErrorEvent(number(), error_kind(error), text, None),
                ResponseFailed(number(), response),
            ]
        )

    def _finished(self, end: End) -> ResponseObject:
        is_cut = end.finish_reason is FinishReason.LENGTH
        return changed(
            self._begun,
            status=INCOMPLETE if is_cut else COMPLETED,
            completed_at=None if is_cut else int(time.time()),
            incomplete_details=IncompleteDetails("max_output_tokens") if is_cut else None,
            output=self._output.items,
            usage=ResponseUsage(
                self._num_input,
                InputTokensDetails(end.cached_tokens),
                end.num_generated,
                OutputTokensDetails(self._output.num_reasoning_tokens),
                self._num_input + end.num_generated,
            ),
        )


def _written(events: Sequence[ResponseEvent]) -> bytes:
    return b"".join([sse.named_event(_name(one), encode(one)) for one in events])


def _name(event: ResponseEvent) -> str:
    tag: Any = event.__struct_config__.tag
    return str(tag)
