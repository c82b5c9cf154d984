"""Prepares the conversation of any chat route: prompt, grammar, and a parser for answers.

Each route converts its messages to OpenAI's form and its fields to domain values. The rest is the
same for all routes and lives here: how the model sees its tools, how a grammar holds it to them,
and how its answer is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kagami_proto.errors import InvalidRequest, ToolError
from kagami_proto.span_names import SpanName
from kagami_proto.tracing import span
from kagami_proto.values import Grammar, GrammarKind
from kagami_router.api.answering.thinking import with_thoughts
from kagami_router.request.validation import GenerationParams, Validation
from kagami_router.request.values import FinishReason, Token
from kagami_router.serving.infer import Generation
from kagami_router.text.chat_template import PromptOptions
from kagami_router.tools.answer_form import Opening, Reading, Wanted
from kagami_router.tools.call_arguments import JSON, json_term
from kagami_router.tools.chat_format import ChatFormat
from kagami_router.tools.deltas import (
    AnswerParser,
    CallArguments,
    CallStart,
    Delta,
    ReasoningDelta,
    TextDelta,
)
from kagami_router.tools.formats import ToolFormat
from kagami_router.tools.offers import AUTO, AllowedCalls, Tool, ToolChoice, allowed_calls
from kagami_router.tools.tool_forms import ToolForm

Message = Mapping[str, Any]

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
    """Constrains the answer; with tools, an answer that is not a call."""
    options: PromptOptions = _NO_OPTIONS
    """For the template; its `tools` are set from the field above."""
    shows_thoughts: bool = True
    """False: what the model thinks is counted and not given out."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The prompt, the grammar, and how to read each answer."""

    prompt: str
    calls: AllowedCalls | None
    reading: Reading
    shows_thoughts: bool = True

    def new_parser(self) -> AnswerParser:
        """A parser for one answer."""
        parser = self.reading.new_parser()
        return parser if self.shows_thoughts else _Silent(parser)

    def params(self, params: GenerationParams) -> GenerationParams:
        """The parameters of a generation, with what holds and ends its answer."""
        may_repeat = self.calls is not None and self.calls.max_calls > 1
        new_watch = (lambda: _Watch(self.reading.new_parser())) if may_repeat else None
        return replace(params, grammar=self.reading.grammar, new_watch=new_watch)


class _Silent:
    """A parser that keeps what the model thinks."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser

    @property
    def num_calls(self) -> int:
        """As `AnswerParser` says."""
        return self._parser.num_calls

    @property
    def num_reasoning_tokens(self) -> int:
        """As `AnswerParser` says."""
        return self._parser.num_reasoning_tokens

    @property
    def is_over(self) -> bool:
        """As `AnswerParser` says."""
        return self._parser.is_over

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """As `AnswerParser` says."""
        return _without_thoughts(self._parser.push(token, tail))

    def push_text(self, text: str) -> list[Delta]:
        """As `AnswerParser` says."""
        return _without_thoughts(self._parser.push_text(text))

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """As `AnswerParser` says."""
        return _without_thoughts(self._parser.finish(is_cut=is_cut))


def _without_thoughts(deltas: Sequence[Delta]) -> list[Delta]:
    return [delta for delta in deltas if not isinstance(delta, ReasoningDelta)]


class _Watch:
    """Ends an answer that its parser has read to the end."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser

    def is_enough(self, token: Token, tail: str) -> bool:
        """As `request.values.Watch` says."""
        self._parser.push(token, tail)
        return self._parser.is_over


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a whole answer; the arguments are JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer after parsing; `text` is None when it has only calls or thoughts."""

    text: str | None
    calls: tuple[ToolCall, ...]
    reasoning: str | None
    """None: the model did not think"""
    num_reasoning_tokens: int


async def prompt(chat_format: ChatFormat, conversation: Conversation, caller: str = "") -> str:
    """The prompt text; raises `ToolError`, or `TemplateError` for the messages."""
    calls = _calls_of(conversation)
    with span(chat_format.tracer, SpanName.TEMPLATE):
        return await _render(chat_format, conversation, calls, caller)


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
    if calls is not None and calls.is_required and not validation.has_grammars:
        raise InvalidRequest("grammar is not supported")
    text = await prompt(chat_format, conversation, caller)
    wanted = Wanted(calls, conversation.grammar, validation.has_grammars)
    reading = chat_format.form.reading(_opening(conversation, text), wanted)
    if conversation.grammar not in (None, reading.grammar):
        await validation.ready_grammar(conversation.grammar, caller)  # its errors name no tool
    if calls is not None and reading.grammar is not None:
        await _check_grammar(validation, reading.grammar, calls, caller)
    return Prepared(text, calls, reading, conversation.shows_thoughts)


def _opening(conversation: Conversation, prompt: str) -> Opening:
    """What the prompt has said of the answer already."""
    last, options = conversation.messages[-1], conversation.options
    if last.get("role") != "assistant" or options.add_generation_prompt:
        return Opening(prompt)
    # The member that has the thoughts may be continued.
    is_in_thoughts = options.continue_final_message not in (None, True, "content")
    return Opening(prompt, _text_of(last), is_in_thoughts)


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
    thoughts = [delta.text for delta in deltas if isinstance(delta, ReasoningDelta)]
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        if isinstance(delta, CallArguments):
            arguments.setdefault(delta.index, []).append(delta.text)
    calls = tuple(
        ToolCall(delta.id, delta.name, "".join(arguments.get(delta.index, ())))
        for delta in deltas
        if isinstance(delta, CallStart)
    )
    return Answer(
        "".join(texts) if texts or not (calls or thoughts) else None,
        calls,
        "".join(thoughts) if thoughts else None,
        parser.num_reasoning_tokens,
    )


async def _check_grammar(
    validation: Validation, grammar: Grammar, calls: AllowedCalls, caller: str
) -> None:
    """Compile the grammar now; if that fails, find the tool whose schema is at fault."""
    try:
        await validation.ready_grammar(grammar, caller)
    except InvalidRequest as whole:
        for tool in calls.tools:
            term = json_term(tool.schema, is_strict=tool.is_strict)
            alone = Grammar(GrammarKind.LARK, f"start: {term}\n")
            try:
                await validation.ready_grammar(alone, caller)
            except InvalidRequest as error:
                raise ToolError(
                    f"`parameters` of the tool {tool.name}: {error}", field="parameters"
                ) from error
        raise ToolError(f"the grammar of the tools: {whole}") from whole


async def _render(
    chat_format: ChatFormat, conversation: Conversation, calls: AllowedCalls | None, caller: str
) -> str:
    """The prompt; it shows the tools in the way that this template knows."""
    template, tool_format = chat_format.template, chat_format.form.tool_format
    tools = conversation.tools if calls is not None else ()
    messages = with_thoughts(conversation.messages, template.source)
    if "tool_calls" not in template.source:
        messages = _calls_as_text(messages, tool_format.form)
    if not any(sign in template.source for sign in _TOOL_ROLE):
        messages = _results_as_user(messages)
    options = conversation.options
    if calls is not None and chat_format.form.shows_tools(calls):
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
    texts = []
    for number, call in enumerate(calls):
        function = call["function"]
        arguments = function["arguments"]
        if form.style is not JSON:
            arguments = form.style.written(json.loads(arguments))
        texts.append(form.call(function.get("name"), arguments, number))
    return form.calls(texts)


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
    shown = "{…}" if form.style is JSON else form.style.written({"ARGUMENT": "VALUE"})
    example = form.calls([form.call("NAME", shown)])
    told = tool_prompt or (
        "These functions can be called. If one of them helps, call it, and write nothing but the"
        f" call:\n{example}\n"
        "If none of them helps, answer in plain text."
    )
    return f"{listed}\n{told}"
