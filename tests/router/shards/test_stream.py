"""The step stream to one shard or several."""

import asyncio
from pathlib import Path

import pytest
from tests.fakes.fake_shard import FakeShard, generated, vector_of
from tests.router.shards.test_messages import new_request, new_step

from kagami_proto.errors import ShardLost
from kagami_proto.values import Wanted
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import (
    StepResults,
    TokenSampled,
    VectorComputed,
)
from kagami_router.shards.client import ShardGroup


def ignore(results: StepResults) -> None:
    """What a step brought."""


async def test_every_shard_gets_every_step(tmp_path: Path) -> None:
    received: asyncio.Queue[StepResults] = asyncio.Queue()
    async with (
        FakeShard(str(tmp_path / "0")) as first,
        FakeShard(str(tmp_path / "1")) as second,
        ShardGroup([first.address, second.address]) as group,
        group.open_steps(received.put_nowait) as steps,
    ):
        steps.send(new_step())
        results = await received.get()
        assert [sample[0] for sample in results.samples] == [1]
        assert first.steps == second.steps


class RightGuesses:
    """Knows what the fake shard will say."""

    def draft(self, sequence: Sequence, max_tokens: int) -> list[int]:
        return generated(sequence.log.ids, min(3, max_tokens))


async def test_a_vector_and_three_verified_tokens_travel_to_a_shard_and_back(
    tmp_path: Path,
) -> None:
    received: asyncio.Queue[StepResults] = asyncio.Queue()
    config = SchedulerConfig(num_blocks=64, block_size=4, max_step_tokens=16, max_batch_size=4)
    scheduler = Scheduler(config, RightGuesses())
    async with (
        FakeShard(str(tmp_path / "0")) as shard,
        ShardGroup([shard.address]) as group,
        group.open_steps(received.put_nowait) as steps,
    ):
        text = scheduler.add(new_request(b"abc", 20), 0.0)
        steps.send(scheduler.schedule(0.0))
        scheduler.update(await received.get())
        scheduler.add(new_request(b"a prompt", 1, wants_vector=True), 0.0)
        step = scheduler.schedule(0.0)
        steps.send(step)
        events = scheduler.update(await received.get())
        scheduler.check_integrity()
    assert [work.wanted for work in step.work] == [Wanted.VERIFY, Wanted.VECTOR]
    assert [len(draft.token_ids) for draft in shard.steps[1].drafts] == [3]
    tokens = [event.token_id for event in events if isinstance(event, TokenSampled)]
    assert tokens == generated(b"abc", 5)[1:]
    assert text.log.generated_ids == generated(b"abc", 5)
    vectors = [event.vector for event in events if isinstance(event, VectorComputed)]
    assert vectors == [vector_of(b"a prompt")]


async def test_one_dead_shard_is_noticed_while_the_others_wait(tmp_path: Path) -> None:
    async with (
        FakeShard(str(tmp_path / "0")) as first,
        FakeShard(str(tmp_path / "1")) as second,
        ShardGroup([first.address, second.address]) as group,
        group.open_steps(ignore) as steps,
    ):
        first.gate.clear()
        second.gate.clear()
        steps.send(new_step())
        await second.kill()
        with pytest.raises(ShardLost):
            await steps.lost()


class Panic(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LookupError("a bug"), LookupError),
        (Panic("a panic"), RuntimeError),
        (StopIteration("none left"), RuntimeError),
    ],
)
async def test_what_goes_wrong_with_results_ends_the_stream(
    tmp_path: Path, error: BaseException, told: type[Exception]
) -> None:
    def take(results: StepResults) -> None:
        raise error

    async with (
        FakeShard(str(tmp_path / "0")) as shard,
        ShardGroup([shard.address]) as group,
        group.open_steps(take) as steps,
    ):
        steps.send(new_step())
        with pytest.raises(told, match=str(error)):
            await steps.lost()


async def test_a_step_stream_to_nobody_is_a_lost_shard(tmp_path: Path) -> None:
    async with ShardGroup([f"unix://{tmp_path / 'none'}"]) as group:
        with pytest.raises(ShardLost, match="cannot connect to"):
            await group.open_steps(ignore).__aenter__()
