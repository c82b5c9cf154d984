"""What goes to the shards in one step, what comes back, and what the scheduler makes of it."""

import enum
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from kagami_proto.values import Wanted
from kagami_router.request.token_log import TopToken
from kagami_router.request.values import ValidRequest
from kagami_router.scheduler.sequence import Sequence


class NewSequence(NamedTuple):
    """A sequence the shard does not hold; on a replay `token_ids` go on behind the prompt."""

    id: int
    token_ids: list[int]
    num_prompt_tokens: int
    request: ValidRequest
    prompt_logprobs: bool
    num_cached_tokens: int
    is_replay: bool
    looked_up: bool
    """Whether the prefix cache was asked."""


class JoinReason(enum.Enum):
    """What let newcomers into a batch that runs; the values are TGI's labels."""

    BACKPRESSURE = "backpressure"
    """As many wait as `waiting_served_ratio` asks for."""
    WAIT_EXCEEDED = "wait_exceeded"
    """The batch has run for `max_waiting_tokens` steps without newcomers."""
    CHUNKING = "chunking"
    """Neither is set: they join a step as soon as its budget has room for a chunk of theirs."""


class WorkItem(NamedTuple):
    """Compute the KV of `num_tokens` tokens from `position` on; `blocks` are newly given.

    One that verifies has the last known token of its sequence, then the draft (`Step.drafts`).
    """

    sequence: Sequence
    position: int
    num_tokens: int
    blocks: Seq[int]
    wanted: Wanted


class Step(NamedTuple):
    """One change set and one forward pass. Drops are applied first, then new sequences.

    Without work it only tells the shards what to forget, while nothing else is to be done.
    """

    number: int
    new_sequences: list[NewSequence]
    drop_ids: list[int]
    work: list[WorkItem]
    num_decodes: int
    """Tokens behind prompts: one for a decode, 1 + k where k drafted ones are verified."""
    num_prefill_tokens: int
    num_answers: int
    """Items of work that bring something: tokens or a vector."""
    preempted: list[Sequence]
    """Those that gave up their blocks for this step and wait again."""
    num_kv_tokens: int
    """Whose KV the pass attends to, those it computes included."""
    join_reason: JoinReason | None = None
    """None: nobody joined, or there was nobody to join."""
    drafts: Mapping[int, Seq[int]] = {}
    """The ids to be verified, by sequence; the first items of `work` are theirs, in this order."""


Sample = tuple[int, int, float, tuple[TopToken, ...]]
"""One sampled token: sequence's id, token, its logprob; top tokens, most likely first."""

Vector = tuple[float, ...]


class PromptLogprobs(NamedTuple):
    """Log-probabilities of the prompt tokens from `first_position` on."""

    sequence_id: int
    first_position: int
    logprobs: Seq[float]
    top_tokens: Seq[tuple[TopToken, ...]] = ()
    """One entry for each of them, most likely first; empty where none were asked for."""


class Failure(NamedTuple):
    """The shard dropped this sequence; the others of the step went on."""

    sequence_id: int
    message: str


class StepResults(NamedTuple):
    """What one step brought. `error`, if not empty: the pass failed, nothing was computed."""

    number: int
    samples: Seq[Sample] = ()
    """None, one or more for each sequence; those of one sequence in their order."""
    prompt_logprobs: Seq[PromptLogprobs] = ()
    failures: Seq[Failure] = ()
    error: str = ""
    out_of_memory: bool = False
    host_ns: int = 0
    device_ns: int = 0
    sampling_ns: int = 0
    """Of `device_ns`, choosing the tokens."""
    admission_ns: int = 0
    """Of `host_ns`, taking newcomers in and dropping who left."""
    spans_dropped: int = 0
    """By all shards since they started."""
    vectors: Seq[tuple[int, Vector]] = ()
    """Each with its sequence's id."""


class TokenSampled(NamedTuple):
    """A sequence got its next token; `is_last`: it has all it may have and was ended."""

    sequence: Sequence
    token_id: int
    logprob: float
    top_tokens: tuple[TopToken, ...]
    is_last: bool


class VectorComputed(NamedTuple):
    """A sequence got its vector, which is all it wants, and was ended."""

    sequence: Sequence
    vector: Vector


class SequenceFailed(NamedTuple):
    """A sequence cannot be computed and was ended."""

    sequence: Sequence
    message: str


Event = TokenSampled | VectorComputed | SequenceFailed


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The scheduler's state after a step."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    """Held by sequences, each shared block once."""
    blocks_cached: int
    """In the prefix cache and held by no sequence."""
    running_tokens: int
