"""The loop against a fake shard over a real socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tokenizers
from tests.fakes.byte_tokenizer import byte_tokenizer
from tests.fakes.fake_shard import FakeShard, Request, generated
from tests.fakes.panics import panicking_tokenizer
from tests.fakes.submitted import Submitted

from kagami_proto.errors import GenerationFailed, ShardLost
from kagami_proto.tracing import NO_TRACING, Tracing
from kagami_proto.values import SamplingParams
from kagami_router.request.prompt import Prompt
from kagami_router.request.values import (
    End,
    FinishReason,
    StoppingParams,
    StreamEvent,
    ValidRequest,
)
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.step import Step, StepResults
from kagami_router.serving.batching_loop import MAX_FAILED_STEPS, BatchingLoop
from kagami_router.serving.generation_stream import Events
from kagami_router.shards.messages import Pool, ShardInfo
from kagami_router.shards.session import ShardSession, WarmupLimits
from kagami_router.telemetry.metrics import StepReport

PROMPT = b"The quick brown fox"


@dataclass
class RecordingMetrics:
    """Keeps what the loop told it."""

    sent: list[Step] = field(default_factory=list)
    finished: list[tuple[Step, StepResults, StepReport]] = field(default_factory=list)
    restarted: list[int] = field(default_factory=list)

    def step_sent(self, step: Step) -> None:
        self.sent.append(step)

    def step_finished(self, step: Step, results: StepResults, report: StepReport) -> None:
        self.finished.append((step, results, report))

    def shard_restarted(self, rank: int) -> None:
        self.restarted.append(rank)

    @property
    def num_preempted(self) -> int:
        return sum(len(step.preempted) for step in self.sent)


@dataclass
class Served:
    """A running loop and everything around it."""

    shard: FakeShard
    loop: BatchingLoop
    session: ShardSession
    metrics: RecordingMetrics
    running: asyncio.Task[None]

    @property
    def scheduler(self) -> Scheduler:
        return self.session.scheduler


def new_request(prompt: bytes = PROMPT, max_new_tokens: int = 8, **changes: object) -> ValidRequest:
    stopping = {
        key: changes.pop(key)
        for key in ("stop", "ignore_eos", "keep_stop", "token_ids", "new_watch")
        if key in changes
    }
    return ValidRequest(
        prompt=Prompt(tuple(prompt), prompt.decode()),
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens, **stopping),
        **changes,
    )


def configured(facts: ShardInfo, pool: Pool) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=pool.num_blocks,
        block_size=pool.block_size,
        max_step_tokens=64,
        max_batch_size=32,
    )


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    num_blocks: int = 64,
    eos_every: int = 0,
    tracing: Tracing = NO_TRACING,
    reopened: Callable[[], None] | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> AsyncIterator[Served]:
    path = str(folder / "s")
    async with (
        FakeShard(path, num_blocks=num_blocks, eos_every=eos_every) as shard,
        ShardSession(path, WarmupLimits(64, 32), configured) as session,
    ):
        metrics = RecordingMetrics()
        loop = BatchingLoop(
            session,
            tokenizer=tokenizer or byte_tokenizer(),
            eos_token_ids=session.facts.eos_token_ids,
            metrics=metrics,
            tracing=tracing,
            reopened=reopened,
        )
        running = asyncio.ensure_future(loop.run())
        try:
            yield Served(shard, loop, session, metrics, running)
            session.scheduler.check_integrity()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def collect(stream: Submitted) -> list[StreamEvent]:
    async with stream:
        return [event async for events in stream for event in events]


def end_of(events: list[StreamEvent]) -> End:
    assert [event.end is not None for event in events] == [False] * (len(events) - 1) + [True]
    end = events[-1].end
    assert end is not None
    text = "".join(
        ("" if event.token.special else event.token.text) + event.tail for event in events
    )
    assert text == end.generated_text
    return end


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the loop itself is what is watched
            await asyncio.sleep(0)


async def test_the_shards_forget_a_sequence_that_was_the_last(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await collect(Submitted(served.loop, new_request()))
        await until(lambda: served.scheduler.is_idle and not served.shard.engine.ids)
        assert all(step.work for step, *_ in served.metrics.finished)


async def test_the_device_time_of_a_request_is_that_of_its_steps(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await collect(Submitted(served.loop, new_request()))
        before = len(served.metrics.finished)
        end = end_of(await collect(Submitted(served.loop, new_request(b"another"))))
        mine = served.metrics.finished[before:]
    assert end.timings.device_s == pytest.approx(sum(one.device_ns for _, one, _ in mine) / 1e9)


async def test_a_request_gets_its_tokens_and_its_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        events = await collect(Submitted(served.loop, new_request()))
    assert [event.token.id for event in events] == generated(PROMPT, 8)
    end = end_of(events)
    assert end.generated_text == bytes(generated(PROMPT, 8)).decode()
    assert (end.finish_reason, end.num_generated) == (FinishReason.LENGTH, 8)
    times = end.timings
    assert times.submitted <= times.scheduled <= times.first_token <= times.finished


async def test_sixteen_at_once_in_a_pool_for_four(tmp_path: Path) -> None:
    prompts = [b"request number %d" % number for number in range(16)]
    async with serving(tmp_path, num_blocks=30) as served:
        streams = [Submitted(served.loop, new_request(prompt, 12)) for prompt in prompts]
        results = await asyncio.gather(*map(collect, streams))
        assert served.metrics.num_preempted > 0
        await until(lambda: served.scheduler.is_idle)
        assert served.scheduler.stats().blocks_used == 0
    for prompt, events in zip(prompts, results, strict=True):
        assert [event.token.id for event in events] == generated(prompt, 12)


async def test_two_steps_are_in_flight(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.shard.gate.clear()
        stream = Submitted(served.loop, new_request())
        await until(lambda: len(served.metrics.sent) == 2)
        served.shard.gate.set()
        await collect(stream)


async def test_leaving_a_stream_early_frees_its_blocks(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        async with Submitted(served.loop, new_request(max_new_tokens=40)) as stream:
            await anext(stream)
        assert served.scheduler.stats().blocks_used == 0
        await until(lambda: served.scheduler.is_idle)
        await collect(Submitted(served.loop, new_request(b"another")))
        assert 1 not in served.shard.engine.ids


async def test_a_prompt_seen_before_is_found_in_the_cache(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await collect(Submitted(served.loop, new_request()))
        end = end_of(await collect(Submitted(served.loop, new_request())))
        new = [new for step in served.metrics.sent for new in step.new_sequences]
        assert [one.num_cached_tokens for one in new] == [0, 16]
    assert end.cached_tokens == 16


async def test_a_failing_step_is_a_pause_and_no_error(tmp_path: Path) -> None:
    failing = iter(["", "", "kernel broke"])
    async with serving(tmp_path) as served:
        served.shard.engine.faults.pass_error = lambda _: next(failing, "")
        prompts = [b"one", b"two", b"three"]
        streams = [Submitted(served.loop, new_request(prompt)) for prompt in prompts]
        results = await asyncio.gather(*map(collect, streams))
        assert any(results.error for _, results, _ in served.metrics.finished)
    for prompt, events in zip(prompts, results, strict=True):
        assert [event.token.id for event in events] == generated(prompt, 8)


async def test_the_culprit_of_failing_steps_fails_alone(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:

        def poisoned(step: Request) -> str:
            return "poison" if any(entry.id == 3 for entry in step.work) else ""

        served.shard.engine.faults.pass_error = poisoned
        streams = [Submitted(served.loop, new_request(b"number %d" % n)) for n in range(6)]
        results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
    assert isinstance(results[2], GenerationFailed)
    assert str(results[2]) == "poison"
    assert [len(events) for events in results if isinstance(events, list)] == [8] * 5


async def test_a_failing_sequence_harms_only_itself(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.shard.engine.faults.sequence_error = lambda key: "bad grammar" if key == 2 else ""
        streams = [Submitted(served.loop, new_request(b"number %d" % n)) for n in range(3)]
        results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
    assert isinstance(results[1], GenerationFailed)
    assert len(results[0]) == len(results[2]) == 8


async def test_a_dead_shard_fails_every_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.shard.gate.clear()
        streams = [Submitted(served.loop, new_request()) for _ in range(3)]
        await until(lambda: len(served.shard.steps) > 0)
        assert served.loop.is_healthy
        await served.shard.kill()
        results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
        assert [type(result) for result in results] == [ShardLost] * 3
        with pytest.raises(ShardLost):
            await served.running
        assert not served.loop.is_healthy
        with pytest.raises(ShardLost):
            await collect(Submitted(served.loop, new_request()))


async def test_stopping_the_loop_tells_open_requests(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.shard.gate.clear()
        collecting: Awaitable[list[StreamEvent]] = asyncio.ensure_future(
            collect(Submitted(served.loop, new_request()))
        )
        await until(lambda: len(served.shard.steps) > 0)
        served.running.cancel()
        with pytest.raises(GenerationFailed):
            await collecting


async def test_a_step_that_never_ends_is_unhealthy(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        now = 0.0
        served.loop._clock = lambda: now
        served.shard.gate.clear()
        stream = Submitted(served.loop, new_request())
        await until(lambda: len(served.shard.steps) > 0)
        assert served.loop.is_healthy
        now = 61.0
        assert not served.loop.is_healthy
        served.shard.gate.set()
        await collect(stream)
        assert served.loop.is_healthy


async def test_a_device_that_fails_every_step_is_unhealthy_until_one_succeeds(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as served:
        await until(lambda: served.loop.is_healthy)
        served.shard.engine.faults.pass_error = lambda _: "an illegal memory access"
        while served.loop.is_healthy:
            assert len(served.metrics.finished) < MAX_FAILED_STEPS
            with pytest.raises(GenerationFailed):
                await collect(Submitted(served.loop, new_request()))
        assert len(served.metrics.finished) in (MAX_FAILED_STEPS, MAX_FAILED_STEPS + 1)
        served.shard.engine.faults.pass_error = lambda _: ""
        await collect(Submitted(served.loop, new_request()))
        assert served.loop.is_healthy


async def test_a_sink_gets_what_the_iterator_would_have_brought(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        taken: list[StreamEvent] = []

        def sink(index: int, events: Events) -> bool:
            taken.extend(events)
            return True

        async with Submitted(served.loop, new_request(), sink) as stream:
            assert [events async for events in stream] == []

    assert [event.token.id for event in taken] == generated(PROMPT, 8)
    assert end_of(taken).num_generated == 8


async def test_what_a_sink_refuses_is_iterated_and_nothing_passes_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        told: list[StreamEvent] = []
        is_slow = False

        def sink(index: int, events: Events) -> bool:
            nonlocal is_slow
            is_slow = not is_slow
            return not is_slow and told.extend(events) is None

        async with Submitted(served.loop, new_request(), sink) as stream:
            async for events in stream:
                told.extend(events)

    assert [event.token.id for event in told] == generated(PROMPT, 8)


async def test_a_sink_that_raises_ends_its_own_stream_only(tmp_path: Path) -> None:
    def broken(index: int, events: Events) -> bool:
        raise ZeroDivisionError

    async with serving(tmp_path) as served:
        other = asyncio.ensure_future(collect(Submitted(served.loop, new_request())))
        async with Submitted(served.loop, new_request(b"another"), broken) as stream:
            with pytest.raises(ZeroDivisionError):
                await anext(stream)
        assert end_of(await other).num_generated == 8


async def test_a_prompt_that_the_tokenizer_panics_over_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, tokenizer=panicking_tokenizer()) as served:
        with pytest.raises(BaseException, match="slice index"):
            Submitted(served.loop, new_request(b"a"))
        assert served.session.scheduler.stats().waiting == 0
