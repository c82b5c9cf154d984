"""Callers that ask a scheduler, and a shard that answers 100 for every token."""

from collections.abc import Callable
from dataclasses import replace

from kagami_proto.values import SamplingParams, Wanted
from kagami_router.request.prompt import Prompt
from kagami_router.request.values import StoppingParams, ValidRequest
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.sequence import Sequence, Status
from kagami_router.scheduler.step import Step, StepResults

BLOCK = 4
ALICE, BOB, CAROL = "alice", "bob", "carol"


class Load:
    """A scheduler with its shard, and what was in the last step."""

    def __init__(self, **limits: object) -> None:
        config = SchedulerConfig(
            num_blocks=1001, block_size=BLOCK, max_step_tokens=128, max_batch_size=64
        )
        self.scheduler = Scheduler(replace(config, **limits))
        self._num_asked = 0
        self.step: Step | None = None
        self.num_preempted = 0

    def ask(self, caller: str, num_prompt: int, max_new: int = 1, *, prompt: int = 0) -> Sequence:
        """Queue a prompt, by default one that nobody else has."""
        self._num_asked += 1
        first = 1000 * (prompt or self._num_asked)
        ids = tuple(range(first, first + num_prompt))
        request = ValidRequest(
            Prompt(ids, ""), SamplingParams(), StoppingParams(max_new), caller=caller
        )
        return self.scheduler.add(request, 0.0)

    def run(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.step = self.scheduler.schedule(0.0)
            if self.step is None:
                return
            if self.step.number % 7 == 0 or self.step.preempted:
                self.scheduler.check_integrity()
            self.num_preempted += len(self.step.preempted)
            samples = [
                (work.sequence.id, 100, -0.5, ())
                for work in self.step.work
                if work.wanted is Wanted.ONE_TOKEN
            ]
            self.scheduler.update(StepResults(self.step.number, samples))

    def steps_until(self, is_so: Callable[[], bool], most: int = 2000) -> int:
        for number in range(most):
            if is_so():
                return number
            self.run()
        raise AssertionError(f"not within {most} steps")

    def computed(self) -> dict[str, int]:
        """The prompt tokens of each caller in the last step."""
        assert self.step is not None
        tokens: dict[str, int] = {}
        for work in self.step.work:
            if work.position < work.sequence.prefill_end:
                caller = work.sequence.request.caller
                tokens[caller] = tokens.get(caller, 0) + work.num_tokens
        return tokens


def has_token(sequence: Sequence) -> Callable[[], bool]:
    return lambda: bool(sequence.log.generated_ids)


def has_ended(sequence: Sequence) -> Callable[[], bool]:
    return lambda: sequence.status is Status.ENDED
