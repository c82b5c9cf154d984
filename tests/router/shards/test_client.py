"""The unary calls, and which shards are there."""

import asyncio
from pathlib import Path

import pytest
from tests.fakes.fake_shard import EOS, FakeShard

from kagami_proto.errors import GenerationFailed, InvalidRequest, ShardLost
from kagami_proto.values import Grammar, GrammarKind
from kagami_router.scheduler.step import (
    StepResults,
)
from kagami_router.shards import client as shard_client
from kagami_router.shards.client import ShardGroup


def ignore(results: StepResults) -> None:
    """What a step brought."""


async def test_a_shard_that_is_late_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "late"
    async with ShardGroup([f"unix://{path}"]) as group:
        waiting = asyncio.ensure_future(group.wait_ready())
        async with FakeShard(str(path)):
            info = await waiting
            assert (info.model_type, info.eos_token_ids) == ("fake", frozenset({EOS}))


async def test_the_smallest_pool_counts(tmp_path: Path) -> None:
    async with (
        FakeShard(str(tmp_path / "0"), num_blocks=20) as first,
        FakeShard(str(tmp_path / "1"), num_blocks=10) as second,
        ShardGroup([first.address, second.address]) as group,
    ):
        pool = await group.warmup(
            max_step_tokens=8, max_batch_size=1, max_total_tokens=8, max_pool_tokens=0
        )
        assert pool.num_blocks == 10
        assert (pool.weight_bytes, pool.kv_token_bytes, pool.bandwidth) == (10**6, 10, 1e10)


async def test_a_shard_is_up_from_its_first_answer_to_the_end_of_its_stream(tmp_path: Path) -> None:
    async with (
        FakeShard(str(tmp_path / "0")) as first,
        FakeShard(str(tmp_path / "1")) as second,
        ShardGroup([first.address, second.address]) as group,
    ):
        assert group.are_up() == [False, False]
        await group.wait_ready()
        assert group.are_up() == [True, True]
        async with group.open_steps(ignore) as steps:
            await second.kill()
            with pytest.raises(ShardLost):
                await steps.lost()
            assert group.are_up() == [True, False]


async def test_a_warmup_nobody_answers_is_a_lost_shard(tmp_path: Path) -> None:
    async with ShardGroup([f"unix://{tmp_path / 'none'}"]) as group:
        with pytest.raises(ShardLost):
            await group.warmup(
                max_step_tokens=8, max_batch_size=1, max_total_tokens=8, max_pool_tokens=0
            )


async def test_a_grammar_is_bad_if_one_shard_says_so(tmp_path: Path) -> None:
    async with (
        FakeShard(str(tmp_path / "0")) as first,
        FakeShard(str(tmp_path / "1")) as second,
        ShardGroup([first.address, second.address]) as group,
    ):
        await group.compile_grammar(Grammar(GrammarKind.REGEX, "good"))
        with pytest.raises(InvalidRequest, match="grammar is not valid: no"):
            await group.compile_grammar(Grammar(GrammarKind.REGEX, "bad"))


async def test_a_shard_that_dies_while_it_compiles_is_lost(tmp_path: Path) -> None:
    async with (
        FakeShard(str(tmp_path / "0")) as first,
        FakeShard(str(tmp_path / "1")) as second,
        ShardGroup([first.address, second.address]) as group,
    ):
        first.compiling.clear()
        second.compiling.clear()
        waiting = asyncio.ensure_future(group.compile_grammar(Grammar(GrammarKind.REGEX, "a")))
        await second.compile_began.wait()
        await second.kill()
        with pytest.raises(ShardLost):
            await waiting


async def test_a_grammar_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_client, "COMPILE_TIMEOUT_S", 0.05)
    async with FakeShard(str(tmp_path / "0")) as shard, ShardGroup([shard.address]) as group:
        shard.compiling.clear()
        with pytest.raises(GenerationFailed, match=r"not compiled within 0.05 s"):
            await group.compile_grammar(Grammar(GrammarKind.REGEX, "a"))
