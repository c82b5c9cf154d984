"""How callers that want something at the same time share the steps and the blocks.

Used while there is more than one caller. Within a caller nothing changes: oldest first.

- Prompt tokens: each caller that wants some has an equal part of a step's budget; what one does
  not need goes to the others. Where a step is too small for all, those go first that have had the
  fewest (the counters of VTC, arXiv:2401.00588, over prompt tokens). A caller that comes back
  begins at the least of the others: it has first place, and no credit from the time before.
- Joining: whoever lacks only blocks is passed by nobody but callers that have nothing running. One
  that `MAX_PASSES` younger ones have passed is overdue: it has first choice, and then only those
  join before it that fit beside it in the pool. So large prompts cannot starve.
- Blocks and places: a caller that has nothing running may take an equal part of them from a caller
  that holds more than its own part. The youngest sequence of the one that holds most gives way. A
  caller's only running sequence does so if it is large, and gets on by `LEAST_PROGRESS` tokens
  before it does so again. The same ones give way when running sequences need blocks to grow.

The oldest sequence of all is preempted only after it has got on, so everybody ends some day.
"""

from collections.abc import Callable, Iterator

from kagami_router.scheduler.admission import Admission, hold, is_still_deferred
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.pool import KVPool
from kagami_router.scheduler.queues import Queues
from kagami_router.scheduler.sequence import Sequence, WaitReason
from kagami_router.scheduler.shared_step import (
    MAX_LACKING,
    Line,
    SharedStep,
    blocks_beside,
    is_overdue,
    most_blocks,
)
from kagami_router.scheduler.step_builder import StepBuilder

# A caller's only running sequence keeps its blocks if it has less than one of so many parts of all:
# else each newcomer of a busy server would stop somebody's stream.
LARGE_PART = 4
# Tokens that a caller's only running sequence gets before it gives way once more. It is prefilled
# again each time: this bounds what that costs, and how long others wait for it.
LEAST_PROGRESS = 64


class Fairness:
    """Shares steps between callers; owns what each of them has had."""

    def __init__(
        self, config: SchedulerConfig, queues: Queues, pool: KVPool, admission: Admission
    ) -> None:
        self._max_batch_size = config.max_batch_size
        self._queues = queues
        self._pool = pool
        self._admission = admission
        # As of the last shared step: only those that wanted something then.
        self._served: dict[str, int] = {}

    def make_room(self, builder: StepBuilder) -> Sequence | None:
        """Preempt whom the step needs preempted, before anything is in it.

        Returns the newcomer that it was done for, or that has first choice without; None = nobody.
        """
        running = self._queues.running
        if self._pool.num_available < len(running):
            self._make_room_to_grow(builder)
        if builder.preempted or not self._queues.waiting:
            return None
        beside: int | None = None
        for newcomer in self._newcomers(builder):
            if beside is not None and most_blocks(self._pool, newcomer) > beside:
                continue
            victims = self._who_gives_way_to(newcomer)
            if victims is not None:
                for victim in victims:
                    self._preempt(victim, builder)
                return newcomer
            if not is_overdue(newcomer):
                return None  # it is the shortest
            if beside is None:
                beside = blocks_beside(self._pool, running, newcomer)
        return None

    def _make_room_to_grow(self, builder: StepBuilder) -> None:
        """Have a block for each sequence whose next token needs one."""
        holdings = self._holdings()
        growing = {sequence for sequence in self._queues.running if self._grows(sequence)}
        while len(growing) > self._pool.num_available:
            givers = self._who_may_give(holdings) or [held for held in holdings if len(held) > 1]
            victim = max(givers, key=_num_blocks)[-1] if givers else self._queues.running[-1]
            _take_out(victim, holdings)
            growing.discard(victim)
            self._preempt(victim, builder)

    def _who_may_give(self, holdings: list[list[Sequence]]) -> list[list[Sequence]]:
        """The callers that have more blocks than their part, and whose youngest may give them up.

        One that runs a single sequence does not, unless that is large and got on since last time.
        """
        fair = self._pool.num_total // len(self._queues.callers)
        large = max(fair, self._pool.num_total // LARGE_PART)
        return [
            held
            for held in holdings
            if _num_blocks(held) > (fair if len(held) > 1 else large)
            and (len(held) > 1 or len(held[0].log.ids) >= held[0].keeps_until)
        ]

    def _grows(self, sequence: Sequence) -> bool:
        position = sequence.num_scheduled
        return (
            sequence.prefill_end <= position < sequence.max_kv_tokens
            and position >= len(sequence.blocks) * self._pool.block_size
            and not sequence.num_drafted
        )

    def _preempt(self, victim: Sequence, builder: StepBuilder) -> None:
        victim.keeps_until = len(victim.log.ids) + LEAST_PROGRESS
        self._queues.put_back(victim)
        builder.preempted.append(victim)

    def _holdings(self) -> list[list[Sequence]]:
        """The running sequences of each caller, oldest first."""
        by_caller: dict[str, list[Sequence]] = {}
        for sequence in self._queues.running:
            by_caller.setdefault(sequence.request.caller, []).append(sequence)
        return list(by_caller.values())

    def _newcomers(self, builder: StepBuilder) -> Iterator[Sequence]:
        """Next ones of callers that have nothing running, the shortest first; before, the overdue.

        They could join if there was room. Each costs a look into the prefix cache, so not all.
        """
        if self._queues.running and self._admission.interruption() is None:
            return
        active = {sequence.request.caller for sequence in self._queues.running}
        nexts: dict[str, Sequence] = {}
        for sequence in self._queues.waiting:
            if not is_still_deferred(sequence):
                nexts.setdefault(sequence.request.caller, sequence)
        candidates = [
            sequence
            for caller, sequence in nexts.items()
            if (caller not in active or is_overdue(sequence))
            and sequence.last_step <= builder.num_updated
        ]
        computing = self._admission.being_computed()
        for sequence in sorted(candidates, key=_urgency)[:MAX_LACKING]:
            path = self._pool.match(sequence) if computing else []
            if self._admission.blocker_of(sequence, path, computing) is None:
                yield sequence

    def _who_gives_way_to(self, newcomer: Sequence) -> list[Sequence] | None:
        """Those that have to be preempted for it, if any; None if it can have no room."""
        num_callers = len(self._queues.callers)
        num_needed = self._pool.num_missing(newcomer)
        fair_places = max(1, self._max_batch_size // num_callers)
        holdings = self._holdings()
        has_some = any(held[0].request.caller == newcomer.request.caller for held in holdings)
        may_take = not has_some and num_needed <= self._pool.num_total // num_callers
        num_available, num_left = self._pool.num_available, len(self._queues.running)
        victims: list[Sequence] = []
        while True:
            if num_left >= self._max_batch_size:
                givers = [held for held in holdings if len(held) > fair_places]
                size: Callable[[list[Sequence]], int] = len
            elif num_available < num_needed + num_left:  # a spare one for each, as for who joins
                givers, size = self._who_may_give(holdings), _num_blocks
            else:
                return victims
            if not givers or not may_take:
                return None
            victim = max(givers, key=size)[-1]
            victims.append(victim)
            num_available += len(victim.blocks)
            num_left -= 1
            _take_out(victim, holdings)

    def share(self, builder: StepBuilder, newcomer: Sequence | None, *, has_prefills: bool) -> None:
        """Put prompt chunks, and let join who may join; every caller has its part."""
        if not has_prefills and not self._queues.waiting:
            return
        may_join = self._may_join(builder, newcomer)
        only = newcomer if builder.preempted else None
        lines = self._lines(only, may_join=may_join)
        if newcomer is not None:  # first choice
            lines.sort(key=lambda line: newcomer not in line.waiting[:1])
        computing = self._admission.being_computed() if may_join else {}
        SharedStep(
            self._admission, self._pool, self._queues.running, builder, lines, computing
        ).fill()
        # Who was alone took from nobody.
        self._served = {line.caller: line.served for line in lines} if len(lines) > 1 else {}

    def _may_join(self, builder: StepBuilder, newcomer: Sequence | None) -> bool:
        if not self._queues.waiting:
            return False
        if not self._queues.running:
            return True
        if newcomer is not None and builder.preempted:  # for it
            builder.join_reason = self._admission.interruption()
        else:
            builder.join_reason = self._admission.join_reason(builder)
        return builder.join_reason is not None

    def _lines(self, only: Sequence | None, *, may_join: bool) -> list[Line]:
        """All that want prompt tokens, first choice first; `only` its caller's join, if given."""
        by_caller = {caller: Line(caller) for caller in self._queues.callers}
        for sequence in self._queues.running:
            line = by_caller[sequence.request.caller]
            line.num_running += 1
            if sequence.num_scheduled < sequence.prefill_end:
                line.prefills.append(sequence)
        if only is not None:
            hold(self._queues.waiting, WaitReason.BLOCKS)
        for sequence in self._queues.waiting:
            line = by_caller[sequence.request.caller]
            (line.deferred if is_still_deferred(sequence) else line.waiting).append(sequence)
            line.is_held = not may_join or (only is not None and line.caller != only.request.caller)
        lines = [line for line in by_caller.values() if line.wants_tokens]
        served = self._served
        least = min((served[line.caller] for line in lines if line.caller in served), default=0)
        for line in lines:
            line.served = served.get(line.caller, least)
        return sorted(lines, key=lambda line: line.rank)


def _urgency(sequence: Sequence) -> tuple[bool, int]:
    """Sort key among newcomers: who is overdue, the oldest first; then the shortest."""
    is_late = is_overdue(sequence)
    return not is_late, sequence.id if is_late else len(sequence.log.ids)


def _num_blocks(sequences: list[Sequence]) -> int:
    return sum(len(sequence.blocks) for sequence in sequences)


def _take_out(victim: Sequence, holdings: list[list[Sequence]]) -> None:
    """Victims are the youngest of theirs."""
    for held in holdings:
        if held[-1] is victim:
            held.pop()
    holdings[:] = [held for held in holdings if held]
