"""What follows a failed forward pass: smaller steps, and trials that find the culprit.

A pass that raises says nothing about whose fault it was. So everybody who was in it is suspect:

    failed step  A B C D E F G H          all go back to waiting, nothing else runs
    trial 1      A B C D            ok    cleared: they got past the work that failed
    trial 2              E F G H    fails
    trial 2a             E F        ok
    trial 2b                 G H    fails
    trial 2ba                G      ok
    trial 2bb                  H    fails alone: H is the culprit, and the only one harmed

A pass may also fail because it was too large, and then every trial succeeds. So the size of steps
is halved with every failure and doubles again after `RECOVERY_STEPS` that went well. A sequence
that runs out of memory alone gets smaller chunks before it is given up.
"""

from collections import deque
from collections.abc import Sequence as Seq
from typing import Protocol

from kagami_router.scheduler.sequence import Sequence, Status
from kagami_router.scheduler.step import WorkItem

# Long enough not to meet the same limit several times a second, short beside a request's life.
RECOVERY_STEPS = 16
# Below this a chunk is about as large as the decodes of a small batch: halving it gains nothing.
MIN_STEP_TOKENS = 16


class Eligibility(Protocol):
    """Who may be in the next step, and at whose cost."""

    @property
    def max_steps_in_flight(self) -> int:
        """How many steps may be on their way at once."""
        ...

    @property
    def joins_at_once(self) -> bool:
        """Whether newcomers need not mind how many run, when, and who computes their prefix."""
        ...

    def may_run(self, running: list[Sequence]) -> list[Sequence]:
        """Among whom decodes and chunks are looked for; oldest first."""
        ...

    def may_join(self, waiting: list[Sequence]) -> list[Sequence]:
        """Who may join, oldest first."""
        ...

    def num_spare_blocks(self, running: list[Sequence]) -> int:
        """How many blocks a newcomer has to leave."""
        ...

    def bystander(self, running: list[Sequence]) -> Sequence | None:
        """The youngest of those who give up their blocks before anybody eligible does."""
        ...


class AsUsual:
    """Everybody may run."""

    joins_at_once = False

    def __init__(self, max_steps_in_flight: int) -> None:
        self.max_steps_in_flight = max_steps_in_flight

    def may_run(self, running: list[Sequence]) -> list[Sequence]:
        return running

    def may_join(self, waiting: list[Sequence]) -> list[Sequence]:
        return waiting.copy()  # whoever joins leaves it

    def num_spare_blocks(self, running: list[Sequence]) -> int:
        """One for each that runs, else it would be preempted as soon as they grow."""
        return len(running)

    def bystander(self, running: list[Sequence]) -> Sequence | None:
        return None


class OnTrial:
    """Only the suspects may run, one step at a time; they take what they need from the others."""

    joins_at_once = True
    max_steps_in_flight = 1

    def __init__(self, suspects: list[Sequence]) -> None:
        self._suspects = suspects

    def may_run(self, running: list[Sequence]) -> list[Sequence]:
        return self._suspects

    def may_join(self, waiting: list[Sequence]) -> list[Sequence]:
        return [each for each in self._suspects if each.status is Status.WAITING]

    def num_spare_blocks(self, running: list[Sequence]) -> int:
        return 0

    def bystander(self, running: list[Sequence]) -> Sequence | None:
        return next((each for each in reversed(running) if each not in self._suspects), None)


class FaultIsolation:
    """The present size of steps, and the groups of suspects still to be tried."""

    def __init__(
        self, *, max_batch_size: int, max_step_tokens: int, max_steps_in_flight: int
    ) -> None:
        self._as_usual = AsUsual(max_steps_in_flight)
        self._full_batch_size = max_batch_size
        self._full_step_tokens = max_step_tokens
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self._successes = 0
        # Each suspect with the position it has to get past; the first group is on trial.
        self._groups: deque[dict[Sequence, int]] = deque()

    def eligible(self) -> Eligibility:
        """Who may be in the next step: everybody, or the group on trial."""
        suspects = self._suspects()
        return OnTrial(suspects) if suspects else self._as_usual

    def _suspects(self) -> list[Sequence]:
        """The sequences on trial, oldest first; empty when steps are made as usual."""
        while self._groups:
            group = self._groups[0]
            for sequence in [each for each in group if each.status is Status.ENDED]:
                del group[sequence]
            if group:
                return list(group)
            self._groups.popleft()
        return []

    def step_succeeded(self) -> None:
        """Clear the suspects that got past their work; call when positions are confirmed."""
        for group in list(self._groups)[:1]:
            for sequence, goal in list(group.items()):
                if sequence.num_confirmed >= goal:
                    del group[sequence]
        if self.max_batch_size < self._full_batch_size or (
            self.max_step_tokens < self._full_step_tokens
        ):
            self._recover()

    def step_failed(self, work: Seq[WorkItem], *, out_of_memory: bool) -> Sequence | None:
        """Halve the limits and set up trials; returns the culprit if it stood alone."""
        num_tokens = sum(item.num_tokens for item in work)
        self._successes = 0
        self.max_batch_size = max(1, len(work) // 2)
        can_shrink = out_of_memory and num_tokens > MIN_STEP_TOKENS
        if can_shrink:
            self.max_step_tokens = max(MIN_STEP_TOKENS, num_tokens // 2)
        goals = {
            item.sequence: item.position + (1 if item.sequence.num_drafted else item.num_tokens)
            for item in sorted(work, key=lambda item: item.sequence.id)
            if item.sequence.status is not Status.ENDED
        }
        if len(work) == 1 and goals and not can_shrink:
            return work[0].sequence
        others = self._groups.popleft() if self._groups else {}
        for sequence, goal in goals.items():
            goals[sequence] = max(goal, others.pop(sequence, 0))
        half = (len(goals) + 1) // 2
        members = list(goals.items())
        for group in (others, dict(members[half:]), dict(members[:half])):
            if group:
                self._groups.appendleft(group)
        return None

    def _recover(self) -> None:
        self._successes += 1
        if self._successes >= RECOVERY_STEPS:
            self._successes = 0
            self.max_batch_size = min(self._full_batch_size, 2 * self.max_batch_size)
            self.max_step_tokens = min(self._full_step_tokens, 2 * self.max_step_tokens)
