"""Splits what a model thinks from its answer: the table of forms, and the parser.

Most models think between two markers. Some prompts write the opener themselves, so that the answer
begins with thoughts; others write both markers, so that the model does not think.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import tokenizers

from kagami_router.request.values import Token
from kagami_router.tools.deltas import AnswerParser, Delta, ReasoningDelta, merged, overlap


@dataclass(frozen=True, slots=True)
class ReasoningForm:
    """One way of marking thoughts, as texts."""

    name: str
    opener: str
    closer: str
    signs: tuple[str, ...]
    """The chat template of a model that uses this form contains one of these."""
    is_implied: bool = False
    """An answer begins with thoughts though no opener is written anywhere."""
    other_names: tuple[str, ...] = ()
    """What other servers call it."""


# The first form that fits a template is used.
FORMS: tuple[ReasoningForm, ...] = (
    ReasoningForm("seed_oss", "<seed:think>", "</seed:think>", ("</seed:think>",)),
    ReasoningForm("kimi", "◁think▷", "◁/think▷", ("◁/think▷",)),
    ReasoningForm("mistral", "[THINK]", "[/THINK]", ("[/THINK]", "[THINK]")),
    ReasoningForm("cohere", "<|START_THINKING|>", "<|END_THINKING|>", ("<|END_THINKING|>",)),
    ReasoningForm("gemma4", "<|channel>thought", "<channel|>", ("<|channel>thought",)),
    ReasoningForm(
        "granite",
        "Here is my thought process:",
        "Here is my response:",
        ("Here is my thought process:",),
    ),
    # Qwen 3, DeepSeek R1, GLM 4.5, MiniMax M2, SmolLM3, Nemotron, Kimi K2 Thinking.
    ReasoningForm(
        "think",
        "<think>",
        "</think>",
        ("</think>", "<think>"),
        other_names=("qwen3", "glm45", "deepseek_v3", "kimi_k2", "minimax_m2", "olmo3", "nano_v3"),
    ),
    # Chosen by name alone: the first template of R1 neither writes nor asks for an opener.
    ReasoningForm(
        "deepseek_r1",
        "<think>",
        "</think>",
        (),
        is_implied=True,
        other_names=("deepseek-r1", "qwen3-thinking"),
    ),
)


class Begun(enum.Enum):
    """What the prompt has already said of an answer."""

    NOTHING = enum.auto()
    OPEN = enum.auto()
    """The opener: the answer goes on with thoughts"""
    CLOSED = enum.auto()
    """All thoughts: the answer goes on with text"""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The form that one model writes, and the ids of its markers that are tokens."""

    form: ReasoningForm
    marker_ids: Mapping[str, int] = field(default_factory=dict)

    def begun(self, prompt: str) -> Begun:
        """What a prompt says of the answer that follows it."""
        end = prompt.rstrip()
        if end.endswith(self.form.closer):
            return Begun.CLOSED
        if self.form.is_implied or end.endswith(self.form.opener):
            return Begun.OPEN
        return Begun.NOTHING

    def begun_by(self, said: str) -> Begun:
        """What the beginning of an answer, which the model goes on with, says of the rest."""
        if self.form.closer in said:
            return Begun.CLOSED
        if self.form.opener in said or self.form.is_implied:
            return Begun.OPEN
        return Begun.CLOSED if said.strip() else Begun.NOTHING


class _Template(Protocol):
    """The fact about a chat template that decides the form."""

    @property
    def source(self) -> str: ...


def find_reasoning(
    template: _Template, tokenizer: tokenizers.Tokenizer, name: str | None = None
) -> ReasoningFormat | None:
    """The format of a model with this chat template; None = it does not think.

    `name` chooses a form of the table, or `none`; raises `ValueError` for another name.
    """
    source = template.source
    if name is None:
        form = next((one for one in FORMS if any(sign in source for sign in one.signs)), None)
    else:
        form = None if name == "none" else _named(name)
    if form is None:
        return None
    added = {token.content: at for at, token in tokenizer.get_added_tokens_decoder().items()}
    # A marker may be one token and text behind it.
    ids = {
        text: at
        for text, at in added.items()
        if len(text.strip()) > 2 and (form.opener.startswith(text) or form.closer.startswith(text))
    }
    return ReasoningFormat(form, ids)


def _named(name: str) -> ReasoningForm:
    for form in FORMS:
        if name == form.name or name in form.other_names:
            return form
    names = ", ".join(["none", *(one.name for one in FORMS)])
    raise ValueError(f"--reasoning-parser must be one of {names}. Given: {name}")


class _State(enum.Enum):
    BEFORE = enum.auto()
    """Only white space or a part of the opener was read"""
    INSIDE = enum.auto()
    BEHIND = enum.auto()
    """After the closer: white space"""
    OVER = enum.auto()


class ReasoningParser:
    """Reads thoughts, and leaves the rest of the answer to another parser."""

    def __init__(
        self,
        form: ReasoningForm,
        rest: AnswerParser,
        begun: Begun = Begun.NOTHING,
        *,
        ends_at: str = "",
    ) -> None:
        """`ends_at`: a marker that ends thoughts too; models that call forget to close them."""
        self._form = form
        self._rest = rest
        self._ends_at = ends_at
        self._is_open = begun is Begun.OPEN
        self._state = _State.OVER if begun is Begun.CLOSED else _State.BEFORE
        self._buffer = ""
        self._is_blank = True  # no thought was given out
        self._num_read = 0  # tokens
        self.num_reasoning_tokens = 0

    @property
    def num_calls(self) -> int:
        """The calls that were given out."""
        return self._rest.num_calls

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, whatever follows."""
        return self._rest.is_over

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """The deltas of one token; `tail` is the text that the token released."""
        if self._state is _State.OVER:
            return self._rest.push(token, tail)
        self._num_read += 1
        if not token.special:
            return self._read(token.text + tail)
        if token.text in self._form.opener or token.text in self._form.closer:
            return self._read(tail + token.text)
        deltas = self._read(tail)
        if self._state is _State.INSIDE or (self._state is _State.BEFORE and self._is_open):
            if token.text != self._ends_at:
                return deltas
            deltas += self._closed(self._buffer.rstrip(), "")
        # A special token that is no marker of thoughts: the other parser knows it.
        text = self._buffer if self._state is _State.BEFORE else ""
        return [*deltas, *self._over(text), *self._rest.push(token)]

    def push_text(self, text: str) -> list[Delta]:
        """The deltas of more text."""
        return self._rest.push_text(text) if self._state is _State.OVER else self._read(text)

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """The deltas that were held back. `is_cut`: a limit was reached, a partial call counts."""
        deltas: list[Delta] = []
        if self._state is _State.INSIDE:
            deltas = self._thought(self._buffer.rstrip())
            self.num_reasoning_tokens = self._num_read
        elif self._state is _State.BEFORE:
            deltas = (
                self._thought(self._buffer.rstrip())
                if self._is_open
                else self._rest.push_text(self._buffer)
            )
        self._buffer = ""
        return deltas + self._rest.finish(is_cut=is_cut)

    def _read(self, text: str) -> list[Delta]:
        self._buffer += text
        deltas: list[Delta] = []
        if self._state is _State.BEFORE:
            deltas += self._before()
        if self._state is _State.INSIDE:
            deltas += self._inside()
        if self._state is _State.BEHIND:
            deltas += self._behind()
        return merged(deltas)

    def _before(self) -> list[Delta]:
        """The opener. Some models write it though the prompt has one."""
        said, opener = self._buffer.lstrip(), self._form.opener
        if said.startswith(opener):
            self._state, self._buffer = _State.INSIDE, said.removeprefix(opener)
        elif not opener.startswith(said):
            if not self._is_open:
                return self._over(self._buffer)
            self._state = _State.INSIDE
        return []

    def _inside(self) -> list[Delta]:
        """Thoughts; white space at their ends belongs to the markers."""
        ends = [one for one in (self._form.closer, self._ends_at) if one]
        found = [(at, one) for one in ends if (at := self._buffer.find(one)) >= 0]
        if found:
            at, marker = min(found)
            thought, self._buffer = self._buffer[:at].rstrip(), self._buffer[at:]
            if marker == self._form.closer:
                self._buffer = self._buffer.removeprefix(marker)
            return self._closed(thought, self._buffer)
        held = max(overlap(self._buffer, one) for one in ends)
        shown = self._buffer[: len(self._buffer) - held].rstrip()
        self._buffer = self._buffer[len(shown) :]
        return self._thought(shown)

    def _thought(self, text: str) -> list[Delta]:
        if self._is_blank:
            text = text.lstrip()
        self._is_blank = self._is_blank and not text
        return [ReasoningDelta(text)] if text else []

    def _closed(self, thought: str, behind: str) -> list[Delta]:
        self.num_reasoning_tokens = self._num_read
        self._state, self._buffer = _State.BEHIND, behind
        return self._thought(thought)

    def _behind(self) -> list[Delta]:
        text = self._buffer.lstrip()
        return self._over(text) if text else []

    def _over(self, text: str) -> list[Delta]:
        self._state, self._buffer = _State.OVER, ""
        return self._rest.push_text(text) if text else []
