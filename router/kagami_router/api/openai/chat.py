"""/v1/chat/completions, and /chat_tokenize, which shows the prompt of a chat."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_proto.values import Grammar
from kagami_router.api.answering import conversation, grammars, history, thinking
from kagami_router.api.answering.conversation import Conversation, Prepared
from kagami_router.api.answering.openai_params import max_tokens_of, read_num_choices, read_params
from kagami_router.api.answering.respond import Asked, respond
from kagami_router.api.answering.token_lists import simple_tokens
from kagami_router.api.answering.tokenizing import respond_tokens
from kagami_router.api.openai.answer_writer import Form, Identity, OpenAIWriter, wants_usage
from kagami_router.api.openai.chat_writer import ChatChoices
from kagami_router.api.openai.tgi_client import TgiDeltas, is_tgi_client
from kagami_router.api.schemas.native import ChatTokenizeResponse
from kagami_router.api.schemas.openai import ChatReasoning, ChatRequest, ThinkingSwitch
from kagami_router.api.web.app_state import AppState, state_of
from kagami_router.api.web.body_room import ROOM
from kagami_router.api.web.call import HttpCall
from kagami_router.api.web.caller import caller_of
from kagami_router.api.web.middleware import read_body
from kagami_router.api.web.sse import DONE
from kagami_router.request.validation import GenerationParams, Validation
from kagami_router.text.chat_template import PromptOptions
from kagami_router.tools import offers
from kagami_router.tools.chat_format import ChatFormat

_CHAT = msgspec.json.Decoder(ChatRequest)


async def chat_tokenize(request: web.Request) -> web.StreamResponse:
    """The rendered prompt and its tokens."""
    body = await read_body(request, _CHAT)

    async def answer(state: AppState) -> ChatTokenizeResponse:
        prompt = await conversation.prompt(state.chat_format, _conversation(body, None))
        spans = await state.validation.tokens(prompt, "messages", add_special_tokens=False)
        return ChatTokenizeResponse(simple_tokens(spans), prompt)

    return await respond_tokens(request, answer)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """One answer, or one chunk for each token."""
    body = await read_body(request, _CHAT)
    state, call = state_of(request), HttpCall.of(request)
    asked, prepared = await ask(state.validation, state.chat_format, body, caller_of(request))
    raw = await request.app[ROOM].read(request)
    tgi = TgiDeltas() if is_tgi_client(raw) else None
    form = Form(
        kind="chat.completion",
        chunk_kind="chat.completion.chunk",
        num_samples=asked.num_samples,
        wants_usage=wants_usage(body),
        has_own_usage=False,
        end_marker=b"" if tgi else DONE,
    )
    writer = OpenAIWriter(
        Identity.of("chatcmpl", call, state, body.model),
        form,
        ChatChoices(prepared, state.decoder if body.logprobs else None, tgi),
    )
    return await respond(request, call, [asked], writer, is_stream=bool(body.stream))


async def ask(
    validation: Validation, chat_format: ChatFormat, body: ChatRequest, caller: str
) -> tuple[Asked, Prepared]:
    """What to generate for a chat, and how to read each answer."""
    params, num_samples = _params(validation, body)  # before the prompt, which costs more to make
    prepared = await conversation.prepare(
        chat_format, validation, _conversation(body, params.grammar), caller
    )
    params = prepared.params(params)
    return Asked(
        prepared.prompt,
        params,
        adds_special_tokens=False,
        num_samples=num_samples,
        field="messages",
    ), prepared


def _params(validation: Validation, body: ChatRequest) -> tuple[GenerationParams, int]:
    """The parameters, and the number of choices."""
    grammar = grammars.asked(body)
    max_top = validation.limits.max_top_n_tokens
    top_n_tokens = body.top_logprobs or 0
    if top_n_tokens and not body.logprobs:
        raise InvalidRequest(
            f"`top_logprobs` needs `logprobs`: true. Given: {top_n_tokens}", field="top_logprobs"
        )
    if top_n_tokens > max_top:
        raise InvalidRequest(
            f"`top_logprobs` must be >= 0 and <= {max_top}. Given: {top_n_tokens}",
            field="top_logprobs",
        )
    num_choices = read_num_choices(body, validation.limits.max_best_of)
    params = read_params(validation, body, max_tokens_of(body), top_n_tokens)
    return replace(params, grammar=grammar), num_choices


def _conversation(body: ChatRequest, grammar: Grammar | None) -> Conversation:
    if not body.messages:
        raise InvalidRequest("`messages` cannot be empty", field="messages")
    choice = offers.read_choice(body.tool_choice)
    return Conversation(
        messages=[_message(index, message) for index, message in enumerate(body.messages)],
        tools=() if choice == offers.NONE else offers.read_tools(body.tools or ()),
        choice=choice,
        is_parallel=body.parallel_tool_calls is not False,
        tool_prompt=body.tool_prompt,
        grammar=grammar,
        options=_prompt_options(body),
        shows_thoughts=_shows_thoughts(body),
    )


def _prompt_options(body: ChatRequest) -> PromptOptions:
    return PromptOptions(
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template=body.chat_template,
        variables=_thinking(body) | (body.chat_template_kwargs or {}),
    )


def _thinking(body: ChatRequest) -> dict[str, Any]:
    """The template's variables for thinking, from all the fields in which clients ask for it."""
    reasoning = body.reasoning or ChatReasoning()
    is_on = reasoning.enabled if body.enable_thinking is None else body.enable_thinking
    match body.thinking:
        case bool(switch) if is_on is None:
            is_on = switch
        case ThinkingSwitch(kind) if is_on is None:
            is_on = kind != "disabled"
        case _:
            pass
    return thinking.variables(body.reasoning_effort or reasoning.effort, is_on=is_on)


def _shows_thoughts(body: ChatRequest) -> bool:
    is_excluded = body.reasoning is not None and body.reasoning.exclude
    return body.include_reasoning is not False and not is_excluded


def _message(index: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its calls and parts read; raises `InvalidRequest` if its shape is wrong."""
    place = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise MalformedBody(f"{place}: missing field `role`", field=place)
    changed: dict[str, Any] = {}
    if message["role"] == "developer":
        changed["role"] = "system"  # OpenAI's newer name for it
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None:
        changed["tool_calls"] = history.read_calls(f"{place}.tool_calls", calls)
    if content is None and isinstance(message.get("refusal"), str):
        changed["content"] = message["refusal"]  # an answer of OpenAI's that comes back
    elif content is None and not calls and thinking.is_said(message):
        changed["content"] = ""
    elif content is None and not calls:
        raise MalformedBody(f"{place}: needs `content` or `tool_calls`", field=place)
    elif isinstance(content, list):
        changed["content"] = [
            _chunk(f"{place}.content[{number}]", chunk) for number, chunk in enumerate(content)
        ]
    elif content is not None and not isinstance(content, str):
        raise MalformedBody(
            f"{place}.content: expected a text or a list of chunks", field=f"{place}.content"
        )
    return {**message, **changed}


def _chunk(place: str, chunk: object) -> Mapping[str, Any]:
    """A part as templates know it: with the type `text`."""
    text = history.read_part(place, chunk)
    if isinstance(chunk, dict) and chunk["type"] == "text":
        return chunk
    return {"type": "text", "text": text}
