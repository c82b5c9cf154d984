"""The step that the scheduler is just making."""

from collections.abc import Sequence as Seq

from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import NewSequence, Work


class Draft:
    """The step being made: what is left of its budgets, and what is in it so far."""

    __slots__ = (
        "new_sequences",
        "num_decodes",
        "num_kv_tokens",
        "num_prefill_tokens",
        "num_samples",
        "number",
        "preempted",
        "room",
        "tokens",
        "work",
    )

    def __init__(self, number: int, *, tokens: int, room: int) -> None:
        self.number = number
        self.tokens = tokens
        self.room = room
        self.work: list[Work] = []
        self.new_sequences: list[NewSequence] = []
        self.num_decodes = 0
        self.num_prefill_tokens = 0
        self.num_samples = 0
        self.num_kv_tokens = 0
        self.preempted: list[Sequence] = []

    @property
    def is_full(self) -> bool:
        return self.tokens <= 0 or self.room <= 0

    def put_chunk(self, sequence: Sequence, count: int, blocks: Seq[int]) -> None:
        """Schedule the next `count` positions of a sequence that is being prefilled."""
        position = sequence.num_scheduled
        end = position + count
        samples = end >= sequence.prefill_end
        self.work.append(Work(sequence, position, count, blocks, samples))
        self.num_samples += samples
        self.num_kv_tokens += end
        self.num_prefill_tokens += count
        sequence.num_scheduled = end
        sequence.last_step = self.number
        self.tokens -= count
        self.room -= 1

    def count_decodes(self, count: int, num_kv_tokens: int) -> None:
        """What `work` has just got: decodes, and the positions that they attend to."""
        self.num_decodes += count
        self.num_samples += count
        self.num_kv_tokens += num_kv_tokens
        self.tokens -= count
        self.room -= count
