"""What one step asks of the engine, and its result: the wire's messages without protobuf."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

from kagami_proto.values import Grammar, SamplingParams, Wanted


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the shard does not have in memory, or no longer has."""

    id: int
    token_ids: Sequence[int]
    """The prompt; on a replay also the tokens that were generated"""
    num_prompt_tokens: int
    sampling: SamplingParams
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    grammar: Grammar | None = None
    traceparent: str = ""
    """W3C trace context of the router's prefill span; empty = not traced"""
    tracestate: str = ""
    decode_span_id: int = 0
    refused: str = ""
    """Why this shard cannot serve it (an adapter); empty if it can"""


class Work(NamedTuple):
    """Compute the KV of `num_tokens` tokens of sequence `id` from `position` on."""

    id: int
    position: int
    num_tokens: int
    wanted: Wanted = Wanted.ONE_TOKEN


class WorkColumns:
    """The wire's columns, read as records."""

    __slots__ = ("counts", "ids", "positions", "wanted")

    def __init__(
        self,
        ids: list[int],
        positions: list[int],
        counts: list[int],
        wanted: Sequence[Wanted] = (),
    ) -> None:
        """`wanted` is empty where every item wants one token.

        Raises `ValueError` unless the columns are of equal length.
        """
        if not len(ids) == len(positions) == len(counts) == len(wanted or ids):
            lengths = f"{len(ids)} ids, {len(positions)} positions and {len(counts)} counts"
            raise ValueError(f"the work of a step has {lengths} ({len(wanted)} say what they want)")
        self.wanted = wanted
        self.ids = ids
        self.positions = positions
        self.counts = counts

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Work]:
        wanted = self.wanted or repeat(Wanted.ONE_TOKEN)
        return map(Work, self.ids, self.positions, self.counts, wanted)

    def __contains__(self, work: object) -> bool:
        return work in list(self)


@dataclass(frozen=True, slots=True)
class Step:
    """The changes since the last step, and the work of one forward pass."""

    number: int
    new_sequences: Sequence[NewSequence] = ()
    drop_ids: Sequence[int] = ()
    work: Collection[Work] = ()
    grants: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Blocks to append to block tables before the work, by sequence id"""


class TopTokens(NamedTuple):
    """The most likely tokens where the token in row `row` of the result was sampled."""

    row: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]


class PromptLogprobs(NamedTuple):
    """Logprobs of the prompt tokens from `first_position` on."""

    id: int
    first_position: int
    logprobs: Sequence[float]
    top_ids: Sequence[Sequence[int]] = ()
    """The most likely tokens at each of these positions, most likely first; empty = not asked"""
    top_logprobs: Sequence[Sequence[float]] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step; if `error` is set, nothing of the step was computed."""

    number: int
    ids: Sequence[int] = ()
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    top_tokens: Sequence[TopTokens] = ()
    prompt_logprobs: Sequence[PromptLogprobs] = ()
    failures: Mapping[int, str] = field(default_factory=dict)
    error: str = ""
    out_of_memory: bool = False
    host_ns: int = 0
    device_ns: int = 0
    sampling_ns: int = 0
    """The part of `device_ns` that sampling took"""
    admission_ns: int = 0
    """The part of `host_ns` that dropping, admitting and granting took"""
