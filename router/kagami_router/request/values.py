"""The values a request consists of once it is valid, and the events it gets back.

All frozen. `validation.py` makes `ValidRequest`, `text_writer.py` makes `StreamEvent`; nothing
here knows HTTP, protobuf or the scheduler. Times are seconds of `time.monotonic()`.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kagami_proto.values import Grammar, SamplingParams
from kagami_router.request.prompt import Prompt


class Watch(Protocol):
    """Reads what one sequence says, and sees when it has said enough."""

    def is_enough(self, token: "Token", tail: str) -> bool:
        """Whether the sequence ends with this token; `tail` is the text that it released."""


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a sequence ends."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    keep_stop: bool = True
    """Native routes leave the stop string in the text, OpenAI's cut it off."""
    token_ids: frozenset[int] = frozenset()
    """These end a sequence as the model's own end does, even where that is ignored."""
    new_watch: Callable[[], Watch] | None = None
    """Makes what watches one sequence, and ends it as a stop string would."""


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """One generation as validation made it: nobody checks it again."""

    prompt: Prompt
    sampling: SamplingParams
    stopping: StoppingParams
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    grammar: Grammar | None = None
    """Compiled already, on every shard."""
    adapter: str | None = None
    """LoRA adapter; None = the model as it is. No route names one yet."""
    wants_vector: bool = False
    """The hidden state of the prompt's last token is asked for, and no text."""
    caller: str = ""
    """Who asks: callers that ask at the same time share the server evenly."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids of the prompt."""
        return self.prompt.ids

    @property
    def prompt_text(self) -> str:
        """The text of the prompt."""
        return self.prompt.text

    @property
    def max_kv_tokens(self) -> int:
        """Tokens that the model is fed with at most: all but the last one generated."""
        num_prompt = len(self.prompt_ids)
        return num_prompt if self.wants_vector else num_prompt + self.stopping.max_new_tokens - 1


class FinishReason(enum.Enum):
    """Why a sequence ended; the values are TGI's."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


class Token(NamedTuple):
    """One token; `text` is what it added to the output, "" while a character is incomplete."""

    id: int
    text: str
    logprob: float
    special: bool


class PrefillToken(NamedTuple):
    """One prompt token; the first has no logprob.

    `top_tokens`: what the model found most likely here, most likely first, where the request has
    `top_n_tokens`; the first prompt token has none.
    """

    id: int
    text: str
    logprob: float | None
    top_tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """When things happened to one sequence."""

    submitted: float
    scheduled: float
    """Its first chunk was put into a step."""
    first_token: float
    finished: float
    device_s: float = 0.0
    """Device time of the steps from its first to its last, which it shared with others."""


@dataclass(frozen=True, slots=True)
class End:
    """What the last event of a stream adds."""

    finish_reason: FinishReason
    generated_text: str
    """Special tokens left out; cut at a whole character."""
    num_generated: int
    timings: Timings
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    stop: str | None = None
    """The stop string that ended it, if one did."""


class StreamEvent(NamedTuple):
    """One sampled token; `end` is set on the last one of the stream and only there.

    `tail` is text beside `token.text` that was held back for a stop string until this token: it
    ended the stream, or is special and showed that the string does not go on. The
    concatenation of all `text` of tokens that are not special, each with its event's `tail`, is
    `end.generated_text`. The first event has the prompt's tokens in `prefill`, if its logprobs were
    asked for.
    """

    token: Token
    top_tokens: tuple[Token, ...] = ()
    tail: str = ""
    end: End | None = None
    prefill: tuple[PrefillToken, ...] = ()


def text_event(token_id: int, text: str, logprob: float) -> StreamEvent:
    """The event of a token that is text and nothing else: nearly every one.

    A NamedTuple's own constructor is a Python function: it takes three times as long as the tuple.
    """
    token = _make(Token, (token_id, text, logprob, False))
    return _make(StreamEvent, (token, (), "", None, ()))


_make = tuple.__new__
