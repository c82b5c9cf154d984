"""/v1/chat/completions, and /chat_tokenize, which shows the prompt a chat becomes."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_router.api import openai, sse
from kagami_router.api.answers import Call, Finished, log_success, stream_headers, whole_headers
from kagami_router.api.middleware import read_body
from kagami_router.api.schemas import (
    ChatChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatTokenizeResponse,
    TopLogprob,
    encode,
    shortest,
)
from kagami_router.api.service import Front, front_of, json_response, simple_tokens
from kagami_router.infer import Generation
from kagami_router.requests import StreamEvent, Token, ValidRequest
from kagami_router.validation import GenerationParams, samples

_CHAT = msgspec.json.Decoder(ChatRequest)
# Rendering costs some 5 us a message: longer chats go to a thread.
INLINE_MESSAGES = 100
# OpenAI's sign for "as good as impossible"; its clients read numbers only.
_IMPOSSIBLE = -9999.0
_ROLE = b'"role":"assistant",'


async def chat_tokenize(request: web.Request) -> web.Response:
    """The rendered prompt and its tokens."""
    body = await read_body(request, _CHAT)
    front = front_of(request)
    prompt = await _prompt(front, body)
    spans = await front.tokenizer.spans(prompt, add_special_tokens=False)
    return json_response(ChatTokenizeResponse(simple_tokens(spans), prompt))


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """One answer, or one chunk for each token."""
    body = await read_body(request, _CHAT)
    front, call = front_of(request), Call.of(request)
    params = _params(front, body)
    prompt = await _prompt(front, body)
    num_samples = openai.num_samples(front, body)
    with front.infer.permits(num_samples):
        # The template has written the special tokens already.
        valid = await front.validation.validate(
            prompt, params, add_special_tokens=False, trace=call.trace
        )
        requests = samples(valid, num_samples)
        if body.stream:
            return await _stream(request, front, call, body, requests)
        generations = await front.infer.collect_all(requests, call.received)
    finished = [Finished(one.request, one.end) for one in generations]
    log_success(call, finished)
    return json_response(
        ChatCompletion(
            object="chat.completion",
            id=f"chatcmpl-{call.id}",
            created=call.created,
            model=front.served_model(body.model),
            system_fingerprint=front.system_fingerprint,
            choices=[
                _choice(index, generation, bool(body.logprobs))
                for index, generation in enumerate(generations)
            ],
            usage=openai.usage_of([valid], finished),
        ),
        **whole_headers(front.compute_type, [prompt], call, finished),
    )


async def _stream(
    request: web.Request,
    front: Front,
    call: Call,
    body: ChatRequest,
    requests: Sequence[ValidRequest],
) -> web.StreamResponse:
    chunks = _ChunkWriter(front, call, body, requests)
    return await sse.respond(
        request,
        front.infer.stream_all(requests, call.received),
        render=chunks.render,
        render_error=openai.error_event,
        last=chunks.last,
        headers=stream_headers(front.compute_type, [requests[0].prompt_text]),
    )


class _ChunkWriter:
    """Writes the chunks of one chat stream; what all chunks share is encoded once."""

    def __init__(
        self, front: Front, call: Call, body: ChatRequest, requests: Sequence[ValidRequest]
    ) -> None:
        self._call = call
        self._requests = requests
        self._has_logprobs = bool(body.logprobs)
        self._has_usage = openai.wants_usage(body)
        self._head = b"data: " + openai.chunk_head(
            "chat.completion.chunk",
            f"chatcmpl-{call.id}",
            call.created,
            front.served_model(body.model),
            front.system_fingerprint,
        )
        self._started: set[int] = set()
        self._finished: list[Finished] = []

    def render(self, turn: Sequence[tuple[int, StreamEvent]]) -> bytes:
        """The chunks of one turn."""
        return b"".join([self._chunk(index, event) for index, event in turn])

    def last(self) -> bytes:
        """Usage where asked for, and the end marker."""
        log_success(self._call, self._finished)
        if not self._has_usage:
            return sse.DONE
        usage = encode(openai.usage_of(self._requests[:1], self._finished))
        return self._head + b'"choices":[],"usage":%b}\n\n' % usage + sse.DONE

    def _chunk(self, index: int, event: StreamEvent) -> bytes:
        role, finish_reason = b"", b"null"
        if index not in self._started:
            self._started.add(index)
            role = _ROLE
        if event.end is not None:
            self._finished.append(Finished(self._requests[index], event.end))
            finish_reason = openai.FINISH_REASON_JSON[event.end.finish_reason]
        logprobs = b"null"
        if self._has_logprobs:
            logprobs = encode(ChatLogprobs([_logprob(event.token, event.top_tokens)]))
        return (
            b'%b"choices":[{"index":%d,"delta":{%b"content":%b},"logprobs":%b,'
            b'"finish_reason":%b}],"usage":null}\n\n'
        ) % (
            self._head,
            index,
            role,
            encode(openai.text_of(event)),
            logprobs,
            finish_reason,
        )


def _params(front: Front, body: ChatRequest) -> GenerationParams:
    if body.tools and body.tool_choice != "none":
        raise InvalidRequest("`tools` is not supported yet")
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise InvalidRequest("grammar is not supported")
    max_top = front.validation.limits.max_top_n_tokens
    top_n_tokens = (body.top_logprobs or 0) if body.logprobs else 0
    if top_n_tokens > max_top:
        raise InvalidRequest(f"`top_logprobs` must be >= 0 and <= {max_top}. Given: {top_n_tokens}")
    max_tokens = (
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    )
    return openai.params(body, max_tokens, top_n_tokens)


async def _prompt(front: Front, body: ChatRequest) -> str:
    if not body.messages:
        raise InvalidRequest("`messages` cannot be empty")
    messages = [_message(index, message) for index, message in enumerate(body.messages)]
    if len(messages) <= INLINE_MESSAGES:
        return front.template.render(messages)
    return await asyncio.to_thread(front.template.render, messages)


def _message(index: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as the template gets it: as sent, its content as one text.

    Clients write what is absent as null (`name`, `tool_calls`), where templates ask whether it is
    there: such members are left out.
    """
    place = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise MalformedBody(f"{place}: missing field `role`")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise MalformedBody(f"{place}: needs `content` or `tool_calls`")
    kept = {name: value for name, value in message.items() if value is not None}
    if isinstance(content, list):
        kept["content"] = "".join(
            _chunk_text(f"{place}.content[{number}]", chunk) for number, chunk in enumerate(content)
        )
    elif content is not None and not isinstance(content, str):
        raise MalformedBody(f"{place}.content: expected a text or a list of chunks")
    return kept


def _chunk_text(place: str, chunk: object) -> str:
    if isinstance(chunk, dict):
        if chunk.get("type") == "text" and isinstance(chunk.get("text"), str):
            text: str = chunk["text"]
            return text
        if chunk.get("type") == "image_url":
            raise InvalidRequest(f"`{place}` is an image, and this model reads text only")
    raise MalformedBody(f'{place}: expected {{"type":"text","text":…}}')


def _choice(index: int, generation: Generation, has_logprobs: bool) -> ChatChoice:
    logprobs = None
    if has_logprobs:
        alternatives = generation.top_tokens or ((),) * len(generation.tokens)
        logprobs = ChatLogprobs(
            [
                _logprob(token, top)
                for token, top in zip(generation.tokens, alternatives, strict=True)
            ]
        )
    return ChatChoice(
        index,
        ChatMessage("assistant", generation.end.generated_text),
        logprobs,
        openai.FINISH_REASON[generation.end.finish_reason],
    )


def _logprob(token: Token, alternatives: Sequence[Token]) -> ChatLogprob:
    return ChatLogprob(
        token.text,
        _finite(token.logprob),
        list(token.text.encode()),
        [
            TopLogprob(one.text, _finite(one.logprob), list(one.text.encode()))
            for one in alternatives
        ],
    )


def _finite(logprob: float) -> float:
    number = shortest(logprob)
    return _IMPOSSIBLE if number is None else number
