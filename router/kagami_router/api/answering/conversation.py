"""Prepares the conversation of any chat route: prompt, grammar, and a parser for answers.

Each route converts its messages to OpenAI's form and its fields to domain values. The rest is the
same for all routes and lives here: how the model sees its tools, how a grammar holds it to them,
and how its answer is read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kagami_proto.errors import InvalidRequest, ToolError
from kagami_proto.span_names import SpanName
from kagami_proto.tracing import span
from kagami_proto.values import Grammar, GrammarKind
from kagami_router.request.validation import Validation
from kagami_router.request.values import FinishReason
from kagami_router.serving.infer import Generation
from kagami_router.text.chat_template import PromptOptions
from kagami_router.tools.chat_format import ChatFormat
from kagami_router.tools.formats import ToolForm, ToolFormat, arguments_schema
from kagami_router.tools.offers import AUTO, AllowedCalls, Tool, ToolChoice, allowed_calls
from kagami_router.tools.parser import (
    CallArguments,
    CallParser,
    CallStart,
    Delta,
    TextDelta,
    TextOnly,
)

Message = Mapping[str, Any]
AnswerParser = TextOnly | CallParser

_NO_OPTIONS = PromptOptions()
# A template that formats tool results itself contains one of these.
_TOOL_ROLE = ("'tool'", '"tool"', "tool_call_id")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a client asks; `messages` are in OpenAI's form and read by history.py."""

    messages: Sequence[Message]
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = AUTO
    is_parallel: bool = True
    tool_prompt: str | None = None
    """Replaces our own note that tells the model about its tools."""
    grammar: Grammar | None = None
    """Constrains the answer; not allowed together with tools."""
    options: PromptOptions = _NO_OPTIONS
    """For the template; its `tools` are set from the field above."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The prompt, the grammar, and how to read each answer."""

    prompt: str
    grammar: Grammar | None
    has_tools: bool
    new_parser: Callable[[], AnswerParser]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a whole answer; the arguments are JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer after parsing; `text` is None when it has only calls."""

    text: str | None
    calls: tuple[ToolCall, ...]


async def prompt(chat_format: ChatFormat, conversation: Conversation, caller: str = "") -> str:
    """The prompt text; raises `ToolError`, or `TemplateError` for the messages."""
    is_shown = _calls_of(conversation) is not None
    with span(chat_format.tracer, SpanName.TEMPLATE):
        tools = conversation.tools if is_shown else ()
        return await _render(chat_format, conversation, tools, caller)


async def prepare(
    chat_format: ChatFormat,
    validation: Validation,
    conversation: Conversation,
    caller: str = "",
) -> Prepared:
    """The prompt and all that its answers need.

    Raises what `prompt` raises, `ToolError` if the grammar of the tools does not compile, and
    `InvalidRequest` if calls are required and the server has no grammars.
    """
    calls = _calls_of(conversation)
    if calls is None:
        text = await prompt(chat_format, conversation, caller)
        return Prepared(text, conversation.grammar, False, TextOnly)
    if conversation.grammar is not None:
        raise ToolError("Grammar and tools are mutually exclusive")
    tool_format = chat_format.tool_format
    grammar = None
    if validation.has_grammars:
        grammar = tool_format.grammar(calls)
    elif calls.is_required:
        raise InvalidRequest("grammar is not supported")
    text = await prompt(chat_format, conversation, caller)
    if grammar is not None:
        await _check_grammar(validation, grammar, calls, caller)
    return Prepared(
        text,
        grammar,
        True,
        lambda: CallParser(tool_format, calls, is_constrained=grammar is not None),
    )


def _calls_of(conversation: Conversation) -> AllowedCalls | None:
    return allowed_calls(
        conversation.tools, conversation.choice, is_parallel=conversation.is_parallel
    )


def read_deltas(generation: Generation, parser: AnswerParser) -> list[Delta]:
    """One whole answer as deltas, in the order of its tokens."""
    deltas: list[Delta] = []
    for token, tail in zip(generation.tokens, generation.tails, strict=True):
        deltas += parser.push(token, tail)
    return deltas + parser.finish(is_cut=generation.end.finish_reason is FinishReason.LENGTH)


def read_answer(generation: Generation, parser: AnswerParser) -> Answer:
    """One whole answer as text and calls."""
    deltas = read_deltas(generation, parser)
    texts = [delta.text for delta in deltas if isinstance(delta, TextDelta)]
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        if isinstance(delta, CallArguments):
            arguments.setdefault(delta.index, []).append(delta.text)
    calls = tuple(
        ToolCall(delta.id, delta.name, "".join(arguments.get(delta.index, ())))
        for delta in deltas
        if isinstance(delta, CallStart)
    )
    return Answer("".join(texts) if texts or not calls else None, calls)


async def _check_grammar(
    validation: Validation, grammar: Grammar, calls: AllowedCalls, caller: str
) -> None:
    """Compile the grammar now; if that fails, find the tool whose schema is at fault."""
    try:
        await validation.ready_grammar(grammar, caller)
    except InvalidRequest as whole:
        for tool in calls.tools:
            alone = Grammar(GrammarKind.LARK, f"start: %json {arguments_schema(tool)}\n")
            try:
                await validation.ready_grammar(alone, caller)
            except InvalidRequest as error:
                raise ToolError(
                    f"`parameters` of the tool {tool.name}: {error}", field="parameters"
                ) from error
        raise ToolError(f"the grammar of the tools: {whole}") from whole


async def _render(
    chat_format: ChatFormat, conversation: Conversation, tools: Sequence[Tool], caller: str
) -> str:
    """The prompt; it shows `tools` in the way that this template knows."""
    template, tool_format = chat_format.template, chat_format.tool_format
    messages = list(conversation.messages)
    if "tool_calls" not in template.source:
        messages = _calls_as_text(messages, tool_format.form)
    if not any(sign in template.source for sign in _TOOL_ROLE):
        messages = _results_as_user(messages)
    options = conversation.options
    if tools and tool_format.is_known:
        options = replace(options, tools=[tool.definition for tool in tools])
        if conversation.tool_prompt:
            messages = _with_note(messages, conversation.tool_prompt)
    elif tools:
        messages = _with_note(messages, _tools_note(tools, tool_format, conversation.tool_prompt))
    return await template.prompt(messages, options, caller)


def _calls_as_text(messages: Sequence[Message], form: ToolForm) -> list[Message]:
    """Calls become text, for a template without `tool_calls`.

    A model that never sees its own calls repeats them.
    """
    changed: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            written = _written(calls, form)
            text = _text_of(message)
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            message = {**rest, "content": f"{text}\n{written}" if text else written}
        changed.append(message)
    return changed


def _written(calls: Sequence[Any], form: ToolForm) -> str:
    """Calls as the model writes them."""
    heads = []
    for call in calls:
        function = call["function"]
        heads.append(
            f"{form.before}{function.get('name')}{form.after}{function['arguments']}{form.foot}"
        )
    return form.opener + form.lead + form.between.join(heads) + form.closer


def _results_as_user(messages: Sequence[Message]) -> list[Message]:
    """Results become user messages, for a template without the role `tool`.

    Neighbouring results share one message.
    """
    changed: list[Message] = []
    is_result = False
    for message in messages:
        was_result, is_result = is_result, message.get("role") == "tool"
        if is_result:
            text = f"<tool_response>\n{_text_of(message)}\n</tool_response>"
            if was_result:
                text = f"{changed.pop()['content']}\n{text}"
            message = {"role": "user", "content": text}
        changed.append(message)
    return changed


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(one["text"] for one in content)


def _with_note(messages: Sequence[Message], note: str) -> list[Message]:
    """Append `note` to the last message that is not the assistant's, as TGI does."""
    changed = list(messages)
    for index in reversed(range(len(changed))):
        message = changed[index]
        if message.get("role") != "assistant":
            changed[index] = {**message, "content": f"{_text_of(message)}\n---\n{note}"}
            return changed
    return [{"role": "user", "content": note}, *changed]


def _tools_note(tools: Sequence[Tool], tool_format: ToolFormat, tool_prompt: str | None) -> str:
    """The tools, and how to call them, for a model whose template cannot show them."""
    listed = json.dumps([tool.definition for tool in tools], ensure_ascii=False)
    form = tool_format.form
    example = f"{form.before}NAME{form.after}{{…}}{form.foot}"
    told = tool_prompt or (
        "These functions can be called. If one of them helps, call it, and write nothing but the"
        f" call:\n{form.opener}{form.lead}{example}{form.closer}\n"
        "If none of them helps, answer in plain text."
    )
    return f"{listed}\n{told}"
