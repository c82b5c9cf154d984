"""How one model writes its answers: what holds them to a request, and what reads them.

Two ways: the built-in forms of calls and thoughts, and a checkpoint's own response template.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kagami_proto.values import Grammar
from kagami_router.tools.answer_grammar import Thoughts, answer_grammar
from kagami_router.tools.deltas import (
    AnswerParser,
    CallArguments,
    CallStart,
    ReasoningDelta,
    TextDelta,
    TextOnly,
)
from kagami_router.tools.formats import ToolFormat
from kagami_router.tools.offers import AllowedCalls, Tool
from kagami_router.tools.parser import CallParser
from kagami_router.tools.reasoning import Begun, ReasoningFormat, ReasoningParser
from kagami_router.tools.response_template import ResponseTemplate
from kagami_router.tools.template_parser import TemplateParser


@dataclass(frozen=True, slots=True)
class Opening:
    """What stands before an answer."""

    prompt: str
    said: str | None = None
    """The text of the answer that the prompt ends with, if it has begun one"""
    is_in_thoughts: bool = False
    """The prompt ends within the thoughts"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request wants of an answer."""

    calls: AllowedCalls | None
    response: Grammar | None
    has_grammars: bool
    """Whether the server can hold answers to grammars"""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers of one request are held and read."""

    grammar: Grammar | None
    new_parser: Callable[[], AnswerParser]
    may_think: bool
    is_plain: bool
    """An answer is nothing but text"""


class AnswerForm(Protocol):
    """One model's way of writing answers."""

    @property
    def tool_format(self) -> ToolFormat:
        """The form of calls that a prompt shows where the template has none."""

    def shows_tools(self, calls: AllowedCalls) -> bool:
        """Whether the chat template shows tools so that such calls are read."""

    def reading(self, opening: Opening, wanted: Wanted) -> Reading:
        """How the answers to one prompt are held and read."""


@dataclass(frozen=True, slots=True)
class MarkedForm:
    """Thoughts between markers, then text or calls, as the tables of built-in forms say."""

    tool_format: ToolFormat
    reasoning: ReasoningFormat | None = None

    def shows_tools(self, calls: AllowedCalls) -> bool:
        """As `AnswerForm` says."""
        return self.tool_format.is_known

    def reading(self, opening: Opening, wanted: Wanted) -> Reading:
        """As `AnswerForm` says."""
        begun, calls = self._begun(opening), wanted.calls
        grammar = wanted.response
        if calls is None or wanted.has_grammars:
            thoughts = Thoughts.behind(self.reasoning, begun)
            grammar = answer_grammar(self.tool_format, calls, grammar, thoughts)
        may_think = begun is not Begun.CLOSED
        is_held = wanted.has_grammars

        def new_parser() -> AnswerParser:
            return self._parser(calls, begun, is_constrained=is_held)

        return Reading(grammar, new_parser, may_think, calls is None and not may_think)

    def _begun(self, opening: Opening) -> Begun:
        if self.reasoning is None:
            return Begun.CLOSED
        if opening.is_in_thoughts:
            return Begun.OPEN
        if opening.said is not None:
            return self.reasoning.begun_by(opening.said)
        return self.reasoning.begun(opening.prompt)

    def _parser(
        self, calls: AllowedCalls | None, begun: Begun, *, is_constrained: bool
    ) -> AnswerParser:
        rest: AnswerParser = TextOnly()
        if calls is not None:
            rest = CallParser(self.tool_format, calls, is_constrained=is_constrained)
        if self.reasoning is None or begun is Begun.CLOSED:
            return rest
        ends_at = "" if calls is None else self.tool_format.form.opener
        return ReasoningParser(self.reasoning.form, rest, begun, ends_at=ends_at)


@dataclass(frozen=True, slots=True)
class TemplateForm:
    """A checkpoint's own response template.

    It says how answers are read, and not how they are held to a grammar: calls that have to be made
    are asked for, held and read in the built-in form.
    """

    template: ResponseTemplate
    marked: MarkedForm
    reads_tools: bool
    """The chat template shows tools"""

    @property
    def tool_format(self) -> ToolFormat:
        """That of the built-in form."""
        return self.marked.tool_format

    def shows_tools(self, calls: AllowedCalls) -> bool:
        """As `AnswerForm` says."""
        return self.marked.shows_tools(calls) if calls.is_required else self.reads_tools

    def reading(self, opening: Opening, wanted: Wanted) -> Reading:
        """As `AnswerForm` says."""
        calls = wanted.calls
        if calls is not None and calls.is_required:
            return self.marked.reading(opening, wanted)

        def new_parser() -> AnswerParser:
            return TemplateParser(self.template, opening.prompt, calls)

        return Reading(wanted.response, new_parser, may_think=True, is_plain=False)


def find_form(
    template: ResponseTemplate | None, marked: MarkedForm, *, reads_tools: bool
) -> AnswerForm:
    """The checkpoint's template, unless the built-in form reads a sample in the same way.

    A built-in form holds calls to their schemas, and gives out arguments while they arrive.
    """
    if template is None or _reads_alike(template, marked):
        return marked
    return TemplateForm(template, marked, reads_tools)


_SAMPLE = Tool("f", {"type": "object", "properties": {"a": {"type": "string"}}}, False, {})


def _reads_alike(template: ResponseTemplate, marked: MarkedForm) -> bool:
    form = marked.tool_format.form
    reasoning = marked.reasoning
    has_thoughts = any(field.is_thoughts for field in template.fields)
    if not marked.tool_format.is_known or has_thoughts != (reasoning is not None):
        return False
    sample = form.calls([form.call("f", form.style.written({"a": "b c"}))])
    if reasoning is not None:
        sample = f"{reasoning.form.opener}\nd\n{reasoning.form.closer}\n\n{sample}"
    parser = TemplateParser(template, "", AllowedCalls((_SAMPLE,), is_required=False, max_calls=2))
    deltas = [*parser.push_text(sample), *parser.finish(is_cut=False)]
    thought = "".join(one.text for one in deltas if isinstance(one, ReasoningDelta))
    text = "".join(one.text for one in deltas if isinstance(one, TextDelta))
    names = [one.name for one in deltas if isinstance(one, CallStart)]
    arguments = [one.text for one in deltas if isinstance(one, CallArguments)]
    expected = "d" if reasoning is not None else ""
    return (thought, text.strip(), names, arguments) == (expected, "", ["f"], ['{"a": "b c"}'])
