"""Anthropic's /v1/messages and /v1/messages/count_tokens.

Converts Anthropic's messages, tools and tool choice to OpenAI's form, which
answering/conversation.py takes. message_blocks.py writes the answers.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import msgspec
from aiohttp import web

from kagami_proto.errors import InvalidRequest, ToolError
from kagami_proto.values import Grammar
from kagami_router.api.answering import conversation, grammars, thinking
from kagami_router.api.answering.conversation import Conversation
from kagami_router.api.answering.history import read_arguments
from kagami_router.api.answering.respond import Asked, respond
from kagami_router.api.answering.tokenizing import respond_tokens
from kagami_router.api.anthropic.message_blocks import PING, MessageWriter
from kagami_router.api.schemas import messages as schema
from kagami_router.api.web.app_state import AppState, state_of
from kagami_router.api.web.call import HttpCall
from kagami_router.api.web.caller import caller_of
from kagami_router.api.web.left_out import leave_out
from kagami_router.api.web.middleware import read_body
from kagami_router.request.validation import GenerationParams, Validation
from kagami_router.text.chat_template import PromptOptions
from kagami_router.tools import offers
from kagami_router.tools.offers import Tool, ToolChoice

_MESSAGES = msgspec.json.Decoder(schema.MessagesRequest)
_COUNT = msgspec.json.Decoder(schema.CountTokensRequest)
_CHOICES: Mapping[str, ToolChoice] = {
    "auto": offers.AUTO,
    "any": offers.REQUIRED,
    "none": offers.NONE,
}
# Claude Code's first block of `system`: it changes with each request, and would empty the cache of
# prefixes.
_BILLING = "x-anthropic-billing-header:"
_SWITCHES: Mapping[str, bool] = {"enabled": True, "disabled": False}
_MEDIA: Mapping[type[schema.Block], str] = {
    schema.ImageBlock: "an image",
    schema.DocumentBlock: "a document",
}
_Json = Mapping[str, Any]


async def messages(request: web.Request) -> web.StreamResponse:
    """Anthropic's Messages: one answer, or its events."""
    body = await read_body(request, _MESSAGES)
    state, call = state_of(request), HttpCall.of(request)
    foreign = ((at, one) for at, one in enumerate(body.tools or ()) if _is_foreign(one))
    leave_out(request, (f"tools[{at}]: {one.type}" for at, one in foreign))
    params = _params(state.validation, body)  # before the prompt, which costs more to make
    prepared = await conversation.prepare(
        state.chat_format, state.validation, _conversation(body), caller_of(request)
    )
    params = prepared.params(params)
    writer = MessageWriter(
        f"msg_{call.id}",
        state.served_model(body.model),
        body.max_tokens,
        prepared.new_parser(),
    )
    asked = Asked(prepared.prompt, params, adds_special_tokens=False, field="messages")
    return await respond(
        request, call, [asked], writer, is_stream=bool(body.stream), keep_alive=PING
    )


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """How long the prompt of such a conversation is."""
    body = await read_body(request, _COUNT)

    async def answer(state: AppState) -> schema.TokensCount:
        prompt = await conversation.prompt(state.chat_format, _conversation(body))
        return schema.TokensCount(await state.validation.count_tokens(prompt, "messages"))

    return await respond_tokens(request, answer)


def _params(validation: Validation, body: schema.MessagesRequest) -> GenerationParams:
    """Sampling is on unless temperature or top_p is 0; top_p 1 and top_k below 1 are off."""
    if body.max_tokens == 0:
        raise InvalidRequest("`max_tokens` must be strictly positive. Given: 0", field="max_tokens")
    stop = tuple(text for text in body.stop_sequences or () if text)
    max_stop = validation.limits.max_stop_sequences
    if len(stop) > max_stop:
        raise InvalidRequest(
            f"`stop_sequences` supports up to {max_stop} stop sequences. Given: {len(stop)}",
            field="stop_sequences",
        )
    is_greedy = body.temperature == 0 or body.top_p == 0
    params = GenerationParams(
        do_sample=not is_greedy,
        temperature=None if is_greedy else body.temperature,
        top_p=None if is_greedy or body.top_p == 1 else body.top_p,
        top_k=None if is_greedy or (body.top_k or 0) < 1 else body.top_k,
        max_new_tokens=body.max_tokens,
        may_be_shortened=True,
        stop=stop,
        keep_stop=False,
    )
    validation.check_params(params)
    return params


def _conversation(body: schema.CountTokensRequest) -> Conversation:
    if not body.messages:
        raise InvalidRequest("`messages` cannot be empty", field="messages")
    choice = body.tool_choice or schema.Choice("auto")
    asked = body.thinking or schema.Thinking("disabled")
    is_on = _SWITCHES.get(asked.type) if body.thinking else None
    effort = body.output_config.effort if body.output_config else None
    return Conversation(
        messages=_openai_messages(body),
        tools=offers.read_tools([one for one in body.tools or () if not _is_foreign(one)], _tool),
        choice=_choice(choice),
        is_parallel=not choice.disable_parallel_tool_use,
        grammar=_grammar(body),
        options=PromptOptions(variables=thinking.variables(effort, is_on=is_on)),
        # Anthropic's answers begin with text unless thinking was asked for.
        shows_thoughts=asked.type != "disabled" and asked.display != "omitted",
    )


def _grammar(body: schema.CountTokensRequest) -> Grammar | None:
    config = body.output_config
    output = (config.format if config else None) or body.output_format
    if output is None:
        return None
    if body.messages[-1].role == "assistant":
        raise InvalidRequest(
            "`output_config.format` needs a last message of the user's: an answer that is begun"
            " cannot be held to a schema",
            field="output_config.format",
        )
    return grammars.json_schema(output.schema)


def _choice(choice: schema.Choice) -> ToolChoice:
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if choice.name is None:
        raise InvalidRequest(
            "`tool_choice.name` is missing: the type `tool` needs it", field="tool_choice.name"
        )
    return ToolChoice(offers.REQUIRED.mode, (choice.name,))


def _is_foreign(tool: schema.ToolDefinition) -> bool:
    """Whether Anthropic's servers define a tool: there is no schema that a model could follow."""
    return tool.type not in (None, "custom")


def _tool(place: str, given: object) -> Tool:
    """Convert a tool to OpenAI's form."""
    assert isinstance(given, schema.ToolDefinition)
    if given.input_schema is None:
        raise ToolError(f"`{place}.input_schema` is missing", field=f"{place}.input_schema")
    kind = given.input_schema.get("type", "object")
    if kind != "object":
        raise ToolError(
            f"`{place}.input_schema` must be the schema of an object. Given: {str(kind)[:80]!r}",
            field=f"{place}.input_schema",
        )
    function = {
        "name": given.name,
        **({"description": given.description} if given.description is not None else {}),
        "parameters": given.input_schema,
        **({"strict": given.strict} if given.strict is not None else {}),
    }
    return offers.tool(place, {"type": "function", "function": function}, schema=given.input_schema)


def _openai_messages(body: schema.CountTokensRequest) -> list[_Json]:
    """The conversation in OpenAI's form; neighbouring messages of one role become one message.

    The texts of an assistant are joined without a separator. The texts of a user or a system are
    joined with newlines.
    """
    read: list[_Json] = []
    if body.system:
        texts = [body.system] if isinstance(body.system, str) else [b.text for b in body.system]
        texts = [text for text in texts if not text.startswith(_BILLING)]
        if texts:
            read.append({"role": "system", "content": "\n".join(texts)})
    names: dict[str, str] = {}
    placed = enumerate(body.messages)
    for role, group in groupby(placed, key=lambda one: one[1].role):
        blocks = [block for index, message in group for block in _placed_blocks(index, message)]
        if role == "assistant":
            names |= {b.id: b.name for _, b in blocks if isinstance(b, schema.ToolUseBlock)}
            read.append(_assistant(blocks))
        else:
            read += _from_outside(role, blocks, names)
    return read


def _placed_blocks(index: int, message: schema.Message) -> Iterator[tuple[str, schema.Block]]:
    """The blocks of a message, each with its place in the request."""
    place = f"messages[{index}].content"
    if isinstance(message.content, str):
        yield place, schema.TextBlock(message.content)
        return
    for number, block in enumerate(message.content):
        yield f"{place}[{number}]", block


def _assistant(blocks: Iterable[tuple[str, schema.Block]]) -> _Json:
    """One assistant message of thoughts, texts and calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[_Json] = []
    for place, block in blocks:
        match block:
            case schema.TextBlock(text):
                texts.append(text)
            case schema.ToolUseBlock(call_id, name, given):
                arguments = read_arguments(f"{place}.input", given)
                function = {"name": name, "arguments": arguments}
                calls.append({"id": call_id, "type": "function", "function": function})
            case schema.ThinkingBlock(text):
                thoughts.append(text)
            case schema.RedactedThinkingBlock():
                pass
            case _:
                raise _misplaced(place, block, "assistant")
    content = "".join(texts)
    said = {"role": "assistant", "content": content or (None if calls else "")}
    return (
        said
        | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {})
        | ({"tool_calls": calls} if calls else {})
    )


def _from_outside(
    role: str, blocks: Iterable[tuple[str, schema.Block]], names: Mapping[str, str]
) -> list[_Json]:
    """Messages of the user or the system: texts, and each tool result as its own message."""
    read: list[_Json] = []
    for place, block in blocks:
        match block:
            case schema.TextBlock(text):
                if read and read[-1]["role"] == role:
                    text = f"{read.pop()['content']}\n{text}"
                read.append({"role": role, "content": text})
            case schema.ToolResultBlock() if role == "user":
                read.append(_result(place, block, names.get(block.tool_use_id)))
            case _:
                raise _misplaced(place, block, role)
    return read or [{"role": role, "content": ""}]


def _result(place: str, block: schema.ToolResultBlock, name: str | None) -> _Json:
    """A tool result as a message; errors get a prefix, since OpenAI has no field for them."""
    given = block.content
    parts = [schema.TextBlock(given)] if isinstance(given, str) else given or ()
    text = "\n".join(_text(f"{place}.content[{number}]", p) for number, p in enumerate(parts))
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id,
        **({"name": name} if name else {}),
        "content": f"Error: {text}" if block.is_error else text,
    }


def _text(place: str, block: schema.TextBlock | schema.ImageBlock | schema.DocumentBlock) -> str:
    if isinstance(block, schema.TextBlock):
        return block.text
    raise _misplaced(place, block, "tool")


def _misplaced(place: str, block: schema.Block, role: str) -> InvalidRequest:
    if medium := _MEDIA.get(type(block)):
        return InvalidRequest(f"`{place}` is {medium}, and this model reads text only", field=place)
    return InvalidRequest(
        f"`{place}` has the type `{block.__struct_config__.tag}`,"
        f" which no message of the role `{role}` can have",
        field=place,
    )
