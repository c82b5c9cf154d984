"""The scheduler against an engine that knows what is in every slot, under random misfortune."""

import random
from collections import deque
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.fake_shard import EOS, Entry, FakeEngine, Request, Result, generated, vector_of

from kagami_proto.values import SamplingParams
from kagami_router.request.prompt import Prompt
from kagami_router.request.values import StoppingParams, ValidRequest
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import (
    Failure,
    PromptLogprobs,
    Step,
    StepResults,
    TokenSampled,
    VectorComputed,
)


def to_request(step: Step) -> Request:
    return Request(
        number=step.number,
        work=[
            Entry(work.sequence.id, work.position, work.num_tokens, work.wanted)
            for work in step.work
        ],
        drop_ids=step.drop_ids,
        new={new.id: new.token_ids for new in step.new_sequences},
        grants={work.sequence.id: work.blocks for work in step.work if work.blocks},
        drafts=step.drafts,
    )


def to_results(result: Result, step: Step) -> StepResults:
    return StepResults(
        number=result.number,
        samples=[
            (key, token_id, -0.5, ()) for key, ids in result.tokens.items() for token_id in ids
        ],
        vectors=list(result.vectors.items()),
        prompt_logprobs=[
            PromptLogprobs(work.sequence.id, work.position + 1, [-1.0] * work.num_tokens)
            for work in step.work
            if work.sequence.request.prompt_logprobs and not result.error
        ],
        failures=[Failure(key, text) for key, text in result.failures.items()],
        error=result.error,
        out_of_memory=result.out_of_memory,
    )


@dataclass(frozen=True)
class World:
    """One run's limits and misfortunes."""

    seed: int
    num_blocks: int
    block_size: int
    max_step_tokens: int
    max_batch_size: int
    prefix_caching: bool
    ratio: float | None
    max_waiting: int | None
    eos_every: int
    num_requests: int
    transient: float
    sequence_failure: float
    poison: float
    memory_limit: int | None
    cache_grows_to: int | None
    max_steps_in_flight: int
    losses: float
    vectors: float
    num_callers: int
    drafted: float
    """How many of the tokens of a draft are right"""


worlds = st.builds(
    World,
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(4, 40),
    block_size=st.integers(1, 6),
    max_step_tokens=st.integers(1, 40),
    max_batch_size=st.integers(1, 12),
    prefix_caching=st.booleans(),
    ratio=st.one_of(st.none(), st.sampled_from([0.0, 0.3, 1.2, 5.0])),
    max_waiting=st.one_of(st.none(), st.integers(0, 20)),
    eos_every=st.sampled_from([0, 3, 10]),
    num_requests=st.integers(1, 40),
    transient=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    sequence_failure=st.sampled_from([0.0, 0.0, 0.02]),
    poison=st.sampled_from([0.0, 0.0, 0.1]),
    memory_limit=st.one_of(st.none(), st.none(), st.integers(1, 30)),
    cache_grows_to=st.one_of(st.none(), st.integers(0, 20)),
    max_steps_in_flight=st.integers(1, 2),
    losses=st.sampled_from([0.0, 0.0, 0.05]),
    vectors=st.sampled_from([0.0, 0.0, 0.3]),
    num_callers=st.sampled_from([1, 2, 2, 3, 8]),
    drafted=st.sampled_from([0.0, 0.0, 0.5, 0.9, 1.0]),
)


class Simulation:
    """A clock, a shard with a queue, clients; everybody's fate is checked on the way."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = random.Random(world.seed)
        self.engine = FakeEngine(world.num_blocks, world.block_size, eos_every=world.eos_every)
        self.config = SchedulerConfig(
            num_blocks=world.num_blocks,
            block_size=world.block_size,
            max_step_tokens=world.max_step_tokens,
            max_batch_size=world.max_batch_size,
            waiting_served_ratio=world.ratio,
            max_waiting_tokens=world.max_waiting,
            prefix_caching=world.prefix_caching,
            cache_grows_to=world.cache_grows_to,
            max_steps_in_flight=world.max_steps_in_flight,
        )
        self.scheduler = Scheduler(self.config, self if world.drafted else None)
        self.queue: deque[Step] = deque()
        self.open: dict[int, Sequence] = {}
        self.tokens: dict[int, list[int]] = {}
        self.poisoned: set[int] = set()
        self.num_ended = 0
        self.now = 0.0
        prefix_length = max(1, world.num_blocks * world.block_size // 3)
        self.prefix = [self.random.randrange(3) for _ in range(prefix_length)]
        self.engine.faults.pass_error = self._pass_error
        self.engine.faults.out_of_memory = self._out_of_memory
        self.engine.faults.sequence_error = self._sequence_error

    def _pass_error(self, step: Request) -> str:
        if any(entry.id in self.poisoned for entry in step.work):
            return "poison"
        return "transient" if self.random.random() < self.world.transient else ""

    def _out_of_memory(self, step: Request) -> bool:
        limit = self.world.memory_limit
        return limit is not None and sum(entry.num_tokens for entry in step.work) > limit

    def _sequence_error(self, sequence_id: int) -> str:
        del sequence_id
        return "bad" if self.random.random() < self.world.sequence_failure else ""

    def draft(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """As the scheduler's drafter: right as often as the world says."""
        assert len(sequence.log.ids) == sequence.num_scheduled + 1, "a draft behind unknown ids"
        right = generated(sequence.log.ids, self.random.randint(0, min(4, max_tokens)))
        return [token_id if self.random.random() < self.world.drafted else 0 for token_id in right]

    def _caller(self) -> str:
        """One of them sends most."""
        return str(int(self.world.num_callers * self.random.random() ** 3))

    def arrive(self) -> None:
        room = (self.world.num_blocks - 1) * self.world.block_size
        total = self.random.randint(2, room + 1)  # the last token is never fed
        num_prompt = self.random.randint(1, total - 1)
        shared = self.random.randint(0, len(self.prefix))
        prompt = self.prefix[:shared] + [self.random.randrange(3) for _ in range(num_prompt)]
        prompt = prompt[:num_prompt]
        request = ValidRequest(
            prompt=Prompt(tuple(prompt), ""),
            sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=total - num_prompt),
            prompt_logprobs=self.random.random() < 0.1,
            wants_vector=self.random.random() < self.world.vectors,
            caller=self._caller(),
        )
        sequence = self.scheduler.add(request, self.now)
        self.open[sequence.id] = sequence
        self.tokens[sequence.id] = []
        if self.random.random() < self.world.poison:
            self.poisoned.add(sequence.id)

    def cancel(self) -> None:
        if self.open:
            victim = self.random.choice(list(self.open))
            self.scheduler.cancel(victim)
            self._close(victim)

    def lose(self) -> None:
        """The shard is gone with all that it held and all that was under way; another comes."""
        world, faults = self.world, self.engine.faults
        self.engine = FakeEngine(world.num_blocks, world.block_size, eos_every=world.eos_every)
        self.engine.faults = faults
        self.queue.clear()
        self.scheduler, events = self.scheduler.successor(self.config)
        assert events == []
        self.scheduler.check_integrity()

    def send(self) -> bool:
        step = self.scheduler.schedule(self.now)
        self.scheduler.check_integrity()
        if step is None:
            return False
        assert step.work or step.drop_ids
        assert sum(work.num_tokens for work in step.work) <= self.world.max_step_tokens
        assert len(step.work) <= self.world.max_batch_size
        assert len({work.sequence.id for work in step.work}) == len(step.work)
        self.queue.append(step)
        assert len(self.queue) <= 2
        return True

    def receive(self) -> bool:
        if not self.queue:
            return False
        step = self.queue.popleft()
        result = self.engine.run(to_request(step))
        stands_alone = len(step.work) == 1
        ended: set[int] = set()
        for event in self.scheduler.update(to_results(result, step)):
            sequence = event.sequence
            if sequence.id in ended:  # what was accepted behind EOS
                continue
            assert sequence.id in self.open, "an event after the last one"
            if isinstance(event, TokenSampled):
                if self._take(event):
                    ended.add(sequence.id)
            elif isinstance(event, VectorComputed):
                assert sequence.request.wants_vector
                assert event.vector == vector_of(sequence.request.prompt_ids)
                assert sequence.id not in self.poisoned
                self._close(sequence.id)
            else:
                assert result.failures.get(sequence.id) or (result.error and stands_alone)
                self._close(sequence.id)
        self.scheduler.check_integrity()
        return True

    def _take(self, event: TokenSampled) -> bool:
        sequence = event.sequence
        tokens = self.tokens[sequence.id]
        tokens.append(event.token_id)
        maximum = sequence.request.stopping.max_new_tokens
        assert event.is_last == (len(tokens) == maximum)
        if event.token_id == EOS and not event.is_last:
            self.scheduler.finish(sequence)
        if event.is_last or event.token_id == EOS:
            prompt = sequence.request.prompt_ids
            assert tokens == generated(prompt, maximum, self.world.eos_every)
            assert sequence.log.generated_ids[: len(tokens)] == tokens
            assert not sequence.request.prompt_logprobs or sequence.log.has_prompt_logprobs
            assert sequence.id not in self.poisoned
            self._close(sequence.id)
            return True
        return False

    def _close(self, sequence_id: int) -> None:
        sequence = self.open.pop(sequence_id)
        expected = generated(sequence.request.prompt_ids, len(self.tokens[sequence_id]))
        if not self.world.eos_every:
            assert self.tokens[sequence_id] == expected
        self.num_ended += 1

    def run(self) -> None:
        num_arrived = 0
        while num_arrived < self.world.num_requests:
            self.now += 1.0
            draw = self.random.random()
            if draw < 0.25:
                self.arrive()
                num_arrived += 1
            elif draw < 0.30:
                self.cancel()
            elif draw < 0.30 + self.world.losses:
                self.lose()
            elif draw < 0.65:
                self.send()
            else:
                self.receive()
        self.settle()

    def settle(self) -> None:
        """Nobody comes any more; everybody must end."""
        longest = (self.world.num_blocks - 1) * self.world.block_size + 1
        for _ in range(200 + 60 * longest * len(self.open)):
            sent = self.send()
            if sent and self.random.random() < 0.5:
                continue
            if not self.receive() and not sent:
                break
        assert not self.open, "somebody starves"
        assert self.scheduler.is_idle
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        assert self.num_ended == len(self.tokens)


@settings(max_examples=150)
@given(worlds)
def test_everybody_ends_with_the_right_tokens_whatever_happens(world: World) -> None:
    Simulation(world).run()


def test_drafts_save_steps() -> None:
    """Else the worlds above would verify nothing."""
    calm = {
        "seed": 1, "num_blocks": 40, "block_size": 4, "max_step_tokens": 40, "max_batch_size": 8,
        "prefix_caching": True, "ratio": None, "max_waiting": None, "eos_every": 0,
        "num_requests": 10, "transient": 0.0, "sequence_failure": 0.0, "poison": 0.0,
        "memory_limit": None, "cache_grows_to": None, "max_steps_in_flight": 1, "vectors": 0.0,
        "losses": 0.0, "num_callers": 1,
    }  # fmt: skip
    num_steps = []
    for drafted in (0.0, 1.0):
        simulation = Simulation(World(**calm, drafted=drafted))
        simulation.run()
        num_steps.append(simulation.scheduler._num_scheduled)
    assert num_steps[1] < num_steps[0]
