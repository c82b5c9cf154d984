"""/v1/chat/completions, and /chat_tokenize, which shows the prompt a chat becomes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_proto.values import Grammar
from kagami_router.api.answering import conversation, grammars
from kagami_router.api.answering.conversation import Conversation, Prepared
from kagami_router.api.native.service import Front, front_of, json_response, simple_tokens
from kagami_router.api.openai import answers as openai
from kagami_router.api.openai.chat_writer import ChoiceWriter
from kagami_router.api.schemas.native import ChatTokenizeResponse
from kagami_router.api.schemas.openai import ChatRequest
from kagami_router.api.web.call import Call
from kagami_router.api.web.middleware import read_body
from kagami_router.text.chat_template import PromptOptions
from kagami_router.tools import offers

_CHAT = msgspec.json.Decoder(ChatRequest)


async def chat_tokenize(request: web.Request) -> web.Response:
    """The rendered prompt and its tokens."""
    body = await read_body(request, _CHAT)
    front = front_of(request)
    prompt = await conversation.prompt(front, _conversation(body, None))
    spans = await front.tokenizer.spans(prompt, add_special_tokens=False)
    return json_response(ChatTokenizeResponse(simple_tokens(spans), prompt))


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """One answer, or one chunk for each token."""
    body = await read_body(request, _CHAT)
    front, call = front_of(request), Call.of(request)
    plan, prepared = await prepare(front, body)
    writer = ChoiceWriter(prepared, front.decoder if body.logprobs else None)
    form = openai.Form(
        kind="chat.completion",
        chunk_kind="chat.completion.chunk",
        id_prefix="chatcmpl",
        adds_special_tokens=False,  # the template has written them
        has_own_usage=False,
        choices=writer.choices,
        chunk_choices=writer.chunk_choices,
        plain_choice=writer.plain_choice,
    )
    return await openai.respond(
        request, call, body, plan=plan, prompts=[prepared.prompt], form=form
    )


async def prepare(front: Front, body: ChatRequest) -> tuple[openai.Plan, Prepared]:
    """What to do with a chat, and the prompt it becomes."""
    plan = _plan(front, body)  # before the prompt, which costs more to make
    prepared = await conversation.prepare(front, _conversation(body, plan.params.grammar))
    return plan._replace(params=replace(plan.params, grammar=prepared.grammar)), prepared


def _plan(front: Front, body: ChatRequest) -> openai.Plan:
    grammar = grammars.response_format(body.response_format)
    max_top = front.validation.limits.max_top_n_tokens
    top_n_tokens = body.top_logprobs or 0
    if top_n_tokens and not body.logprobs:
        raise InvalidRequest(f"`top_logprobs` needs `logprobs`: true. Given: {top_n_tokens}")
    if top_n_tokens > max_top:
        raise InvalidRequest(f"`top_logprobs` must be >= 0 and <= {max_top}. Given: {top_n_tokens}")
    params, num_samples = openai.plan(front, body, openai.max_tokens_of(body), top_n_tokens)
    return openai.Plan(replace(params, grammar=grammar), num_samples)


def _conversation(body: ChatRequest, grammar: Grammar | None) -> Conversation:
    if not body.messages:
        raise InvalidRequest("`messages` cannot be empty")
    choice = offers.read_choice(body.tool_choice)
    return Conversation(
        messages=[_message(index, message) for index, message in enumerate(body.messages)],
        tools=() if choice == offers.NONE else offers.read_tools(body.tools or ()),
        choice=choice,
        is_parallel=body.parallel_tool_calls is not False,
        tool_prompt=body.tool_prompt,
        grammar=grammar,
        options=_prompt_options(body),
    )


def _prompt_options(body: ChatRequest) -> PromptOptions:
    return PromptOptions(
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template=body.chat_template,
        variables=body.chat_template_kwargs or {},
    )


def _message(index: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as sent, once it is known to be one."""
    place = f"messages[{index}]"
    if not isinstance(message.get("role"), str):
        raise MalformedBody(f"{place}: missing field `role`")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise MalformedBody(f"{place}: needs `content` or `tool_calls`")
    if isinstance(content, list):
        for number, chunk in enumerate(content):
            _check_chunk(f"{place}.content[{number}]", chunk)
    elif content is not None and not isinstance(content, str):
        raise MalformedBody(f"{place}.content: expected a text or a list of chunks")
    return message


def _check_chunk(place: str, chunk: object) -> None:
    if isinstance(chunk, dict):
        if chunk.get("type") == "text" and isinstance(chunk.get("text"), str):
            return
        if chunk.get("type") == "image_url":
            raise InvalidRequest(f"`{place}` is an image, and this model reads text only")
    raise MalformedBody(f'{place}: expected {{"type":"text","text":…}}')
