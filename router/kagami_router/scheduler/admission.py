"""Which waiting sequences join the step that is being made.

Oldest first: nobody passes one that lacks only blocks. One whose next block another sequence
computes just now waits for it and is passed: it finds that block in the prefix cache soon.
"""

from collections.abc import Sequence as Seq

from kagami_router.scheduler.config import (
    DEFAULT_MAX_WAITING_TOKENS,
    DEFAULT_WAITING_SERVED_RATIO,
    SchedulerConfig,
)
from kagami_router.scheduler.pool import BlockPlace, KVPool
from kagami_router.scheduler.prefix_cache import Node
from kagami_router.scheduler.queues import Queues
from kagami_router.scheduler.sequence import Sequence, Status, WaitReason
from kagami_router.scheduler.step import JoinReason, NewSequence
from kagami_router.scheduler.step_builder import StepBuilder


class Admission:
    """Moves sequences from the waiting to the running ones, with their blocks."""

    def __init__(self, config: SchedulerConfig, queues: Queues, pool: KVPool) -> None:
        self._config = config
        self._queues = queues
        self._pool = pool
        self._steps_since_admission = 0

    def admit(self, builder: StepBuilder) -> None:
        """Let join who may join now, of those that wait; all are one caller's, or on trial."""
        is_free = builder.eligible.joins_at_once or not self._queues.running
        if not is_free:
            builder.join_reason = self.join_reason(builder)
        if is_free or builder.join_reason is not None:
            self._let_join(builder)

    def step_made(self, builder: StepBuilder) -> None:
        """Count the steps that brought nobody new."""
        self._steps_since_admission = (
            0 if builder.new_sequences else self._steps_since_admission + 1
        )

    def join_reason(self, builder: StepBuilder) -> JoinReason | None:
        """What lets newcomers join beside those that run; None, and they are told why."""
        waiting = self._queues.waiting
        if builder.preempted:
            hold(waiting, WaitReason.BLOCKS)
            return None
        reason = self.interruption()
        if reason is None:
            hold(waiting, WaitReason.DECODING_FIRST)
        return reason

    def interruption(self) -> JoinReason | None:
        """What lets newcomers interrupt (TGI's `waiting_served_ratio`, `max_waiting_tokens`)."""
        ratio, max_waiting = self._config.waiting_served_ratio, self._config.max_waiting_tokens
        if ratio is None and max_waiting is None:
            return JoinReason.CHUNKING
        if ratio is None:
            ratio = DEFAULT_WAITING_SERVED_RATIO
        if max_waiting is None:
            max_waiting = DEFAULT_MAX_WAITING_TOKENS
        if len(self._queues.waiting) >= int(ratio * len(self._queues.running)):
            return JoinReason.BACKPRESSURE
        if self._steps_since_admission >= max_waiting:
            return JoinReason.WAIT_EXCEEDED
        return None

    def _let_join(self, builder: StepBuilder) -> None:
        eligible = builder.eligible
        if eligible.joins_at_once:
            hold(self._queues.waiting, WaitReason.ISOLATION)
        waiting = eligible.may_join(self._queues.waiting)
        computing = {} if eligible.joins_at_once else self.being_computed()
        for index, sequence in enumerate(waiting):
            reason = self.join(sequence, builder, computing)
            if reason is not None and reason is not WaitReason.PREFIX:
                return hold(waiting[index:], reason)
        return None

    def join(
        self, sequence: Sequence, builder: StepBuilder, computing: dict[BlockPlace, Sequence]
    ) -> WaitReason | None:
        """Let one join the step; else what it waits for, and with PREFIX it may be passed.

        `computing` has the blocks that running prefills bring next, and who computes each of them.
        """
        if reason := self._no_room_for(sequence, builder):
            return reason
        if not builder.eligible.joins_at_once and is_still_deferred(sequence):
            return WaitReason.PREFIX
        path = self._pool.match(sequence)
        if blocker := self.blocker_of(sequence, path, computing):
            end = (len(path) + 1) * self._pool.block_size
            sequence.deferred_behind = (blocker, end)
            sequence.waits_for = WaitReason.PREFIX
            return WaitReason.PREFIX
        if not self._take_blocks(sequence, path, builder):
            return WaitReason.BLOCKS
        self._start(sequence, builder)
        if place := self._pool.being_computed(sequence):
            computing.setdefault(place, sequence)
        return None

    def _no_room_for(self, sequence: Sequence, builder: StepBuilder) -> WaitReason | None:
        """Why nobody may join this step any more, blocks aside."""
        if builder.tokens <= 0:
            return WaitReason.TOKEN_BUDGET
        if builder.room <= 0:
            return WaitReason.BATCH_SIZE
        if sequence.last_step > builder.num_updated:
            return WaitReason.NEXT_STEP
        has_place = len(self._queues.running) < self._config.max_batch_size
        if not has_place and not builder.eligible.joins_at_once:
            return WaitReason.BATCH_SIZE
        return None

    def being_computed(self) -> dict[BlockPlace, Sequence]:
        """The blocks that running prefills bring next, and who computes each of them."""
        computing: dict[BlockPlace, Sequence] = {}
        for sequence in self._queues.running:
            if place := self._pool.being_computed(sequence):
                computing.setdefault(place, sequence)
        return computing

    def blocker_of(
        self, sequence: Sequence, path: list[Node], computing: dict[BlockPlace, Sequence]
    ) -> Sequence | None:
        """Who computes the block behind `path` just now, if a waiting sequence could use it."""
        place = self._pool.usable_behind(sequence, path) if computing else None
        return computing.get(place) if place else None

    def _take_blocks(self, sequence: Sequence, path: list[Node], builder: StepBuilder) -> bool:
        """Give a sequence the blocks of all that is known of it; False if there are too few."""
        pool, running = self._pool, self._queues.running
        table = pool.acquire(path)
        num_new = pool.blocks_for(len(sequence.log.ids)) - len(table)
        num_needed = num_new + builder.eligible.num_spare_blocks(running)
        while pool.num_available < num_needed:
            bystander = builder.eligible.bystander(running)
            if bystander is None:
                pool.give_back(table, path)
                return False
            self._queues.put_back(bystander)
            builder.preempted.append(bystander)
        sequence.path = path
        sequence.blocks = table + pool.allocate(num_new)
        return True

    def _start(self, sequence: Sequence, builder: StepBuilder) -> None:
        """Move a sequence that has its blocks to the running ones, with its first chunk."""
        is_replay = sequence.scheduled_at is not None
        num_cached = len(sequence.path) * self._pool.block_size
        if sequence.scheduled_at is None:
            sequence.scheduled_at = builder.now
            sequence.cached_tokens = num_cached
        sequence.deferred_behind = None
        sequence.num_scheduled = sequence.num_confirmed = num_cached
        sequence.prefill_end = len(sequence.log.ids)
        self._queues.start(sequence)
        builder.new_sequences.append(
            NewSequence(
                id=sequence.id,
                token_ids=sequence.log.ids.copy(),
                num_prompt_tokens=sequence.log.num_prompt,
                request=sequence.request,
                prompt_logprobs=sequence.wants_prompt_logprobs,
                num_cached_tokens=num_cached,
                is_replay=is_replay,
                looked_up=self._pool.looks_up(sequence),
            )
        )
        builder.put_chunk(sequence, sequence.blocks.copy())


def hold(sequences: Seq[Sequence], reason: WaitReason) -> None:
    """Note for all of them what they wait for."""
    for sequence in sequences:
        sequence.waits_for = reason


def is_still_deferred(sequence: Sequence) -> bool:
    """Whether somebody computes its next block still."""
    if sequence.deferred_behind is None:
        return False
    blocker, end = sequence.deferred_behind
    return blocker.status is Status.RUNNING and blocker.num_confirmed < end
