"""The step that the scheduler makes just now; frozen, it is a `Step`."""

from collections.abc import Sequence as Seq

from kagami_proto.values import Wanted
from kagami_router.scheduler.isolation import Eligibility
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import JoinReason, NewSequence, Step, WorkItem


class StepBuilder:
    """What is in the step until now, what is left of its budgets, and who may be in it."""

    __slots__ = (
        "drafts",
        "eligible",
        "join_reason",
        "new_sequences",
        "now",
        "num_answers",
        "num_decodes",
        "num_kv_tokens",
        "num_prefill_tokens",
        "num_updated",
        "number",
        "preempted",
        "room",
        "tokens",
        "work",
    )

    def __init__(
        self,
        number: int,
        now: float,
        *,
        tokens: int,
        room: int,
        num_updated: int,
        eligible: Eligibility,
    ) -> None:
        self.number = number
        self.now = now
        self.tokens = tokens
        """The budget: how many more tokens it may compute"""
        self.room = room
        """How many more sequences may be in it"""
        self.num_updated = num_updated
        """The number of the youngest step whose results are known"""
        self.eligible = eligible
        self.join_reason: JoinReason | None = None
        self.work: list[WorkItem] = []
        self.drafts: dict[int, Seq[int]] = {}
        self.new_sequences: list[NewSequence] = []
        self.num_decodes = 0
        self.num_prefill_tokens = 0
        self.num_answers = 0
        self.num_kv_tokens = 0
        self.preempted: list[Sequence] = []

    @property
    def is_full(self) -> bool:
        return self.tokens <= 0 or self.room <= 0

    def put_chunk(self, sequence: Sequence, blocks: Seq[int]) -> None:
        """As much of the missing prefill of a sequence as the budget allows."""
        position = sequence.num_scheduled
        count = min(sequence.prefill_end - position, self.tokens)
        end = position + count
        wanted = Wanted.NOTHING
        if end >= sequence.prefill_end:
            wanted = Wanted.VECTOR if sequence.request.wants_vector else Wanted.ONE_TOKEN
            self.num_answers += 1
        self.work.append(WorkItem(sequence, position, count, blocks, wanted))
        self.num_kv_tokens += end
        self.num_prefill_tokens += count
        sequence.num_scheduled = end
        sequence.last_step = self.number
        self.tokens -= count
        self.room -= 1

    def put_more(self, sequence: Sequence) -> None:
        """A chunk, or a longer one where it has one in this step already."""
        if sequence.last_step != self.number:
            if self.room > 0:
                self.put_chunk(sequence, ())
            return
        index = next(i for i, item in enumerate(self.work) if item.sequence is sequence)
        item = self.work.pop(index)
        self.put_chunk(sequence, item.blocks)
        more = self.work.pop()
        self.work.insert(
            index,
            more._replace(position=item.position, num_tokens=item.num_tokens + more.num_tokens),
        )
        self.num_kv_tokens -= item.position + item.num_tokens
        self.room += 1

    def put_draft(self, sequence: Sequence, draft: Seq[int], blocks: Seq[int]) -> None:
        """Verify what may follow the last known token of a sequence."""
        position = sequence.num_scheduled
        count = 1 + len(draft)
        self.work.append(WorkItem(sequence, position, count, blocks, Wanted.VERIFY))
        self.drafts[sequence.id] = draft
        sequence.num_drafted = len(draft)
        sequence.num_scheduled = position + count
        sequence.last_step = self.number
        self.num_answers += 1
        self.num_decodes += count
        self.num_kv_tokens += position + count
        self.tokens -= count
        self.room -= 1

    def count_decodes(self, count: int, num_kv_tokens: int) -> None:
        """What `work` has just got: decodes, and the positions that they attend to."""
        self.num_decodes += count
        self.num_answers += count
        self.num_kv_tokens += num_kv_tokens
        self.tokens -= count
        self.room -= count

    def freeze(self, drop_ids: list[int]) -> Step:
        """The step as it is sent."""
        return Step(
            number=self.number,
            new_sequences=self.new_sequences,
            drop_ids=drop_ids,
            work=self.work,
            num_decodes=self.num_decodes,
            num_prefill_tokens=self.num_prefill_tokens,
            num_answers=self.num_answers,
            preempted=self.preempted,
            num_kv_tokens=self.num_kv_tokens,
            join_reason=self.join_reason if self.new_sequences else None,
            drafts=self.drafts,
        )
