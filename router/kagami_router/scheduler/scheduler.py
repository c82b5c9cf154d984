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

What the scheduler consists of: `queues.py` has who waits and runs, `pool.py` the blocks,
`admission.py` decides who joins, `fairness.py` what each of several callers gets, `isolation.py`
who may run at all after a failed step.
"""

import itertools
from collections import deque
from collections.abc import Sequence as Seq

from kagami_proto.values import Wanted
from kagami_router.request.token_log import TokenLog
from kagami_router.request.values import ValidRequest
from kagami_router.scheduler.admission import Admission
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.fairness import Fairness
from kagami_router.scheduler.isolation import FaultIsolation
from kagami_router.scheduler.pool import KVPool
from kagami_router.scheduler.prefix_cache import PrefixKey
from kagami_router.scheduler.queues import Queues
from kagami_router.scheduler.sequence import Sequence, Status, age
from kagami_router.scheduler.speculation import Drafter, put_drafts
from kagami_router.scheduler.step import (
    Event,
    PoolStats,
    SequenceFailed,
    Step,
    StepResults,
    TokenSampled,
    VectorComputed,
    WorkItem,
)
from kagami_router.scheduler.step_builder import StepBuilder

_make = tuple.__new__


class Scheduler:
    """Decides which sequences run next. Pure: knows no clock, no socket, no tensor."""

    def __init__(self, config: SchedulerConfig, drafter: Drafter | None = None) -> None:
        self._drafter = drafter
        self._pool = KVPool(config)
        self._queues = Queues(self._pool)
        self._admission = Admission(config, self._queues, self._pool)
        self._fairness = Fairness(config, self._queues, self._pool, self._admission)
        self._isolation = FaultIsolation(
            max_batch_size=config.max_batch_size,
            max_step_tokens=config.max_step_tokens,
            max_steps_in_flight=config.max_steps_in_flight,
        )
        self._ids = itertools.count(1)
        self._num_scheduled = 0  # steps; the number of the youngest
        self._num_updated = 0  # of them with results; the number of the youngest
        self._in_flight: deque[Step] = deque()
        self._void: set[int] = set()

    @property
    def is_idle(self) -> bool:
        return not self._queues.by_id and not self._in_flight

    def add(self, request: ValidRequest, now: float) -> Sequence:
        """Queue one generation. Validation has made sure that it fits alone in the pool."""
        most = request.max_kv_tokens
        assert self._pool.blocks_for(most) <= self._pool.num_total, "can never fit"
        log = TokenLog(request.prompt_ids)
        prefix = PrefixKey(log.ids, request.adapter, request.prompt.media)
        sequence = Sequence(next(self._ids), request, log, prefix, most, added_at=now)
        self._queues.add(sequence)
        return sequence

    def cancel(self, request_id: int) -> None:
        """Drop a sequence with the next step; one that ended already is none of our business."""
        if sequence := self._queues.by_id.get(request_id):
            self._queues.end(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence whose last token was EOS or completed a stop string."""
        self.cancel(sequence.id)

    def schedule(self, now: float) -> Step | None:
        """The next step, or None if there is nothing to compute or enough is in flight.

        One flat budget of tokens: every decode of a running sequence takes one, what is left goes
        to prompt chunks, so a step's time is bounded whatever prompts come. Each caller has an
        equal part of it, and within a caller the oldest goes first.
        """
        eligible = self._isolation.eligible()
        if len(self._in_flight) >= eligible.max_steps_in_flight:
            return None
        builder = StepBuilder(
            self._num_scheduled + 1,
            now,
            tokens=self._isolation.max_step_tokens,
            room=self._isolation.max_batch_size,
            num_updated=self._num_updated,
            eligible=eligible,
        )
        is_shared = len(self._queues.callers) > 1 and not eligible.joins_at_once
        newcomer = self._fairness.make_room(builder) if is_shared else None
        running = eligible.may_run(self._queues.running)
        if self._drafter is not None:
            running = put_drafts(self._drafter, builder, running, self._pool)
        has_prefills = self._put_decodes(builder, running) < len(running)
        if is_shared:
            self._fairness.share(builder, newcomer, has_prefills=has_prefills)
        else:
            if has_prefills:
                self._put_chunks(builder, running)
            if self._queues.waiting:
                self._admission.admit(builder)
        if not builder.work and (self._in_flight or not self._queues.has_drops):
            return None
        self._admission.step_made(builder)
        self._num_scheduled = builder.number
        step = builder.freeze(self._queues.take_drop_ids())
        self._in_flight.append(step)
        return step

    def _put_decodes(self, builder: StepBuilder, sequences: list[Sequence]) -> int:
        """The next token of all that decode, as far as there is room; how many they are."""
        block_size, work, number = self._pool.block_size, builder.work, builder.number
        num_before, one_token = len(work), Wanted.ONE_TOKEN
        room = num_before + min(builder.tokens, builder.room)
        num_kv_tokens = 0
        for sequence in sequences.copy():  # whoever is preempted leaves it
            if len(work) >= room:
                break
            position = sequence.num_scheduled
            if (
                position < sequence.prefill_end
                or position >= sequence.max_kv_tokens  # its last token is being sampled
                or sequence.status is not Status.RUNNING  # on trial, or preempted just now
            ):
                continue
            blocks: Seq[int] = ()
            if position >= len(sequence.blocks) * block_size:
                if not self._make_room_for(sequence, builder):
                    continue
                blocks = self._pool.allocate(1)
                sequence.blocks += blocks
            # As `WorkItem(...)`, which is a Python function and takes three times as long.
            work.append(_make(WorkItem, (sequence, position, 1, blocks, one_token)))
            sequence.num_scheduled = position + 1
            sequence.last_step = number
            num_kv_tokens += position + 1
        count = len(work) - num_before
        builder.count_decodes(count, num_kv_tokens)
        return count

    def _put_chunks(self, builder: StepBuilder, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if builder.is_full:
                return
            is_prefilling = sequence.num_scheduled < sequence.prefill_end
            if is_prefilling and sequence.status is Status.RUNNING:
                builder.put_chunk(sequence, ())

    def _make_room_for(self, sequence: Sequence, builder: StepBuilder) -> bool:
        """Have one block available by preempting the youngest; False if that is the asker itself.

        The oldest can always go on this way, and everybody is the oldest some day.
        """
        running = self._queues.running
        while self._pool.num_available < 1:
            victim = builder.eligible.bystander(running) or running[-1]
            self._queues.put_back(victim)
            builder.preempted.append(victim)
            if victim is sequence:
                return False
        return True

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
            if sequence := self._queues.by_id.get(scored.sequence_id):
                sequence.log.take_prompt_logprobs(
                    scored.first_position, scored.logprobs, scored.top_tokens
                )
        self._confirm(step)
        by_id = self._queues.by_id
        for sequence_id, token_id, logprob, top_tokens in results.samples:
            sequence = by_id.get(sequence_id)
            if sequence is None:
                continue
            ids = sequence.log.ids
            ids.append(token_id)
            is_last = len(ids) > sequence.max_kv_tokens
            if is_last:
                if sequence.num_drafted:
                    self._accept(sequence)
                self._queues.end(sequence)
            # As `TokenSampled(...)`, which is a Python function and takes three times as long.
            events.append(_make(TokenSampled, (sequence, token_id, logprob, top_tokens, is_last)))
        for work in step.work[: len(step.drafts)]:
            if work.sequence.num_drafted:
                self._accept(work.sequence)
        for sequence_id, vector in results.vectors:
            if sequence := self._queues.by_id.get(sequence_id):
                self._queues.end(sequence)
                events.append(VectorComputed(sequence, vector))
        if len(results.samples) + len(results.vectors) < step.num_answers or step.drafts:
            self._fail_unanswered(step, results, events)
        self._isolation.step_succeeded()
        return events

    def _accept(self, sequence: Sequence) -> None:
        """Move a sequence on by what was accepted of its draft; the rest is written over."""
        if sequence.status is Status.RUNNING:
            before = sequence.num_confirmed
            end = len(sequence.log.ids) - 1  # the last id was never fed
            sequence.num_scheduled = sequence.num_confirmed = end
            if self._pool.prefix_caching and end // self._pool.block_size > before // (
                self._pool.block_size
            ):
                self._pool.cache_up_to(sequence, end)
        sequence.num_drafted = 0

    def _confirm(self, step: Step) -> None:
        """Move confirmed positions on, and give full blocks to the prefix cache."""
        block_size, prefix_caching = self._pool.block_size, self._pool.prefix_caching
        work = step.work
        if step.drafts:  # what of them counts is known with their tokens
            work = work[len(step.drafts) :]
        for sequence, position, num_tokens, _, _ in work:
            if sequence.status is not Status.RUNNING:
                continue
            sequence.num_confirmed = end = position + num_tokens
            if end % block_size < num_tokens and prefix_caching:  # one or more became full
                self._pool.cache_up_to(sequence, end)

    def _step_failed(self, step: Step, results: StepResults) -> list[Event]:
        """Nothing of this step was computed, and the one behind it built on it: redo both."""
        culprit = self._isolation.step_failed(step.work, out_of_memory=results.out_of_memory)
        self._void.update(later.number for later in self._in_flight)
        for affected in (step, *self._in_flight):
            for work in affected.work:
                if work.sequence.status is Status.RUNNING:
                    self._queues.put_back(work.sequence)
        events: list[Event] = []
        if culprit is not None:
            self._fail(culprit.id, results.error, events)
        return events

    def _fail(self, sequence_id: int, message: str, events: list[Event]) -> None:
        if sequence := self._queues.by_id.get(sequence_id):
            path = sequence.path
            self._queues.end(sequence)
            # What made it fail may be in its KV: nobody shall find that in the cache.
            self._pool.forget(path)
            events.append(SequenceFailed(sequence, message))

    def _fail_unanswered(self, step: Step, results: StepResults, events: list[Event]) -> None:
        """A sequence that should have a token but got none would never be scheduled again."""
        answered = {sequence_id for sequence_id, *_ in (*results.samples, *results.vectors)}
        for work in step.work:
            if work.wanted is not Wanted.NOTHING and work.sequence.id not in answered:
                what = "vector" if work.wanted is Wanted.VECTOR else "token"
                self._fail(work.sequence.id, f"the shard returned no {what}", events)

    def successor(self, config: SchedulerConfig) -> tuple["Scheduler", list[Event]]:
        """A scheduler for shards that know nothing, and what that means for some sequences.

        Everybody waits in it, to be prefilled from the log; steps in flight count no more. Who does
        not fit into its pool is ended. This one is of no use afterwards.
        """
        heir = Scheduler(config, self._drafter)
        heir._ids = self._ids
        events: list[Event] = []
        for sequence in sorted(self._queues.by_id.values(), key=age):
            if heir._pool.blocks_for(sequence.max_kv_tokens) > heir._pool.num_total:
                self._queues.end(sequence)
                events.append(SequenceFailed(sequence, "the KV cache has no room for it any more"))
                continue
            if sequence.status is Status.RUNNING:
                self._queues.put_back(sequence)
            sequence.last_step = 0
            sequence.deferred_behind = None
            heir._queues.add(sequence)
        return heir, events

    def stats(self) -> PoolStats:
        """The state of queue and pool, for the metrics."""
        return PoolStats(
            running=len(self._queues.running),
            waiting=len(self._queues.waiting),
            blocks_total=self._pool.num_total,
            blocks_used=self._pool.num_used,
            blocks_cached=self._pool.num_cached,
            running_tokens=sum(sequence.num_scheduled for sequence in self._queues.running),
        )

    def check_integrity(self) -> None:
        """Assert that queues, tables, tree and counters tell one story."""
        self._queues.check_integrity()
        assert [step.number for step in self._in_flight] == list(
            range(self._num_updated + 1, self._num_scheduled + 1)
        )
        last = {work.sequence: step.number for step in self._in_flight for work in step.work}
        for sequence in self._queues.by_id.values():
            assert last.get(sequence, 0) == (
                sequence.last_step if sequence.last_step > self._num_updated else 0
            )
            assert len(sequence.log.ids) <= sequence.max_kv_tokens
        for sequence in self._queues.running:
            assert sequence.num_confirmed <= sequence.num_scheduled <= sequence.max_kv_tokens
            assert sequence.num_scheduled <= len(sequence.blocks) * self._pool.block_size
            assert len(sequence.path) <= sequence.num_confirmed // self._pool.block_size
            known = max(sequence.prefill_end, sequence.num_confirmed + 1)
            assert len(sequence.log.ids) == known
            assert not sequence.num_drafted or sequence.last_step > self._num_updated
