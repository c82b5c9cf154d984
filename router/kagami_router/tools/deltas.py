"""The parts of an answer as they arrive, and what every parser of answers offers."""

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from kagami_router.request.values import Token

_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `index` counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: pieces of one JSON text."""

    index: int
    text: str


Delta = ReasoningDelta | TextDelta | CallStart | CallArguments


class AnswerParser(Protocol):
    """Reads one answer: `push` every token, then `finish`."""

    @property
    def num_calls(self) -> int:
        """The calls that were given out."""

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens before the end of the reasoning, its markers included; 0 if there is none."""

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, whatever follows."""

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """The deltas of one token; `tail` is the text that the token released."""

    def push_text(self, text: str) -> list[Delta]:
        """The deltas of more text."""

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """The deltas that were held back. `is_cut`: a limit was reached, a partial call counts."""


class TextOnly:
    """The parser of an answer that is nothing but text."""

    num_calls = 0
    num_reasoning_tokens = 0
    is_over = False

    def push(self, token: Token, tail: str = "") -> list[Delta]:
        """The text that this token shows."""
        return self.push_text(tail if token.special else token.text + tail)

    def push_text(self, text: str) -> list[Delta]:
        """The same text."""
        return [TextDelta(text)] if text else []

    def finish(self, *, is_cut: bool) -> list[Delta]:
        """Nothing: this parser holds no text back."""
        return []


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas; neighbouring pieces of one text or of one call are joined."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        match last, delta:
            case TextDelta(before), TextDelta(more):
                joined[-1] = TextDelta(before + more)
            case ReasoningDelta(before), ReasoningDelta(more):
                joined[-1] = ReasoningDelta(before + more)
            case CallArguments(index, before), CallArguments(same, more) if index == same:
                joined[-1] = CallArguments(index, before + more)
            case _:
                joined.append(delta)
    return joined


def new_call_id() -> str:
    """A random id of nine letters and digits.

    Templates of Mistral's kind refuse all others, and for clients an id has no form.
    """
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with, `marker` itself excluded."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
