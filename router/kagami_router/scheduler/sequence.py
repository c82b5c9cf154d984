"""All the scheduler knows of one generation."""

import enum
from dataclasses import dataclass, field

from kagami_router.request.token_log import TokenLog
from kagami_router.request.values import ValidRequest
from kagami_router.scheduler.prefix_cache import Node, PrefixKey


class Status(enum.Enum):
    """Where a sequence is; ENDED is final."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


class WaitReason(enum.StrEnum):
    """What a waiting sequence waits for; the values stand in traces."""

    NEXT_STEP = "next_step"
    """Nothing but a step that is being computed."""
    TOKEN_BUDGET = "token_budget"
    """Others' tokens fill the step (--max-batch-prefill-tokens)."""
    BATCH_SIZE = "batch_size"
    """As many sequences run as may (--max-batch-size)."""
    BLOCKS = "blocks"
    """The KV cache has too few free blocks (--max-batch-total-tokens)."""
    PREFIX = "prefix"
    """Another sequence just computes the beginning that both share."""
    DECODING_FIRST = "decoding_first"
    """--waiting-served-ratio and --max-waiting-tokens let the running ones go first."""
    ISOLATION = "isolation"
    """After a failed step its sequences are tried in smaller groups."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation. `id` grows with arrival, so the smaller id is the older sequence.

    Positions of a running sequence, each counter the end of what stands left of it:

        0 ............ num_confirmed ......... num_scheduled ......... max_kv_tokens
          KV computed,               in a step               not yet
          result read                in flight               scheduled

    Up to `prefill_end` the ids were known when it was admitted. Behind it every position is one
    decode, whose token the step before it samples; or a step verifies a draft of several, and how
    far that moves the sequence is known with its result.
    """

    id: int
    request: ValidRequest
    log: TokenLog
    prefix: PrefixKey
    """What its KV depends on; has the ids of `log`."""
    max_kv_tokens: int
    """Prompt and output but the last token, which is never fed to the model."""
    added_at: float
    status: Status = Status.WAITING
    blocks: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)
    """The nodes of the prefix cache whose blocks are the first of `blocks`."""
    num_scheduled: int = 0
    num_confirmed: int = 0
    prefill_end: int = 0
    last_step: int = 0
    """The number of the youngest step that it was put into."""
    num_drafted: int = 0
    """Drafted tokens that a step in flight verifies; until its result nothing is scheduled."""
    is_on_shard: bool = False
    scheduled_at: float | None = None
    """When its first chunk was put into a step."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    waits_for: WaitReason = WaitReason.NEXT_STEP
    """While it waits: as the last step was made."""
    times_passed: int = 0
    """How many younger ones of other callers joined while it was its caller's next."""
    is_beside: bool = False
    """Whether it joined beside one that is overdue, without delaying that."""
    keeps_until: int = 0
    """With fewer ids than these it gives way to no other caller if it is its own caller's last."""
    deferred_behind: tuple["Sequence", int] | None = None
    """Who computes its next block, and up to where that one must be confirmed for it."""

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are asked for and not all here yet."""
        return self.request.prompt_logprobs and not self.log.has_prompt_logprobs


def age(sequence: Sequence) -> int:
    """Sort key: the oldest first."""
    return sequence.id
