"""Renders messages to a prompt with the model's chat template, as `transformers` renders it.

Knows which of a model's templates a request gets, the form that its messages need, and how a prompt
ends. Knows no tokens and no HTTP. Jinja and its limits are in text/templates/engine.py.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from kagami_proto.errors import InvalidRequest, TemplateError
from kagami_router.text.templates.content import ContentForm, content_form
from kagami_router.text.templates.engine import Meter, NoContent, Program, TooLong, to_json
from kagami_router.text.templates.files import DEFAULT, TOOL_USE, sources
from kagami_router.text.tokenizer import SpecialTokens

Message = Mapping[str, Any]

# The event loop renders a prompt itself for this long (some 500 messages of 3 us each). Then a
# thread starts again from the beginning. Using a thread costs 0.1 ms.
INLINE_SECONDS = 0.002
# A normal template needs 0.03 s for ten thousand messages.
MAX_SECONDS = 5.0

# Appended to the text that is to be continued. After rendering, all from here on is cut. A space
# follows it: the result shows whether the template strips white space there.
_CUT = "\ufdd0kagami-goes-on-here\ufdd0"
# The names under which a message's reasoning is sent; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_NO_CONTENT = NoContent()
# Names that every template gets; variables of a request must not have them.
_OWN = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """The fields of a request, beside its messages, that shape the prompt.

    If neither `add_generation_prompt` nor `continue_final_message` is given, an assistant message
    at the end is continued and any other message is answered, as in TGI 3. `template` names one of
    the model's own templates. `continue_final_message` may name the member to continue.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str | None = None
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises `InvalidRequest` for options that contradict each other with any template."""
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "`add_generation_prompt` and `continue_final_message` exclude each other",
                field="add_generation_prompt",
            )
        for name in (*_OWN, "continue_final_message"):
            if name in self.variables:
                raise InvalidRequest(
                    f"`chat_template_kwargs.{name}` is no variable: `{name}` is a field of its own",
                    field=f"chat_template_kwargs.{name}",
                )


_DEFAULTS = PromptOptions()


class ChatTemplate:
    """A model's compiled templates; rendering raises `TemplateError` for refused messages."""

    def __init__(self, source: str | Mapping[str, str], tokens: SpecialTokens) -> None:
        """`source` is one template, or several by name; raises `TemplateError`."""
        named = {DEFAULT: source} if isinstance(source, str) else source
        self._programs = {name: _Named(Program(one)) for name, one in named.items()}
        self._tokens = tokens.named()
        self._long_one = asyncio.Semaphore(1)

    @property
    def reads_tools(self) -> bool:
        """Whether a request with tools gets a template that shows them to the model."""
        program = self._programs.get(TOOL_USE) or self._programs.get(DEFAULT)
        return program is not None and "tools" in program.variables

    @property
    def source(self) -> str:
        """The text of the template that a request with tools gets."""
        program = self._programs.get(TOOL_USE) or self._programs.get(DEFAULT)
        return "" if program is None else program.source

    async def prompt(self, messages: Sequence[Message], options: PromptOptions = _DEFAULTS) -> str:
        """As `render`; a render that takes long runs on a thread, one at a time."""
        try:
            return self.render(messages, options, Meter(INLINE_SECONDS))
        except TooLong:
            pass
        async with self._long_one:
            meter = Meter(MAX_SECONDS)
            try:
                return await asyncio.to_thread(self.render, messages, options, meter)
            except TooLong as error:
                raise TemplateError(f"rendering took more than {MAX_SECONDS:g} s") from error
            finally:
                meter.stop()  # the client may have gone away

    def render(
        self,
        messages: Sequence[Message],
        options: PromptOptions = _DEFAULTS,
        meter: Meter | None = None,
    ) -> str:
        """The prompt of these messages.

        Raises `InvalidRequest`, `TemplateError`, and `TooLong` when `meter` ends the run.
        """
        if not messages:
            raise InvalidRequest("`messages` cannot be empty", field="messages")
        options.check()
        program = self._program_for(options)
        variables = {
            **self._tokens,
            **options.variables,
            "tools": options.tools,
            "documents": options.documents,
        }
        run = _Run(program, variables, meter or Meter(MAX_SECONDS))
        return run.prompt([program.formed(message) for message in messages], options)

    def _program_for(self, options: PromptOptions) -> "_Named":
        name = options.template
        if name is None:
            has_one = options.tools is not None and TOOL_USE in self._programs
            name = TOOL_USE if has_one else DEFAULT
        elif name not in self._programs:
            known = ", ".join(self._programs)
            raise InvalidRequest(
                "`chat_template` may name one of the model's templates"
                f" ({known}); templates in requests are not supported",
                field="chat_template",
            )
        if name not in self._programs:
            raise TemplateError(
                f"the model has no template called {DEFAULT}: name one of"
                f" {', '.join(self._programs)} in `chat_template`"
            )
        return self._programs[name]


class _Named:
    """One of the templates, and the form of messages that it reads."""

    def __init__(self, program: Program) -> None:
        self.run = program.run
        self.source = program.source
        self.variables = program.variables
        self._form = content_form(program.tree)
        self._reads_tool_calls = "tool_calls" in program.source

    def formed(self, message: Message) -> dict[str, Any]:
        """`message` without its nulls; its content has the form that the template reads.

        A message with only tool calls has no content. A template that does not read `tool_calls`
        gets them as text, as in TGI: a model that never sees its own calls repeats them.
        """
        formed = {name: value for name, value in message.items() if value is not None}
        reasoning = next((formed[name] for name in _REASONING if name in formed), None)
        if reasoning is not None:
            formed = {"thinking": reasoning, **formed, "reasoning_content": reasoning}
        content = formed.get("content")
        if content is None:
            calls = None if self._reads_tool_calls else formed.get("tool_calls")
            text = to_json(calls, separators=(",", ":")) if calls else _NO_CONTENT
            return {**formed, "content": text}
        if isinstance(content, list) and self._form is ContentForm.TEXT:
            return {**formed, "content": "".join(chunk.get("text", "") for chunk in content)}
        if isinstance(content, str) and self._form is ContentForm.CHUNKS:
            return {**formed, "content": [{"type": "text", "text": content}]}
        return formed


class _Run:
    """Renders the prompt of one request."""

    def __init__(self, program: _Named, variables: Mapping[str, Any], meter: Meter) -> None:
        self._program = program
        self._variables = variables
        self._meter = meter

    def prompt(self, messages: Sequence[dict[str, Any]], options: PromptOptions) -> str:
        """The whole prompt; the model continues at its end."""
        if asked := options.continue_final_message:
            return self._continue(messages, asked if isinstance(asked, str) else "content")
        is_free = asked is None and options.add_generation_prompt is None
        if is_free and messages[-1].get("role") == "assistant":
            try:
                return self._continue(messages, "content").rstrip()
            except _NothingToContinue:
                pass  # the template does not print this text: ask for a new message
        return self._text(messages, options.add_generation_prompt is not False)

    def _continue(self, messages: Sequence[dict[str, Any]], member: str) -> str:
        """The text up to the end of the last message's `member`, as `transformers` cuts it."""
        last = messages[-1]
        value = last.get(member)
        names = [name for name in _REASONING if last.get(name) == value]
        names = names if member in _REASONING else [member]
        if not any(name in self._program.source for name in names):
            raise _NothingToContinue(member, "the template does not read it")
        text, opened = _opened(member, value)
        marked = {**last, **dict.fromkeys(names, opened)}
        printed = self._text([*messages[:-1], marked], False)
        begin, cut, rest = printed.rpartition(_CUT)
        if not cut or text.strip() not in printed:
            raise _NothingToContinue(member, "the template does not print it")
        return begin if rest.startswith(" ") else begin.rstrip()

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        own = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self._program.run({**self._variables, **own}, self._meter)


class _NothingToContinue(TemplateError):
    """The last message has no text to continue, or the template does not print it."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(f"cannot continue `{member}` of the final message: {reason}")


def _opened(member: str, value: object) -> tuple[str, object]:
    """The text to continue, and `value` with `_CUT` appended to that text."""
    if isinstance(value, str) and value.strip():
        return value, f"{value}{_CUT} "
    if isinstance(value, list):
        for index in reversed(range(len(value))):
            chunk = value[index]
            if isinstance(chunk, dict) and isinstance(chunk.get("text"), str):
                opened = {**chunk, "text": f"{chunk['text']}{_CUT} "}
                return chunk["text"], [*value[:index], opened, *value[index + 1 :]]
    raise _NothingToContinue(member, "it has no text")


class MissingTemplate:
    """Used for a model without a usable template: every chat call is refused."""

    reads_tools = False
    source = ""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def prompt(
        self, messages: Sequence[Message], options: PromptOptions = _DEFAULTS
    ) -> NoReturn:
        """Raises `TemplateError`."""
        self.render(messages, options)

    def render(self, messages: Sequence[Message], options: PromptOptions = _DEFAULTS) -> NoReturn:
        """Raises `TemplateError`."""
        raise TemplateError(self._reason)


def load(
    folder: Path, tokens: SpecialTokens, config_path: Path | None = None
) -> ChatTemplate | MissingTemplate:
    """The templates of a model folder; `config_path` (--tokenizer-config-path) has precedence.

    Raises `ValueError` for a file that is not what its name says, and `FileNotFoundError` if
    `config_path` does not exist.
    """
    named, looked_for = sources(folder, config_path)
    if not named:
        names = ", ".join(str(path) for path in looked_for)
        return MissingTemplate(f"template not found (looked for one in {names})")
    for source in named.values():
        try:
            Program(source.text)
        except TemplateError as error:
            return MissingTemplate(f"{source.path} does not compile: {error}")
    return ChatTemplate({name: source.text for name, source in named.items()}, tokens)
