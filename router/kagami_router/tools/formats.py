"""How models write tool calls: the table of forms, the choice of one, the grammar of its calls.

A call is `before` name `after` arguments `foot`. Markers stand around the calls: `opener` before
the first, `between` two calls, `closer` after the last. A marker may be one token. The grammar then
names it by its id, because other tokens cannot spell it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import tokenizers

from kagami_proto.values import Grammar, GrammarKind
from kagami_router.tools.offers import AllowedCalls, Tool

# The spaces of Python's json.dumps, which models see in training, and no others.
_SPACING: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True, slots=True)
class ToolForm:
    """One way of writing calls, as texts."""

    name: str
    opener: str
    """Begins the calls; "" = the calls are the whole answer and begin with `before`."""
    lead: str
    before: str
    after: str
    foot: str
    closer: str
    between: str
    """Separates two calls; "" = at most one call."""
    signs: tuple[str, ...]
    """The chat template of a model that uses this form contains all of these …"""
    counter_signs: tuple[str, ...] = ()
    """… and none of these."""
    markers: tuple[str, ...] = ()
    """Parts of the texts above that may be one token."""

    @property
    def is_list(self) -> bool:
        """Whether several calls share one opener."""
        return bool(self.between) and self.opener not in self.between


_NAMED = '{"name": "'
# The first form that fits a template is used. The first of the table is for models without a form.
FORMS: tuple[ToolForm, ...] = (
    ToolForm(  # Hermes 2 Pro, Qwen 2.5 and 3, SmolLM3
        name="hermes",
        opener="<tool_call>",
        lead="\n",
        before=_NAMED,
        after='", "arguments": ',
        foot="}",
        closer="\n</tool_call>",
        between="\n</tool_call>\n<tool_call>\n",
        signs=("<tool_call>",),
        # Qwen 3 Coder and GLM write XML between the same markers.
        counter_signs=("<function=", "<arg_key>"),
        markers=("<tool_call>", "</tool_call>"),
    ),
    ToolForm(  # Mistral's newer tokenizers: Magistral, Devstral, Ministral 3
        name="mistral-args",
        opener="[TOOL_CALLS]",
        lead="",
        before="",
        after="[ARGS]",
        foot="",
        closer="",
        between="[TOOL_CALLS]",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        counter_signs=("[CALL_ID]",),
        markers=("[TOOL_CALLS]", "[ARGS]"),
    ),
    ToolForm(  # Mistral 7B v0.3, Nemo, Small
        name="mistral",
        opener="[TOOL_CALLS]",
        lead="[",
        before=_NAMED,
        after='", "arguments": ',
        foot="}",
        closer="]",
        between=", ",
        signs=("[TOOL_CALLS]",),
        counter_signs=("[ARGS]", "[CALL_ID]"),
        markers=("[TOOL_CALLS]",),
    ),
    ToolForm(  # Llama 3.1, 3.2, 3.3, which are trained to make one call at a time
        name="llama",
        opener="",
        lead="",
        before=_NAMED,
        after='", "parameters": ',
        foot="}",
        closer="",
        between="",
        signs=('{"name": function name, "parameters"',),
        markers=("<|python_tag|>",),
    ),
)
DEFAULT = FORMS[0]
# Llama's marker for "no text follows"; a call may come after it.
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The form that one model writes, and the ids of its markers that are tokens."""

    form: ToolForm
    is_known: bool
    """The model was trained on it and its template shows tools; else the prompt explains both."""
    marker_ids: Mapping[str, int] = field(default_factory=dict)
    special_markers: frozenset[str] = frozenset()
    """Markers that are special tokens: the output's text lacks them, so tokens are checked."""

    def grammar(self, calls: AllowedCalls) -> Grammar:
        """The grammar of an answer: only `calls`, or text that may end in them."""
        rules = _Rules(self, calls)
        return Grammar(GrammarKind.LARK, rules.source())


class Template(Protocol):
    """The facts about a chat template that decide the form."""

    @property
    def source(self) -> str: ...

    @property
    def reads_tools(self) -> bool: ...


def find_format(template: Template, tokenizer: tokenizers.Tokenizer) -> ToolFormat:
    """The format of a model with this chat template and this vocabulary."""
    form = next(
        (one for one in FORMS if template.reads_tools and _fits(one, template.source)), None
    )
    markers = (form or DEFAULT).markers
    added = tokenizer.get_added_tokens_decoder().items()
    tokens = {token.content: (token_id, token) for token_id, token in added}
    return ToolFormat(
        form or DEFAULT,
        form is not None,
        {marker: tokens[marker][0] for marker in markers if marker in tokens},
        frozenset(one for one in markers if one in tokens and tokens[one][1].special),
    )


def _fits(form: ToolForm, template: str) -> bool:
    return all(sign in template for sign in form.signs) and not any(
        sign in template for sign in form.counter_signs
    )


def arguments_schema(tool: Tool) -> str:
    """The JSON schema of a tool's arguments, with options for llguidance."""
    options = {**_SPACING, "coerce_one_of": True, "lenient": not tool.is_strict}
    return json.dumps({**tool.schema, "x-guidance": options})


class _Rules:
    """Writes one grammar; each tool has its own rule, so that every schema has its own `$defs`."""

    def __init__(self, tool_format: ToolFormat, calls: AllowedCalls) -> None:
        self._form = tool_format.form
        self._ids = tool_format.marker_ids
        self._calls = calls

    def source(self) -> str:
        """The whole grammar."""
        form, calls = self._form, self._calls
        names = [f"call_{index}" for index in range(len(calls.tools))]
        lines = [*self._start(), f"call: {' | '.join(names)}"]
        further = calls.max_calls - 1 if form.between else 0
        repeated = f" ({self._terms(form.between)} call){{0,{further}}}" if further else ""
        lines.append(f"calls: {self._terms(form.lead)} call{repeated} {self._terms(form.closer)}")
        for name, tool in zip(names, calls.tools, strict=True):
            head = self._terms(form.before + tool.name + form.after)
            lines.append(f"{name}: {head} {name}_args {self._terms(form.foot)}")
            lines.append(f"{name}_args: %json {arguments_schema(tool)}")
        return "\n".join(lines) + "\n"

    def _start(self) -> list[str]:
        """The first rules: the text before the calls."""
        opener = self._form.opener
        if not opener:
            return self._bare_start()
        opened = f"{self._terms(opener)} calls"
        if self._calls.is_required:
            return [f"start: {opened}"]
        if (opener_id := self._ids.get(opener)) is not None:
            return [f"start: text | text {opened}", f"text: <[^{opener_id}]>*"]
        # Both alternatives begin with any text. The lazy one ends at the first opener. After it
        # only calls may follow.
        return [
            "start: TEXT | begin calls",
            "TEXT: /(?s:.*)/",
            f"begin[lazy]: TEXT {_literal(opener)}",
        ]

    def _bare_start(self) -> list[str]:
        tag = self._ids.get(PYTHON_TAG)
        tagged = "" if tag is None else f" | <[{tag}]> calls"
        if self._calls.is_required:
            return [f"start: calls{tagged}"]
        begin = r"\s*\{\s*\"name\"\s*:(?s:.*)"
        return [f"start: TEXT | calls{tagged}", f"TEXT: /(?s:.*)/ & ~/{begin}/"]

    def _terms(self, text: str) -> str:
        """`text` as terms of a rule; markers in it are written as ids."""
        for marker, marker_id in self._ids.items():
            before, found, after = text.partition(marker)
            if found:
                return f"{self._terms(before)} <[{marker_id}]> {self._terms(after)}".strip()
        return _literal(text) if text else ""


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
