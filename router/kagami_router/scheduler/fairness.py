"""How callers that want something at the same time share the steps and the blocks.

Used while there is more than one caller. Within a caller nothing changes: oldest first.

- Prompt tokens: each caller that wants some has an equal part of a step's budget; what one does
  not need goes to the others. Where a step is too small for all, those go first that have had the
  fewest (the counters of VTC, arXiv:2401.00588, over prompt tokens). A caller that comes back
  begins at the least of the others: it has first place, and no credit from the time before.
- Joining: whoever lacks only blocks is passed by nobody but callers that have nothing running, and
  by `MAX_PASSES` of them at most; then all wait for it. So large prompts cannot starve.
- Blocks and places: a caller that has nothing running may take an equal part of them from a caller
  that holds more than its own part. The youngest sequence of the one that holds most gives way. A
  caller's only running sequence does so if it is large, and gets on by `LEAST_PROGRESS` tokens
  before it does so again. The same ones give way when running sequences need blocks to grow.

The oldest sequence of all is preempted only after it has got on, so everybody ends some day.
"""

from dataclasses import dataclass, field

from kagami_router.scheduler.admission import Admission, hold, is_still_deferred
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.pool import BlockPlace, KVPool
from kagami_router.scheduler.queues import Queues
from kagami_router.scheduler.sequence import Sequence, WaitReason
from kagami_router.scheduler.step_builder import StepBuilder

# The least part of a step that is worth a place in it.
MIN_PART = 32
# How many newcomers of other callers may pass a sequence that has no room. High, because all who
# come later wait until it has; and a bound, because it has to get it.
MAX_PASSES = 64
# How many lines look for blocks in vain in one step. The first is one for whom room was made.
MAX_LACKING = 8
# A caller's only running sequence keeps its blocks if it has less than one of so many parts of all:
# else each newcomer of a busy server would stop somebody's stream.
LARGE_PART = 4
# Tokens that a caller's only running sequence gets before it gives way once more. It is prefilled
# again each time: this bounds what that costs, and how long others wait for it.
LEAST_PROGRESS = 64


@dataclass(slots=True, eq=False)
class _Line:
    """What one caller wants of a step; every list is oldest first."""

    caller: str
    prefills: list[Sequence] = field(default_factory=list)
    """Running, with a part of the prompt still to be computed."""
    waiting: list[Sequence] = field(default_factory=list)
    deferred: list[Sequence] = field(default_factory=list)
    """Waiting for a prefix that somebody computes."""
    num_running: int = 0
    num_joined: int = 0
    served: int = 0
    """Prompt tokens that it has had, counted from where the others were when it came."""
    is_held: bool = False
    """Nobody of it joins this step any more."""
    lacks_blocks: bool = False

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Sort key: the first has first choice."""
        is_urgent = bool(self.waiting) and is_overdue(self.waiting[0])
        oldest = min(wanting[0].id for wanting in self._wanting if wanting)
        return not is_urgent, self.served, oldest

    @property
    def _wanting(self) -> tuple[list[Sequence], ...]:
        return self.prefills, self.waiting, self.deferred

    @property
    def wants_tokens(self) -> bool:
        """Whether it has a use for a part of the step."""
        return any(self._wanting)


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
        newcomer = self._newcomer(builder)
        if newcomer is not None:
            for victim in self._who_gives_way_to(newcomer):
                self._preempt(victim, builder)
        return newcomer

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

    def _newcomer(self, builder: StepBuilder) -> Sequence | None:
        """Who is overdue, else the shortest whose caller has nothing running; it could join now."""
        if self._queues.running and self._admission.interruption() is None:
            return None
        active = {sequence.request.caller for sequence in self._queues.running}
        candidates = [
            each
            for each in self._queues.waiting
            if (each.request.caller not in active or is_overdue(each))
            and each.last_step <= builder.num_updated
            and not is_still_deferred(each)
        ]
        computing = self._admission.being_computed()
        for sequence in sorted(candidates, key=_urgency):
            path = self._pool.match(sequence) if computing else []
            if self._admission.blocker_of(sequence, path, computing) is None:
                return sequence
        return None

    def _who_gives_way_to(self, newcomer: Sequence) -> list[Sequence]:
        """Those that have to be preempted for it; nobody if that is not enough or not needed."""
        num_callers = len(self._queues.callers)
        num_needed = self._pool.num_missing(newcomer)
        fair_blocks = self._pool.num_total // num_callers
        fair_places = max(1, self._max_batch_size // num_callers)
        holdings = self._holdings()
        has_some = any(held[0].request.caller == newcomer.request.caller for held in holdings)
        if has_some or num_needed > fair_blocks:
            return []
        num_available, num_left = self._pool.num_available, len(self._queues.running)
        victims: list[Sequence] = []
        while True:
            if num_left >= self._max_batch_size:
                givers = [held for held in holdings if len(held) > fair_places]
                victim = max(givers, key=len)[-1] if givers else None
            elif num_available < num_needed + num_left:  # a spare one for each, as for who joins
                givers = self._who_may_give(holdings)
                victim = max(givers, key=_num_blocks)[-1] if givers else None
            else:
                return victims
            if victim is None:
                return []
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
        if newcomer is not None:  # first choice: it was found to fit, or is the shortest
            lines.sort(key=lambda line: newcomer not in line.waiting[:1])
        computing = self._admission.being_computed() if may_join else {}
        _SharedStep(self._admission, builder, lines, computing).fill()
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

    def _lines(self, only: Sequence | None, *, may_join: bool) -> list[_Line]:
        """All that want prompt tokens, first choice first; of the waiting, `only` one if given."""
        by_caller = {caller: _Line(caller) for caller in self._queues.callers}
        for sequence in self._queues.running:
            line = by_caller[sequence.request.caller]
            line.num_running += 1
            if sequence.num_scheduled < sequence.prefill_end:
                line.prefills.append(sequence)
        if only is not None:
            hold(self._queues.waiting, WaitReason.BLOCKS)
        for sequence in self._queues.waiting if only is None else (only,):
            line = by_caller[sequence.request.caller]
            (line.deferred if is_still_deferred(sequence) else line.waiting).append(sequence)
            line.is_held = not may_join
        lines = [line for line in by_caller.values() if line.wants_tokens]
        known = [self._served[line.caller] for line in lines if line.caller in self._served]
        for line in lines:
            line.served = self._served.get(line.caller, min(known, default=0))
        return sorted(lines, key=lambda line: line.rank)


class _SharedStep:
    """The prompt chunks and the newcomers of one step."""

    __slots__ = (
        "_admission", "_builder", "_computing", "_is_closed", "_lines", "_num_lacking"
    )  # fmt: skip

    def __init__(
        self,
        admission: Admission,
        builder: StepBuilder,
        lines: list[_Line],
        computing: dict[BlockPlace, Sequence],
    ) -> None:
        self._admission = admission
        self._builder = builder
        self._lines = lines
        self._computing = computing
        self._num_lacking = 0
        self._is_closed = False  # somebody lacks blocks whom nobody may pass

    def fill(self) -> None:
        """Serve each line with an equal part, then with what the others did not need."""
        builder = self._builder
        for index, line in enumerate(self._lines):
            part = max(MIN_PART, builder.tokens // (len(self._lines) - index))
            rest = max(0, builder.tokens - part)
            builder.tokens -= rest
            self._serve(line)
            builder.tokens += rest
        for line in self._lines:
            if builder.tokens > 0:
                self._serve(line)
        num_joined = sum(line.num_joined for line in self._lines)
        for line in self._lines:
            if line.lacks_blocks:
                line.waiting[0].times_passed += num_joined - line.num_joined

    def _serve(self, line: _Line) -> None:
        """Chunks and newcomers, as far as the builder's budget goes."""
        before = self._builder.tokens
        self._put_chunks(line.prefills)
        self._let_join(line)
        # What others compute for it is worth its part to it.
        awaited = [each.deferred_behind for each in line.deferred if is_still_deferred(each)]
        self._put_chunks([behind[0] for behind in awaited if behind is not None])
        line.served += before - self._builder.tokens

    def _put_chunks(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if self._builder.tokens > 0 and sequence.num_scheduled < sequence.prefill_end:
                self._builder.put_more(sequence)

    def _let_join(self, line: _Line) -> None:
        while line.waiting and not line.is_held:
            sequence = line.waiting[0]
            if self._has_to_wait(line):
                reason: WaitReason | None = WaitReason.BLOCKS
            else:
                reason = self._admission.join(sequence, self._builder, self._computing)
                if reason is WaitReason.BLOCKS:
                    line.lacks_blocks = True
                    self._num_lacking += 1
                    self._is_closed |= is_overdue(sequence)
            if reason is WaitReason.PREFIX:
                line.deferred.append(line.waiting.pop(0))
            elif reason is None:
                line.prefills.append(line.waiting.pop(0))
                line.num_joined += 1
                sequence.times_passed = 0
            else:
                hold(line.waiting, reason)
                line.is_held = reason is not WaitReason.TOKEN_BUDGET
                return

    def _has_to_wait(self, line: _Line) -> bool:
        """Whether those who lack blocks must not be passed by this line."""
        if self._num_lacking >= MAX_LACKING:
            return True
        has_some = line.num_running + line.num_joined > 0
        return self._is_closed or (has_some and self._num_lacking > 0)


def is_overdue(sequence: Sequence) -> bool:
    """Whether nobody may pass it any more."""
    return sequence.times_passed >= MAX_PASSES


def _urgency(sequence: Sequence) -> tuple[bool, int]:
    """Sort key among newcomers: who is overdue, then the shortest."""
    return not is_overdue(sequence), len(sequence.log.ids)


def _num_blocks(sequences: list[Sequence]) -> int:
    return sum(len(sequence.blocks) for sequence in sequences)


def _take_out(victim: Sequence, holdings: list[list[Sequence]]) -> None:
    """Victims are the youngest of theirs."""
    for held in holdings:
        if held[-1] is victim:
            held.pop()
    holdings[:] = [held for held in holdings if held]
