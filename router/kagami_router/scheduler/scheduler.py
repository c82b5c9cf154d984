"""Decides which sequences run next: token budget, blocks, prefix cache, preemption.

Pure: no await, clock, socket or tensor; time comes in as an argument. The order of calls is

    add, cancel, finish         at any time
    schedule() -> Step | None   as often as it gives one; one or two steps are in flight
    update(results) -> events   once for each step, in order

Steps run strictly in the order in which `schedule` made them. That is why a block may be given to
somebody else although a step in flight still writes to it (its sequence ended or was preempted):
the new owner's step comes later and writes over whatever was left. Only the prefix cache must not
see such a block, hence it takes only what a result confirmed for a sequence that still runs.

Whether a sequence ended by EOS or a stop string is not known here: the caller looks at ids and
text and calls `finish`. The length is counted here.
"""

import itertools
from bisect import insort
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kagami_router.request.token_log import TokenLog
from kagami_router.request.values import ValidRequest
from kagami_router.scheduler.blocks import BlockAllocator
from kagami_router.scheduler.isolation import FaultIsolation
from kagami_router.scheduler.prefix_cache import Node, PrefixCache
from kagami_router.scheduler.sequence import Sequence, Status, WaitReason, age
from kagami_router.scheduler.step import (
    Event,
    JoinReason,
    NewSequence,
    PoolStats,
    SequenceFailed,
    Step,
    StepResults,
    TokenSampled,
    Work,
)
from kagami_router.scheduler.step_builder import Draft

_make = tuple.__new__

# TGI's defaults for whichever of the two knobs is not given while the other is.
DEFAULT_WAITING_SERVED_RATIO = 0.3
DEFAULT_MAX_WAITING_TOKENS = 20


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The pool and the limits of a step.

    `waiting_served_ratio`, `max_waiting_tokens`: when newcomers may interrupt decoding, in TGI's
    sense; with neither they join as soon as the budget allows. `max_steps_in_flight`: with two, one
    runs while the router handles the result of the one before it (design §1.4).
    `cache_grows_to`: while more blocks than so many are cached, the oldest is given again before
    one that was never used, whose memory is not taken yet; None: all blocks are alike.
    """

    num_blocks: int
    block_size: int
    max_step_tokens: int
    max_batch_size: int
    waiting_served_ratio: float | None = None
    max_waiting_tokens: int | None = None
    prefix_caching: bool = True
    max_steps_in_flight: int = 2
    cache_grows_to: int | None = None


class Scheduler:
    """Decides which sequences run next. Pure: knows no clock, no socket, no tensor."""

    def __init__(self, config: SchedulerConfig) -> None:
        if config.max_step_tokens < 1 or config.max_batch_size < 1:
            raise ValueError("a step needs room for one token and one sequence")
        self._config = config
        self._allocator = BlockAllocator(config.num_blocks)
        self._cache = PrefixCache(self._allocator, config.block_size)
        self._isolation = FaultIsolation(
            max_batch_size=config.max_batch_size, max_step_tokens=config.max_step_tokens
        )
        self._sequences: dict[int, Sequence] = {}
        # Both oldest first.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._ids = itertools.count(1)
        self._num_scheduled = 0  # steps; the number of the youngest
        self._num_updated = 0  # of them with results; the number of the youngest
        self._in_flight: deque[Step] = deque()
        self._void: set[int] = set()
        self._drop_ids: list[int] = []
        self._steps_since_admission = 0

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled whose results have not come."""
        return len(self._in_flight)

    @property
    def is_idle(self) -> bool:
        return not self._sequences and not self._in_flight

    def add(self, request: ValidRequest, now: float) -> Sequence:
        """Queue one generation. The door has made sure that it fits alone in the pool."""
        max_kv_tokens = len(request.prompt_ids) + request.stopping.max_new_tokens - 1
        assert self._blocks_for(max_kv_tokens) <= self._allocator.num_total, "can never fit"
        log = TokenLog(request.prompt_ids)
        sequence = Sequence(next(self._ids), request, log, max_kv_tokens, added_at=now)
        self._sequences[sequence.id] = sequence
        self._waiting.append(sequence)
        return sequence

    def cancel(self, request_id: int) -> None:
        """Drop a sequence with the next step; one that ended already is none of our business."""
        if sequence := self._sequences.get(request_id):
            self._end(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence whose last token was EOS or completed a stop string."""
        self.cancel(sequence.id)

    def schedule(self, now: float) -> Step | None:
        """The next step, or None if there is nothing to compute or enough is in flight.

        One flat budget of tokens: every decode of a running sequence takes one, what is left goes
        to prompt chunks, oldest first, so a step's time is bounded whatever prompts come.
        """
        suspects = self._isolation.suspects()
        if len(self._in_flight) >= (1 if suspects else self._config.max_steps_in_flight):
            return None
        draft = Draft(
            self._num_scheduled + 1,
            tokens=self._isolation.max_step_tokens,
            room=self._isolation.max_batch_size,
        )
        eligible = suspects or self._running
        self._put_decodes(draft, eligible, suspects)
        if len(draft.work) < len(eligible):
            self._put_chunks(draft, eligible)
        reason = None
        if suspects or self._waiting:
            reason = self._join_reason(draft) if self._running and not suspects else None
            if suspects or reason is not None or not self._running:
                self._admit(draft, suspects, now)
        if not draft.work and (self._in_flight or not self._drop_ids):
            return None
        self._steps_since_admission = 0 if draft.new_sequences else self._steps_since_admission + 1
        self._num_scheduled = draft.number
        step = Step(
            draft.number,
            draft.new_sequences,
            self._drop_ids,
            draft.work,
            draft.num_decodes,
            draft.num_prefill_tokens,
            draft.num_samples,
            draft.preempted,
            draft.num_kv_tokens,
            reason if draft.new_sequences else None,
        )
        self._drop_ids = []
        self._in_flight.append(step)
        return step

    def _put_decodes(
        self, draft: Draft, eligible: list[Sequence], suspects: list[Sequence]
    ) -> None:
        block_size, work, number = self._config.block_size, draft.work, draft.number
        room = min(draft.tokens, draft.room)
        num_kv_tokens = 0
        for sequence in eligible.copy():  # whoever is preempted leaves it
            if len(work) >= room:
                break
            position = sequence.num_scheduled
            if (
                position < sequence.prefill_end
                or position >= sequence.max_kv_tokens  # its last token is being sampled
                or sequence.status is not Status.RUNNING  # a suspect, or preempted just now
            ):
                continue
            blocks: Seq[int] = ()
            if position >= len(sequence.blocks) * block_size:
                if not self._make_room_for(sequence, suspects, draft):
                    continue
                blocks = self._allocate(1)
                sequence.blocks += blocks
            # As `Work(...)`, which is a Python function and three times as dear.
            work.append(_make(Work, (sequence, position, 1, blocks, True)))
            sequence.num_scheduled = position + 1
            sequence.last_step = number
            num_kv_tokens += position + 1
        draft.count_decodes(len(work), num_kv_tokens)

    def _put_chunks(self, draft: Draft, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if draft.is_full:
                return
            missing = sequence.prefill_end - sequence.num_scheduled
            if sequence.status is Status.RUNNING and missing > 0:
                draft.put_chunk(sequence, min(missing, draft.tokens), ())

    def _join_reason(self, draft: Draft) -> JoinReason | None:
        """What lets newcomers join now (TGI's `waiting_served_ratio`, `max_waiting_tokens`)."""
        if draft.preempted:
            _hold(self._waiting, WaitReason.BLOCKS)
            return None
        ratio, max_waiting = self._config.waiting_served_ratio, self._config.max_waiting_tokens
        if ratio is None and max_waiting is None:
            return JoinReason.CHUNKING
        if ratio is None:
            ratio = DEFAULT_WAITING_SERVED_RATIO
        if max_waiting is None:
            max_waiting = DEFAULT_MAX_WAITING_TOKENS
        if len(self._waiting) >= int(ratio * len(self._running)):
            return JoinReason.BACKPRESSURE
        if self._steps_since_admission >= max_waiting:
            return JoinReason.WAIT_EXCEEDED
        _hold(self._waiting, WaitReason.DECODING_FIRST)
        return None

    def _admit(self, draft: Draft, suspects: list[Sequence], now: float) -> None:
        """Let waiting sequences join, oldest first; nobody passes one that lacks only blocks.

        One whose next block is just being computed by another waits for it and is passed.
        """
        being_computed = {} if suspects else self._being_computed()
        if suspects:
            _hold(self._waiting, WaitReason.ISOLATION)
        waiting = [each for each in suspects or self._waiting if each.status is Status.WAITING]
        for index, sequence in enumerate(waiting):
            if reason := self._no_room_for(sequence, draft, suspects):
                return _hold(waiting[index:], reason)
            if not suspects and _is_still_deferred(sequence):
                continue
            path = self._match(sequence)
            if blocker := self._blocker_of(sequence, path, being_computed):
                end = (len(path) + 1) * self._config.block_size
                sequence.deferred_behind = (blocker, end)
                sequence.waits_for = WaitReason.PREFIX
                continue
            if not self._take_blocks(sequence, path, suspects, draft):
                return _hold(waiting[index:], WaitReason.BLOCKS)
            self._start(sequence, draft, now)
            self._note_computing(sequence, being_computed)
        return None

    def _no_room_for(
        self, sequence: Sequence, draft: Draft, suspects: list[Sequence]
    ) -> WaitReason | None:
        """Why nobody may join this step any more, blocks aside."""
        if draft.tokens <= 0:
            return WaitReason.TOKEN_BUDGET
        if draft.room <= 0:
            return WaitReason.BATCH_SIZE
        if sequence.last_step > self._num_updated:
            return WaitReason.NEXT_STEP
        if not suspects and len(self._running) >= self._config.max_batch_size:
            return WaitReason.BATCH_SIZE
        return None

    def _match(self, sequence: Sequence) -> list[Node]:
        """The cached beginning of a sequence; its last known token is always computed."""
        if not self._looks_up(sequence):
            return []
        ids = sequence.log.ids
        return self._cache.match(ids, (len(ids) - 1) // self._config.block_size)

    def _looks_up(self, sequence: Sequence) -> bool:
        return self._config.prefix_caching and not sequence.wants_prompt_logprobs

    def _being_computed(self) -> "_Computing":
        computing: _Computing = {}
        if self._waiting:
            for sequence in self._running:
                self._note_computing(sequence, computing)
        return computing

    def _note_computing(self, sequence: Sequence, computing: "_Computing") -> None:
        """Note the block that a running prefill will bring to the prefix cache next."""
        index = len(sequence.path)
        if sequence.num_confirmed < (index + 1) * self._config.block_size <= sequence.prefill_end:
            parent = sequence.path[-1] if sequence.path else self._cache.root
            key = self._cache.key_of(sequence.log.ids, index)
            computing.setdefault((parent, key), sequence)

    def _blocker_of(
        self, sequence: Sequence, path: list[Node], computing: "_Computing"
    ) -> Sequence | None:
        """Who just computes the block behind `path`, if a waiting sequence could use it."""
        index = len(path)
        has_use = (index + 1) * self._config.block_size < len(sequence.log.ids)
        if not computing or not has_use or not self._config.prefix_caching:
            return None
        if sequence.wants_prompt_logprobs:
            return None
        parent = path[-1] if path else self._cache.root
        return computing.get((parent, self._cache.key_of(sequence.log.ids, index)))

    def _take_blocks(
        self, sequence: Sequence, path: list[Node], suspects: list[Sequence], draft: Draft
    ) -> bool:
        """Give a sequence the blocks of all that is known of it; False if there are too few.

        A newcomer leaves every running sequence room for one more block, else it would be
        preempted as soon as they grow. A suspect takes what it needs from those not on trial.
        """
        table = self._cache.acquire(path)
        num_new = self._blocks_for(len(sequence.log.ids)) - len(table)
        num_spare = 0 if suspects else len(self._running)
        while self._num_available < num_new + num_spare:
            bystanders = [each for each in self._running if each not in suspects]
            if not suspects or not bystanders:
                self._allocator.release(table)
                self._cache.release(path)
                return False
            self._preempt(bystanders[-1], draft)
        sequence.path = path
        sequence.blocks = table + self._allocate(num_new)
        return True

    def _start(self, sequence: Sequence, draft: Draft, now: float) -> None:
        """Move a sequence that has its blocks to the running ones, with its first chunk."""
        is_replay = sequence.scheduled_at is not None
        num_cached = len(sequence.path) * self._config.block_size
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            sequence.cached_tokens = num_cached
        sequence.status = Status.RUNNING
        sequence.deferred_behind = None
        sequence.num_scheduled = sequence.num_confirmed = num_cached
        sequence.prefill_end = len(sequence.log.ids)
        sequence.is_on_shard = True
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=age)
        draft.new_sequences.append(
            NewSequence(
                id=sequence.id,
                token_ids=sequence.log.ids.copy(),
                num_prompt_tokens=sequence.log.num_prompt,
                request=sequence.request,
                prompt_logprobs=sequence.wants_prompt_logprobs,
                num_cached_tokens=num_cached,
                is_replay=is_replay,
                looked_up=self._looks_up(sequence),
            )
        )
        count = min(sequence.prefill_end - num_cached, draft.tokens)
        draft.put_chunk(sequence, count, sequence.blocks.copy())

    def _make_room_for(self, sequence: Sequence, suspects: list[Sequence], draft: Draft) -> bool:
        """Have one block available by preempting the youngest; False if that is the asker itself.

        The oldest can always go on this way, and everybody is the oldest some day.
        """
        while self._num_available < 1:
            bystanders = [each for each in self._running if each not in suspects]
            victim = (bystanders if suspects and bystanders else self._running)[-1]
            self._preempt(victim, draft)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence, draft: Draft) -> None:
        self._put_back(victim)
        draft.preempted.append(victim)

    def _put_back(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits to be prefilled from its log."""
        self._running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.num_scheduled = sequence.num_confirmed = 0
        insort(self._waiting, sequence, key=age)

    def _end(self, sequence: Sequence) -> None:
        (self._running if sequence.status is Status.RUNNING else self._waiting).remove(sequence)
        self._release(sequence)
        sequence.status = Status.ENDED
        del self._sequences[sequence.id]

    def _release(self, sequence: Sequence) -> None:
        if sequence.is_on_shard:
            self._drop_ids.append(sequence.id)
            sequence.is_on_shard = False
        self._allocator.release(sequence.blocks)
        self._cache.release(sequence.path)
        sequence.blocks = []
        sequence.path = []

    def update(self, results: StepResults) -> list[Event]:
        """Take the results of the oldest step in flight; what they mean for each sequence.

        Tokens of a sequence that ended meanwhile are discarded; those of a preempted one count:
        they were computed before anybody else could write into its blocks.
        """
        step = self._in_flight.popleft()
        assert step.number == results.number, f"step {results.number} came for {step.number}"
        self._num_updated = step.number
        if step.number in self._void:
            self._void.remove(step.number)
            return []
        if results.error:
            return self._step_failed(step, results)
        events: list[Event] = []
        for failure in results.failures:
            self._fail(failure.sequence_id, failure.message, events)
        for scored in results.prompt_logprobs:
            if sequence := self._sequences.get(scored.sequence_id):
                sequence.log.take_prompt_logprobs(
                    scored.first_position, scored.logprobs, scored.top_tokens
                )
        self._confirm(step)
        self._isolation.step_succeeded()
        for sequence_id, token_id, logprob, top_tokens in results.samples:
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            ids = sequence.log.ids
            ids.append(token_id)
            is_last = len(ids) > sequence.max_kv_tokens
            if is_last:
                self._end(sequence)
            # As `TokenSampled(...)`, which is a Python function and three times as dear.
            events.append(_make(TokenSampled, (sequence, token_id, logprob, top_tokens, is_last)))
        if len(results.samples) < step.num_samples:
            self._fail_unanswered(step, results, events)
        return events

    def _confirm(self, step: Step) -> None:
        """Move confirmed positions on, and give full blocks to the prefix cache."""
        block_size, prefix_caching = self._config.block_size, self._config.prefix_caching
        for sequence, position, num_tokens, _, _ in step.work:
            if sequence.status is not Status.RUNNING:
                continue
            sequence.num_confirmed = end = position + num_tokens
            if end % block_size < num_tokens and prefix_caching:  # one or more became full
                num_full = end // block_size
                self._cache.insert(sequence.path, sequence.log.ids, sequence.blocks, num_full)

    def _step_failed(self, step: Step, results: StepResults) -> list[Event]:
        """Nothing of this step was computed, and the one behind it built on it: redo both."""
        culprit = self._isolation.step_failed(step.work, out_of_memory=results.out_of_memory)
        self._void.update(later.number for later in self._in_flight)
        for affected in (step, *self._in_flight):
            for work in affected.work:
                if work.sequence.status is Status.RUNNING:
                    self._put_back(work.sequence)
        events: list[Event] = []
        if culprit is not None:
            self._fail(culprit.id, results.error, events)
        return events

    def _fail(self, sequence_id: int, message: str, events: list[Event]) -> None:
        if sequence := self._sequences.get(sequence_id):
            path = sequence.path
            self._end(sequence)
            # What made it fail may be in its KV: nobody shall find that in the cache.
            self._cache.forget(path)
            events.append(SequenceFailed(sequence, message))

    def _fail_unanswered(self, step: Step, results: StepResults, events: list[Event]) -> None:
        """A sequence that should have a token but got none would never be scheduled again."""
        answered = {sequence_id for sequence_id, *_ in results.samples}
        for work in step.work:
            if work.samples and work.sequence.id not in answered:
                self._fail(work.sequence.id, "the shard returned no token", events)

    @property
    def _num_available(self) -> int:
        return self._allocator.num_free + self._allocator.num_cached

    def _allocate(self, count: int) -> list[int]:
        allocator, enough = self._allocator, self._config.cache_grows_to
        shortage = count - allocator.num_free
        if enough is not None:
            of_fresh = shortage + allocator.num_fresh
            shortage = max(shortage, min(of_fresh, allocator.num_cached - enough))
        if shortage > 0:
            self._cache.evict(shortage)
        return allocator.allocate(count)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)

    def stats(self) -> PoolStats:
        """The state of queue and pool, for the metrics."""
        return PoolStats(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks_total=self._allocator.num_total,
            blocks_used=self._allocator.num_held,
            blocks_cached=self._allocator.num_cached,
            running_tokens=sum(sequence.num_scheduled for sequence in self._running),
        )

    def check_integrity(self) -> None:
        """Assert that queues, tables, tree and counters tell one story."""
        everybody = self._waiting + self._running
        assert sorted(self._sequences) == sorted(sequence.id for sequence in everybody)
        assert [step.number for step in self._in_flight] == list(
            range(self._num_updated + 1, self._num_scheduled + 1)
        )
        last = {work.sequence: step.number for step in self._in_flight for work in step.work}
        for sequence in everybody:
            assert last.get(sequence, 0) == (
                sequence.last_step if sequence.last_step > self._num_updated else 0
            )
            assert sequence.log.num_generated < sequence.request.stopping.max_new_tokens
        assert self._waiting == sorted(self._waiting, key=age)
        for sequence in self._waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.blocks
            assert not sequence.path
            assert not sequence.is_on_shard
        assert self._running == sorted(self._running, key=age)
        for sequence in self._running:
            assert sequence.status is Status.RUNNING
            assert sequence.is_on_shard
            assert sequence.num_confirmed <= sequence.num_scheduled <= sequence.max_kv_tokens
            assert sequence.num_scheduled <= len(sequence.blocks) * self._config.block_size
            assert len(sequence.path) <= sequence.num_confirmed // self._config.block_size
            known = max(sequence.prefill_end, sequence.num_confirmed + 1)
            assert len(sequence.log.ids) == known
        self._cache.check_integrity([(each.path, each.blocks) for each in everybody])
        self._allocator.check_integrity(
            (sequence.blocks for sequence in everybody),
            (node.block for node in self._cache.nodes()),
        )


# The block somebody computes (its parent in the tree, its tokens), and who.
_Computing = dict[tuple[Node, tuple[int, ...]], Sequence]


def _hold(sequences: list[Sequence], reason: WaitReason) -> None:
    """Note for all of them what they wait for."""
    for sequence in sequences:
        sequence.waits_for = reason


def _is_still_deferred(sequence: Sequence) -> bool:
    if sequence.deferred_behind is None:
        return False
    blocker, end = sequence.deferred_behind
    return blocker.status is Status.RUNNING and blocker.num_confirmed < end
