"""Shards that go away and come back: nobody loses a token, nobody gets one twice."""

import asyncio
from pathlib import Path

import pytest
from tests.fakes.fake_shard import FakeShard, generated
from tests.fakes.submitted import Submitted
from tests.router.serving.test_batching_loop import collect, end_of, new_request, serving, until

from kagami_proto.errors import GenerationFailed, ShardLost
from kagami_proto.values import Grammar, GrammarKind
from kagami_router.request.values import StreamEvent
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.shards.messages import Pool, ShardInfo
from kagami_router.shards.session import ShardSession, WarmupLimits

PROMPTS = [b"request number %02d" % number for number in range(16)]


class Client:
    """Reads a stream event by event."""

    def __init__(self, stream: Submitted) -> None:
        self.events: list[StreamEvent] = []
        self.reading = asyncio.ensure_future(self._read(stream))

    async def _read(self, stream: Submitted) -> None:
        async with stream:
            async for events in stream:
                self.events += events

    @property
    def ids(self) -> list[int]:
        return [event.token.id for event in self.events]


def nothing() -> None:
    """The shards are there again."""


async def test_sixteen_streams_go_on_behind_a_lost_shard(tmp_path: Path) -> None:
    text = bytes(generated(PROMPTS[3], 40)).decode()
    changes = {3: {"stop": (text[10:25] + "!",), "keep_stop": False}}
    async with serving(tmp_path, num_blocks=300, reopened=nothing) as served:
        clients = [
            Client(Submitted(served.loop, new_request(prompt, 40, **changes.get(number, {}))))
            for number, prompt in enumerate(PROMPTS)
        ]
        await until(lambda: all(len(client.events) >= 15 for client in clients))
        served.shard.gate.clear()
        waiting = Client(Submitted(served.loop, new_request(b"one that waits", 40)))
        await until(lambda: served.scheduler.stats().waiting == 1)
        assert max(len(client.events) for client in clients) < 20
        held_back = "".join(event.token.text for event in clients[3].events)
        assert held_back == text[:10]
        await served.shard.kill()
        await until(lambda: not served.loop.is_healthy)
        clients[7].reading.cancel()
        meanwhile = Client(Submitted(served.loop, new_request(b"one that comes meanwhile", 8)))
        async with FakeShard(str(tmp_path / "s"), num_blocks=300) as again:
            await asyncio.gather(
                *(client.reading for client in [*clients, waiting, meanwhile]),
                return_exceptions=True,
            )
            assert [step.number for step in again.steps[:2]] == [1, 2]
            await until(lambda: served.scheduler.is_idle)
            assert not served.scheduler.stats().blocks_used
            running = [new for step in again.steps for new in step.new_sequences]
            assert 8 not in [new.id for new in running]
        served.running.cancel()
    assert served.metrics.restarted == [0]
    for number, client in enumerate(clients):
        if number != 7:
            assert client.ids == generated(PROMPTS[number], 40)
            assert end_of(client.events).num_generated == 40
    assert waiting.ids == generated(b"one that waits", 40)
    assert meanwhile.ids == generated(b"one that comes meanwhile", 8)


async def test_what_the_first_run_found_in_the_cache_is_told_behind_a_loss(tmp_path: Path) -> None:
    async with serving(tmp_path, reopened=nothing) as served:
        await collect(Submitted(served.loop, new_request()))
        client = Client(Submitted(served.loop, new_request(max_new_tokens=40)))
        await until(lambda: len(client.events) > 3)
        served.shard.gate.clear()
        await served.shard.kill()
        async with FakeShard(str(tmp_path / "s")):
            await client.reading
            served.running.cancel()
    assert end_of(client.events).cached_tokens == 16


async def test_prompt_logprobs_that_were_sent_are_not_asked_for_again(tmp_path: Path) -> None:
    async with serving(tmp_path, reopened=nothing) as served:
        request = new_request(max_new_tokens=40, prompt_logprobs=True)
        client = Client(Submitted(served.loop, request))
        await until(lambda: len(client.events) > 3)
        served.shard.gate.clear()
        await served.shard.kill()
        async with FakeShard(str(tmp_path / "s")) as again:
            await client.reading
            served.running.cancel()
    assert [new.prompt_logprobs for new in again.steps[0].new_sequences] == [False]
    assert [bool(event.prefill) for event in client.events] == [True] + [False] * 39


async def test_who_does_not_fit_the_new_pool_fails_and_the_others_go_on(tmp_path: Path) -> None:
    async with serving(tmp_path, reopened=nothing) as served:
        large = Client(Submitted(served.loop, new_request(max_new_tokens=60)))
        small = Client(Submitted(served.loop, new_request(b"small", 20)))
        await until(lambda: min(len(large.events), len(small.events)) > 3)
        served.shard.gate.clear()
        await served.shard.kill()
        async with FakeShard(str(tmp_path / "s"), num_blocks=10):
            await asyncio.gather(large.reading, small.reading, return_exceptions=True)
            served.running.cancel()
    assert isinstance(large.reading.exception(), GenerationFailed)
    assert small.ids == generated(b"small", 20)


def configured(facts: ShardInfo, pool: Pool) -> SchedulerConfig:
    return SchedulerConfig(pool.num_blocks, pool.block_size, max_step_tokens=8, max_batch_size=4)


async def test_a_session_numbers_its_sequences_on_when_it_is_opened_again(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    async with FakeShard(path), ShardSession(path, WarmupLimits(8, 4), configured) as session:
        first = session.scheduler.add(new_request(b"abc"), 0.0)
        assert session.scheduler.schedule(0.0) is not None
        assert await session.reopen() == []
        second = session.scheduler.add(new_request(b"def"), 0.0)
        session.scheduler.check_integrity()
        step = session.scheduler.schedule(0.0)
    assert (first.id, second.id) == (1, 2)
    assert step is not None
    assert (step.number, [new.id for new in step.new_sequences]) == (1, [1, 2])
    assert [new.is_replay for new in step.new_sequences] == [True, False]


async def test_a_grammar_is_refused_while_the_shards_are_away(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    grammar = Grammar(GrammarKind.REGEX, "a")
    async with FakeShard(path):
        session = ShardSession(path, WarmupLimits(8, 4), configured)
        with pytest.raises(ShardLost, match="opened again"):
            await session.compile_grammar(grammar)
        async with session:
            await session.compile_grammar(grammar)


async def test_who_stops_the_loop_is_heard_though_a_shard_goes_at_that_moment(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, reopened=nothing) as served:
        await collect(Submitted(served.loop, new_request()))
        steps = served.loop._steps
        assert steps is not None
        steps._lost("gone")
        await asyncio.sleep(0)  # the watching task has raised
        served.running.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(served.running, return_exceptions=True)
