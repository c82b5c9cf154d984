"""Records to protobuf and back, and the calls around the step stream."""

import asyncio
from pathlib import Path

import pytest
from tests.fakes.fake_shard import EOS, FakeShard, generated, vector_of

from kagami_proto import generate_pb2 as pb
from kagami_proto.errors import GenerationFailed, InvalidRequest, ShardLost
from kagami_proto.values import Grammar, GrammarKind, SamplingParams, Wanted
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
from kagami_router.shards import client as shard_client
from kagami_router.shards.client import ShardGroup, results_from_pb, step_to_pb
from kagami_router.telemetry.sequence_trace import WireContext


def new_step() -> Step:
    scheduler = Scheduler(
        SchedulerConfig(num_blocks=9, block_size=4, max_step_tokens=8, max_batch_size=4)
    )
    request = ValidRequest(
        Prompt((5, 6, 7, 8, 9), ""),
        SamplingParams(
            do_sample=True,
            seed=2**64 - 1,
            temperature=0.5,
            top_k=3,
            logit_bias=((7, -2.0), (9, 1.5)),
        ),
        StoppingParams(4),
        top_n_tokens=2,
        prompt_logprobs=True,
    )
    scheduler.add(request, 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    return step


def ignore(results: StepResults) -> None:
    """What a step brought."""


def test_a_step_becomes_columns() -> None:
    message = step_to_pb(new_step())
    assert (list(message.ids), list(message.positions), list(message.counts)) == ([1], [0], [5])
    assert [(grant.id, list(grant.blocks)) for grant in message.grants] == [(1, [1, 2])]


def test_a_new_sequence_carries_all_the_shard_needs() -> None:
    context = WireContext("00-a-b-01", "c=d", 2**64 - 1)
    (new,) = step_to_pb(new_step(), {1: context}).new_sequences
    assert (new.traceparent, new.tracestate, new.decode_span_id) == context
    assert (list(new.token_ids), new.num_prompt_tokens) == ([5, 6, 7, 8, 9], 5)
    assert (new.sampling.seed, new.sampling.temperature, new.sampling.top_k) == (2**64 - 1, 0.5, 3)
    assert (list(new.sampling.bias_ids), list(new.sampling.biases)) == ([7, 9], [-2.0, 1.5])
    assert (new.top_n_tokens, new.prompt_logprobs) == (2, True)


def test_results_become_records() -> None:
    message = pb.StepResult(
        number=3,
        ids=[1, 2],
        token_ids=[7, 8],
        logprobs=[-1.0, -2.0],
        top_tokens=[pb.TopTokens(index=1, token_ids=[8, 9], logprobs=[-2.0, -3.0])],
        prompt_logprobs=[
            pb.PromptLogprobs(id=1, first_position=1, logprobs=[-0.5]),
            pb.PromptLogprobs(
                id=2,
                first_position=3,
                logprobs=[-0.5, -0.25],
                top_n=2,
                top_token_ids=[4, 5, 6, 7],
                top_logprobs=[-0.5, -1.0, -0.25, -1.5],
            ),
        ],
        failures=[pb.SequenceFailure(id=4, message="bad")],
        host_ns=5,
    )
    results = results_from_pb([message])
    assert [sample[:3] for sample in results.samples] == [(1, 7, -1.0), (2, 8, -2.0)]
    assert [len(sample[3]) for sample in results.samples] == [0, 2]
    assert results.prompt_logprobs == [
        PromptLogprobs(1, 1, [-0.5], []),
        PromptLogprobs(2, 3, [-0.5, -0.25], [((4, -0.5), (5, -1.0)), ((6, -0.25), (7, -1.5))]),
    ]
    assert results.failures == [Failure(4, "bad")]
    assert (results.number, results.host_ns) == (3, 5)


def test_any_shards_failure_counts() -> None:
    good, bad = pb.StepResult(number=1, ids=[1]), pb.StepResult(number=1, error="boom")
    assert results_from_pb([good, bad]).error == "boom"


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
        assert (pool.num_blocks, pool.elapsed_s) == (10, 1.0)
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


def new_request(prompt: bytes, max_new_tokens: int, **changes: object) -> ValidRequest:
    stopping = StoppingParams(max_new_tokens)
    return ValidRequest(Prompt(tuple(prompt), ""), SamplingParams(), stopping, **changes)


def test_an_adapter_is_named_on_the_wire() -> None:
    scheduler = Scheduler(
        SchedulerConfig(num_blocks=9, block_size=4, max_step_tokens=8, max_batch_size=4)
    )
    scheduler.add(new_request(b"abc", 4, adapter="fr"), 0.0)
    scheduler.add(new_request(b"abc", 4), 0.0)
    step = scheduler.schedule(0.0)
    assert [new.adapter_id for new in step_to_pb(step).new_sequences] == ["fr", ""]


def test_a_step_whose_work_wants_one_token_each_says_nothing_of_it() -> None:
    assert not step_to_pb(new_step()).wanted


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
