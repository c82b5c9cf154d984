"""Messages to prompt: the model's chat template, rendered as `transformers` renders it.

Knows the files a template can come from and the Jinja settings templates are written for; knows no
tokens and no HTTP.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kagami_proto.errors import TemplateError
from kagami_router.tokenizer import SpecialTokens, read_json

Message = Mapping[str, Any]

# Stands behind the text that is to be continued while the template runs; all from here on is cut.
_CUT = "\ufdd0kagami-goes-on-here\ufdd0"


class _NoContent(str):
    """The content of a message without one, for all that templates do with it.

    Most put it between other texts, where None raises or prints "None"; some (DeepSeek's) ask
    whether it `is none` to find the turns of tool calls. It is an empty text, and it `is none`.
    """

    __slots__ = ()


_NO_CONTENT = _NoContent()


class ChatTemplate:
    """One compiled template; raises `TemplateError` for messages it refuses."""

    def __init__(self, source: str, tokens: SpecialTokens) -> None:
        """Raises `TemplateError` if `source` does not compile."""
        self._variables = {
            **tokens.others,
            "bos_token": tokens.bos or "",
            "eos_token": tokens.eos or "",
        }
        self._reads_tool_calls = "tool_calls" in source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(_describe(error)) from error

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt that asks for the next assistant message.

        If the last message is the assistant's own, the prompt ends inside it and the model goes
        on with it (TGI 3 does so, without a switch).
        """
        if not messages:
            raise TemplateError("`messages` cannot be empty")
        messages = [self._with_content(message) for message in messages]
        last = messages[-1]
        if last.get("role") == "assistant" and str(last["content"]).strip():
            open_end = {**last, "content": f"{last['content']}{_CUT}"}
            prompt = self._run([*messages[:-1], open_end], add_generation_prompt=False, **variables)
            begin, cut, _ = prompt.rpartition(_CUT)
            if cut:
                return begin.rstrip()
            # The template prints no such text: ask for a message of its own.
        return self._run(messages, add_generation_prompt=True, **variables)

    def _with_content(self, message: Message) -> Message:
        """`message` with a text as its content, which a message of tool calls alone lacks.

        A template that does not read `tool_calls` gets them as the text, as in TGI: a model that
        never sees its own calls repeats them.
        """
        if message.get("content") is not None:
            return message
        calls = message.get("tool_calls")
        if calls and not self._reads_tool_calls:
            return {**message, "content": _to_json(calls, separators=(",", ":"))}
        return {**message, "content": _NO_CONTENT}

    def _run(self, messages: Sequence[Message], **variables: Any) -> str:
        arguments = {"tools": None, "documents": None, **self._variables, **variables}
        try:
            return self._template.render(messages=messages, **arguments)
        except jinja2.TemplateError as error:
            raise TemplateError(_describe(error)) from error
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            # A template is a program of the model's author: what it does wrong is no bug of ours.
            raise TemplateError(f"{type(error).__name__}: {error}") from error


class MissingTemplate:
    """Stands where a model has no template that can be used: every chat call is refused."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def render(self, messages: Sequence[Message], **variables: Any) -> NoReturn:
        """Raises `TemplateError`."""
        raise TemplateError(self._reason)


def load(
    folder: Path, tokens: SpecialTokens, config_path: Path | None = None
) -> ChatTemplate | MissingTemplate:
    """The template of a model folder, `config_path` (--tokenizer-config-path) before its files.

    Raises `ValueError` for a file that is not what its name says.
    """
    looked_for = [
        *([config_path] if config_path else []),
        folder / "chat_template.jinja",
        folder / "chat_template.json",
        folder / "tokenizer_config.json",
        folder / "processor_config.json",
    ]
    for path in looked_for:
        source = _source_in(path)
        if source is None:
            continue
        try:
            return ChatTemplate(source, tokens)
        except TemplateError as error:
            return MissingTemplate(f"{path} does not compile: {error}")
    names = ", ".join(str(path) for path in looked_for)
    return MissingTemplate(f"template not found (looked for one in {names})")


def _source_in(path: Path) -> str | None:
    if path.suffix == ".jinja":
        return _text_in(path) if path.is_file() else None
    template = read_json(path).get("chat_template")
    if isinstance(template, list):  # named templates: [{"name": …, "template": …}]
        template = next(
            (
                one.get("template")
                for one in template
                if isinstance(one, dict) and one.get("name") == "default"
            ),
            None,
        )
    return template if isinstance(template, str) else None


def _text_in(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _describe(error: jinja2.TemplateError) -> str:
    kind = {
        jinja2.TemplateSyntaxError: "syntax error",
        jinja2.UndefinedError: "undefined value",
    }.get(type(error))
    return f"{kind}: {error.message}" if kind else str(error.message or error)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what a training script learns from; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    """`transformers`' environment, from its `_compile_jinja_template`: prompts match training."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.tests["none"] = _is_none
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _is_none(value: object) -> bool:
    return value is None or isinstance(value, _NoContent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
