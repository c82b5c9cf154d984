"""Values that two parts share: what a request asks of the sampler, what work brings, what a device
is good at.

Their form on the wire is in `wire.py`: nobody but the two ends of the wire imports protobuf.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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
    min_p: float = 0.0
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


# Some 50 KB compile in 0.2 s at worst; the parser's work grows with the square of the alternatives.
MAX_GRAMMAR_BYTES = 64 * 1024
# What is no longer than this compiles in milliseconds, beside a large one.
MAX_SMALL_GRAMMAR_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole output has to match; the source of a JSON schema is its JSON text."""

    kind: GrammarKind
    source: str

    @property
    def num_bytes(self) -> int:
        """Of the source, in UTF-8."""
        return len(self.source.encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class DevicePolicy:
    """How a device wants to be used; a shard's backend says it, the router follows it."""

    steps_in_flight: int
    """2: the next step is sent before the results of the last one are there"""
    prefill_chunk: int
    """Prompt tokens in one step, unless a flag says how many"""
    warmup_tokens: int
    """Of the first prefill; 0: as many as the limits allow"""
    warmup_rows: int
    """Of the first decode; 0: as many as the limits allow"""
    pool_tokens: int
    """Size of the KV cache, unless a flag says one; 0: as memory allows"""
    cache_share: float
    """Of the KV cache: the part whose memory cached prefixes may take. Below 1, memory is taken
    block by block, when a block is first used"""


# By torch's name of the device's type.
#
# A CPU's threads have all cores: what runs beside a step delays it by more than it takes itself, so
# one step is in flight (router/notes/0009). Running streams stand still for a prefill: 0.17 s for
# 256 tokens of SmolLM2-135M on two cores; larger chunks gain nothing (shard/notes/0011). A warm-up
# has to start the threads and fill the primitive caches, and no more.
DEVICE_POLICIES: Mapping[str, DevicePolicy] = MappingProxyType(
    {
        "cpu": DevicePolicy(
            steps_in_flight=1,
            prefill_chunk=256,
            warmup_tokens=32,
            warmup_rows=2,
            pool_tokens=24_576,
            cache_share=0.25,
        ),
        "cuda": DevicePolicy(
            steps_in_flight=2,
            prefill_chunk=4096,
            warmup_tokens=0,
            warmup_rows=0,
            pool_tokens=0,
            cache_share=1.0,
        ),
    }
)


class Wanted(enum.IntEnum):
    """What one work item of a step brings beside its KV."""

    ONE_TOKEN = 0
    """The token behind its last one."""
    NOTHING = 1
    """More of the prompt follows."""
    VERIFY = 2
    """It ends in k drafted tokens: as many as the model agrees with, and one more, 1 to k + 1."""
    VECTOR = 3
    """The hidden state of its last token."""
