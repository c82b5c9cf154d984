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


class ChatTemplate:
    """One compiled template; raises `TemplateError` for messages it refuses."""

    def __init__(self, source: str, tokens: SpecialTokens) -> None:
        """Raises `TemplateError` if `source` does not compile."""
        self._variables = {
            **tokens.others,
            "bos_token": tokens.bos or "",
            "eos_token": tokens.eos or "",
        }
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
        arguments = {"tools": None, "documents": None, **self._variables, **variables}
        try:
            prompt = self._template.render(
                messages=messages, add_generation_prompt=True, **arguments
            )
        except jinja2.TemplateError as error:
            raise TemplateError(_describe(error)) from error
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            # A template is a program of the model's author: what it does wrong is no bug of ours.
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        last = messages[-1]
        content = last.get("content")
        if last.get("role") == "assistant" and isinstance(content, str):
            return _cut_behind(prompt, content)
        return prompt


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
    """The template of a model folder, `config_path` (--tokenizer-config-path) before its files."""
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
        return path.read_text(encoding="utf-8") if path.is_file() else None
    template = read_json(path).get("chat_template")
    if isinstance(template, list):  # named templates: [{"name": …, "template": …}]
        template = next(
            (one.get("template") for one in template if one.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None


def _cut_behind(prompt: str, content: str) -> str:
    end = prompt.rfind(content)
    if end < 0 or not content:
        # A template may strip what it prints.
        content = content.strip()
        end = prompt.rfind(content)
    return prompt if end < 0 or not content else prompt[: end + len(content)].rstrip()


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


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
