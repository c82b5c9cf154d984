"""One step that several callers share: the parts of its prompt tokens, and who joins.

Whom the step preempts was decided before, in `fairness.py`, which says what is fair.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from kagami_router.scheduler.admission import Admission, hold, is_still_deferred
from kagami_router.scheduler.pool import BlockPlace, KVPool
from kagami_router.scheduler.sequence import Sequence, WaitReason
from kagami_router.scheduler.step_builder import StepBuilder

# The least part of a step that is worth a place in it.
MIN_PART = 32
# How many younger ones of other callers may pass a caller's next one. High, because then fewer may
# join until it has its room; and a bound, because it has to get it.
MAX_PASSES = 64
# How many lines look for blocks in vain in one step. The first is one for whom room was made.
MAX_LACKING = 8


@dataclass(slots=True, eq=False)
class Line:
    """What one caller wants of a step; every list is oldest first."""

    caller: str
    prefills: list[Sequence] = field(default_factory=list)
    """Running, with a part of the prompt still to be computed."""
    waiting: list[Sequence] = field(default_factory=list)
    deferred: list[Sequence] = field(default_factory=list)
    """Waiting for a prefix that somebody computes."""
    num_running: int = 0
    served: int = 0
    """Prompt tokens that it has had, counted from where the others were when it came."""
    is_held: bool = False
    """Nobody of it joins this step any more."""

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Sort key: the first has first choice."""
        if self.waiting and is_overdue(self.waiting[0]):
            return False, 0, self.waiting[0].id
        return True, self.served, min(wanting[0].id for wanting in self._wanting if wanting)

    @property
    def _wanting(self) -> tuple[list[Sequence], ...]:
        return self.prefills, self.waiting, self.deferred

    @property
    def wants_tokens(self) -> bool:
        """Whether it has a use for a part of the step."""
        return any(self._wanting)


class SharedStep:
    """The prompt chunks and the newcomers of one step; the first line has first choice."""

    __slots__ = (
        "_admission", "_beside", "_builder", "_computing", "_joined", "_lines", "_num_lacking",
        "_pool", "_running",
    )  # fmt: skip

    def __init__(
        self,
        admission: Admission,
        pool: KVPool,
        running: list[Sequence],
        builder: StepBuilder,
        lines: list[Line],
        computing: dict[BlockPlace, Sequence],
    ) -> None:
        self._admission = admission
        self._pool = pool
        self._running = running
        self._builder = builder
        self._lines = lines
        self._computing = computing
        self._num_lacking = 0
        self._beside: int | None = None  # blocks for newcomers beside one that is overdue
        self._joined: list[int] = []

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
        if self._joined:
            self._count_passes()

    def _serve(self, line: Line) -> None:
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

    def _let_join(self, line: Line) -> None:
        while line.waiting and not line.is_held:
            sequence = line.waiting[0]
            reason: WaitReason | None = WaitReason.BLOCKS
            if self._may_pass(line, sequence):
                reason = self._admission.join(sequence, self._builder, self._computing)
                if reason is WaitReason.BLOCKS:
                    self._note_lack(sequence)
            if reason is WaitReason.PREFIX:
                line.deferred.append(line.waiting.pop(0))
            elif reason is None:
                line.prefills.append(line.waiting.pop(0))
                line.num_running += 1
                self._note_join(sequence)
            else:
                hold(line.waiting, reason)
                line.is_held = reason is not WaitReason.TOKEN_BUDGET
                return

    def _may_pass(self, line: Line, sequence: Sequence) -> bool:
        """Whether it may join although others lack blocks, if any do."""
        if self._num_lacking == 0:
            return True
        if line.num_running > 0 or self._num_lacking >= MAX_LACKING:
            return False
        return self._beside is None or most_blocks(self._pool, sequence) <= self._beside

    def _note_lack(self, sequence: Sequence) -> None:
        self._num_lacking += 1
        if self._beside is None and is_overdue(sequence):
            self._beside = blocks_beside(self._pool, self._running, sequence)

    def _note_join(self, sequence: Sequence) -> None:
        self._joined.append(sequence.id)
        sequence.times_passed = 0
        sequence.is_beside = self._beside is not None
        if self._beside is not None:
            self._beside -= most_blocks(self._pool, sequence)

    def _count_passes(self) -> None:
        """Each caller's next one was passed by all who came later and joined."""
        self._joined.sort()
        for line in self._lines:
            if line.waiting:
                first = bisect_right(self._joined, line.waiting[0].id)
                line.waiting[0].times_passed += len(self._joined) - first


def is_overdue(sequence: Sequence) -> bool:
    """Whether nobody may pass it any more who delays it."""
    return sequence.times_passed >= MAX_PASSES


def most_blocks(pool: KVPool, sequence: Sequence) -> int:
    """What it may have in the end, and the spare one that everybody who joins has to leave."""
    return pool.blocks_for(sequence.max_kv_tokens) + 1


def blocks_beside(pool: KVPool, running: Iterable[Sequence], overdue: Sequence) -> int:
    """How many blocks may go to newcomers for good without delaying one that is overdue.

    It waits until enough of those have ended that ran before; newcomers that fit beside it do not
    matter (backfilling, as batch schedulers call it).
    """
    beside = sum(most_blocks(pool, each) for each in running if each.is_beside)
    return pool.num_total - most_blocks(pool, overdue) - beside
