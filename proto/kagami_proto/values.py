"""What a request asks of the sampler: the router validates these values, the shard uses them.

Their form on the wire is in `wire.py`: nobody but the two ends of the wire imports protobuf.
"""

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the defaults switch every processor off."""

    do_sample: bool = False
    seed: int = 0
    """64 bits; validation draws one where the client gave none and `do_sample` is on."""
    temperature: float = 1.0
    top_k: int = 0
    """0: all tokens"""
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); 100 forces a token, -100 bans it."""
    watermark: bool = False

    @property
    def has_penalty(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


class GrammarKind(enum.Enum):
    """The language that a grammar is written in."""

    JSON_SCHEMA = enum.auto()
    REGEX = enum.auto()
    LARK = enum.auto()
    """llguidance's dialect of Lark."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole output has to match; the source of a JSON schema is its JSON text."""

    kind: GrammarKind
    source: str
