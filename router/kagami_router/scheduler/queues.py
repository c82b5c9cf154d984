"""Who waits and who runs: the one place where a sequence changes its status."""

from bisect import insort
from collections import Counter

from kagami_router.scheduler.pool import KVPool
from kagami_router.scheduler.sequence import Sequence, Status, age


class Queues:
    """Every sequence that has not ended, and the ids that shards still have to forget."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self.by_id: dict[int, Sequence] = {}
        self.callers: Counter[str] = Counter()
        """Whose sequences have not ended, and how many each has."""
        # Both oldest first.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._drop_ids: list[int] = []

    @property
    def has_drops(self) -> bool:
        """Whether a shard holds a sequence that is not running any more."""
        return bool(self._drop_ids)

    def take_drop_ids(self) -> list[int]:
        """The ids to drop with the next step."""
        drop_ids, self._drop_ids = self._drop_ids, []
        return drop_ids

    def add(self, sequence: Sequence) -> None:
        """A newcomer, the youngest of all."""
        self.by_id[sequence.id] = sequence
        self.callers[sequence.request.caller] += 1
        self.waiting.append(sequence)

    def start(self, sequence: Sequence) -> None:
        """From waiting to running; it has its blocks."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=age)
        sequence.status = Status.RUNNING
        sequence.is_on_shard = True

    def put_back(self, sequence: Sequence) -> None:
        """Take everything from a running sequence; it waits to be prefilled from its log."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.num_scheduled = sequence.num_confirmed = sequence.num_drafted = 0
        insort(self.waiting, sequence, key=age)

    def end(self, sequence: Sequence) -> None:
        """It has all it gets."""
        (self.running if sequence.status is Status.RUNNING else self.waiting).remove(sequence)
        self._release(sequence)
        sequence.status = Status.ENDED
        del self.by_id[sequence.id]
        caller = sequence.request.caller
        self.callers[caller] -= 1
        if not self.callers[caller]:
            del self.callers[caller]

    def _release(self, sequence: Sequence) -> None:
        if sequence.is_on_shard:
            self._drop_ids.append(sequence.id)
            sequence.is_on_shard = False
        self._pool.release(sequence)

    def check_integrity(self) -> None:
        """Assert that each sequence is in one queue, in order, with what belongs to it there."""
        everybody = self.waiting + self.running
        assert sorted(self.by_id) == sorted(sequence.id for sequence in everybody)
        assert self.callers == Counter(sequence.request.caller for sequence in everybody)
        assert self.waiting == sorted(self.waiting, key=age)
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING
            assert not sequence.blocks
            assert not sequence.path
            assert not sequence.is_on_shard
        assert self.running == sorted(self.running, key=age)
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert sequence.is_on_shard
        self._pool.check_integrity(everybody)
