"""Renders one prompt: the form that messages need, and how a prompt ends.

Runs in the router and in its rendering process: nothing heavy is imported here.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from kagami_proto.errors import TemplateError
from kagami_router.text.templates.content import ContentForm, content_form
from kagami_router.text.templates.engine import Program, to_json
from kagami_router.text.templates.values import NoContent

Message = Mapping[str, Any]

# Appended to the text that is to be continued. After rendering, all from here on is cut. A space
# follows it: the result shows whether the template strips white space there.
_CUT = "\ufdd0kagami-goes-on-here\ufdd0"
# The names under which a message's reasoning is sent; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_NO_CONTENT = NoContent()
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Job(NamedTuple):
    """What one prompt is made of."""

    template: str
    messages: Sequence[Message]
    variables: Mapping[str, Any]
    add_generation_prompt: bool | None
    continue_final_message: bool | str | None


def size_of(job: Job) -> int:
    """Characters, and parts that are no text, of the messages; nothing else is large."""
    size = 0
    left: list[object] = [job.messages]
    while left:
        value = left.pop()
        if isinstance(value, str):
            size += len(value)
        else:
            size += 1
            if isinstance(value, dict):
                left += value.values()
            elif isinstance(value, list | tuple):
                left += value
    return size


class ModelTemplate:
    """One of the templates, and the form of messages that it reads."""

    def __init__(self, program: Program) -> None:
        self._run = program.run
        self.source = program.source
        self.variables = program.variables
        self._form = content_form(program.tree)
        self._reads_tool_calls = "tool_calls" in program.source

    def _formed(self, message: Message) -> dict[str, Any]:
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

    def prompt(self, job: Job, more: Mapping[str, Any] = _NOTHING) -> str:
        """The whole prompt; raises `TemplateError`. `more` are variables of this run alone."""
        run = _Run(self._run, self.source, {**job.variables, **more})
        return run.prompt([self._formed(message) for message in job.messages], job)


class _Run:
    """Renders the prompt of one request."""

    def __init__(
        self, run: Callable[[Mapping[str, Any]], str], source: str, variables: Mapping[str, Any]
    ) -> None:
        self._run = run
        self._source = source
        self._variables = variables

    def prompt(self, messages: Sequence[dict[str, Any]], job: Job) -> str:
        """The whole prompt; the model continues at its end."""
        if asked := job.continue_final_message:
            return self._continue(messages, asked if isinstance(asked, str) else "content")
        is_free = asked is None and job.add_generation_prompt is None
        if is_free and messages[-1].get("role") == "assistant":
            try:
                return self._continue(messages, "content").rstrip()
            except _NothingToContinue:
                pass  # the template does not print this text: ask for a new message
        return self._text(messages, job.add_generation_prompt is not False)

    def _continue(self, messages: Sequence[dict[str, Any]], member: str) -> str:
        """The text up to the end of the last message's `member`, as `transformers` cuts it."""
        last = messages[-1]
        value = last.get(member)
        names = [name for name in _REASONING if last.get(name) == value]
        names = names if member in _REASONING else [member]
        if not any(name in self._source for name in names):
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
        return self._run({**self._variables, **own})


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
