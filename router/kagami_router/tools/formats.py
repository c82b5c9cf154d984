"""The form in which one model writes its calls: how it is found, and its tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import tokenizers

from kagami_router.tools.tool_forms import DEFAULT, FORMS, ToolForm


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The form that one model writes, and the ids of its markers that are tokens."""

    form: ToolForm
    is_known: bool
    """The model was trained on it and its template shows tools; else the prompt explains both."""
    marker_ids: Mapping[str, int] = field(default_factory=dict)
    special_markers: frozenset[str] = frozenset()
    """Markers that are special tokens: the output's text lacks them, so tokens are checked."""


class Template(Protocol):
    """The facts about a chat template that decide the form."""

    @property
    def source(self) -> str: ...

    @property
    def reads_tools(self) -> bool: ...


def find_format(
    template: Template, tokenizer: tokenizers.Tokenizer, name: str | None = None
) -> ToolFormat:
    """The format of a model with this chat template and this vocabulary.

    `name` chooses a form of the table; raises `ValueError` for a name that is not there.
    """
    form = next((one for one in FORMS if _fits(one, template.source)), None)
    is_known = form is not None and template.reads_tools
    if name is not None:
        form, is_known = _named(name), template.reads_tools
    form = form or DEFAULT
    added = tokenizer.get_added_tokens_decoder().items()
    tokens = {token.content: (token_id, token) for token_id, token in added}
    return ToolFormat(
        form,
        is_known,
        {marker: tokens[marker][0] for marker in form.markers if marker in tokens},
        frozenset(one for one in form.markers if one in tokens and tokens[one][1].special),
    )


def _named(name: str) -> ToolForm:
    for form in FORMS:
        if name == form.name or name in form.other_names:
            return form
    names = ", ".join(one.name for one in FORMS)
    raise ValueError(f"--tool-call-parser must be one of {names}. Given: {name}")


def _fits(form: ToolForm, template: str) -> bool:
    return all(sign in template for sign in form.signs) and not any(
        sign in template for sign in form.counter_signs
    )
