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
from kagami_router.text.call_ids import PROBE_IDS, IdForm, form_of, has_calls, probe, with_ids
from kagami_router.text.system_messages import (
    LATE,
    SEVERAL,
    SystemRule,
    are_shown,
    is_usual,
    placed,
)
from kagami_router.text.templates.engine import Program
from kagami_router.text.templates.files import DEFAULT, TOOL_USE, sources
from kagami_router.text.templates.metered import METER, Meter, MeteredProgram, TooLong, weigh
from kagami_router.text.templates.process import RenderProcess
from kagami_router.text.templates.prompt import Job, Message, ModelTemplate, size_of
from kagami_router.text.templates.worker import MAX_SECONDS
from kagami_router.text.tokenizer import SpecialTokens
from kagami_router.text.turns import Turns

# The event loop renders a prompt itself for this long (some 300 messages of 6 us each). Then the
# rendering process starts again from the beginning, which costs 0.3 ms.
INLINE_SECONDS = 0.002
# Chats that may wait for one caller to be rendered there, and their size.
MAX_WAITING, MAX_WAITING_PARTS = 64, 16_000_000

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
        self._programs = {name: ModelTemplate(MeteredProgram(one)) for name, one in named.items()}
        self._tokens = tokens.named()
        self._process = RenderProcess(named)
        self._system_rules: dict[str, SystemRule] = {}
        self._id_forms: dict[str, IdForm] = {}
        self._turns = Turns("long chats", max_waiting=MAX_WAITING, max_size=MAX_WAITING_PARTS)

    def close(self) -> None:
        """End the rendering process, if there is one."""
        self._process.close()

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

    async def prompt(
        self,
        messages: Sequence[Message],
        options: PromptOptions = _DEFAULTS,
        caller: str = "",
    ) -> str:
        """As `render`, with system messages and ids of calls as the template takes them.

        What is not surely small is rendered outside of the event loop. There callers take turns,
        and a job that was begun ends: `Overloaded` where too many wait.
        """
        if not is_usual(messages):
            messages = placed(messages, await self._system_rule(self._name_for(options), caller))
        if has_calls(messages):
            form = await self._id_form(self._name_for(options), caller)
            messages = messages if form is IdForm.ANY else with_ids(messages, form)
        return await self._prompt(self._job(messages, options), caller)

    async def _system_rule(self, name: str, caller: str) -> SystemRule:
        """What the template `name` does with system messages: found out once, when asked first."""
        rule = self._system_rules.get(name)
        if rule is None:
            takes_several = await self._takes(SEVERAL, name, caller)
            rule = SystemRule(takes_several, await self._takes(LATE, name, caller))
            self._system_rules[name] = rule
        return rule

    async def _takes(self, messages: Sequence[Message], name: str, caller: str) -> bool:
        prompt = await self._probed(messages, name, caller)
        return prompt is not None and are_shown(messages, prompt)

    async def _id_form(self, name: str, caller: str) -> IdForm:
        """Which ids of calls the template `name` takes: found out once, when asked first."""
        form = self._id_forms.get(name)
        if form is None:
            form = form_of([await self._probed(probe(one), name, caller) for one in PROBE_IDS])
            self._id_forms[name] = form
        return form

    async def _probed(self, messages: Sequence[Message], name: str, caller: str) -> str | None:
        """The prompt; None = the template `name` refuses these messages."""
        try:
            return await self._prompt(self._job(messages, PromptOptions(template=name)), caller)
        except TemplateError:
            return None

    async def _prompt(self, job: Job, caller: str) -> str:
        try:
            return self._inline(job)
        except TooLong:
            pass
        await self._turns.take(caller, size_of(job))
        work = asyncio.get_running_loop().run_in_executor(
            None, self._process.prompt, job, MAX_SECONDS
        )
        work.add_done_callback(lambda _: self._turns.pass_on())
        return await asyncio.shield(work)

    def render(self, messages: Sequence[Message], options: PromptOptions = _DEFAULTS) -> str:
        """The prompt of these messages; raises `InvalidRequest`, `TemplateError`."""
        job = self._job(messages, options)
        try:
            return self._inline(job)
        except TooLong:
            return self._process.prompt(job, MAX_SECONDS)

    def _inline(self, job: Job) -> str:
        weigh(job)
        return self._programs[job.template].prompt(job, {METER: Meter(INLINE_SECONDS)})

    def _job(self, messages: Sequence[Message], options: PromptOptions) -> Job:
        if not messages:
            raise InvalidRequest("`messages` cannot be empty", field="messages")
        options.check()
        variables = {
            **self._tokens,
            **options.variables,
            "tools": options.tools,
            "documents": options.documents,
        }
        return Job(
            self._name_for(options),
            messages,
            variables,
            options.add_generation_prompt,
            options.continue_final_message,
        )

    def _name_for(self, options: PromptOptions) -> str:
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
        return name


class MissingTemplate:
    """Used for a model without a usable template: every chat call is refused."""

    reads_tools = False
    source = ""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def close(self) -> None:
        """Nothing is open."""

    async def prompt(
        self,
        messages: Sequence[Message],
        options: PromptOptions = _DEFAULTS,
        caller: str = "",
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
