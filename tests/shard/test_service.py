"""The service over a real Unix socket."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc.aio
import pytest
from tests.fakes.tiny_model import TinyModel, tiny_backend

from kagami_proto import generate_pb2 as pb
from kagami_proto.generate_pb2_grpc import (
    TextGenerationServiceStub,
    add_TextGenerationServiceServicer_to_server,
)
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.worker import Worker
from kagami_shard.forward.output import Output
from kagami_shard.service import TextGenerationService

PROMPT = [3, 1, 4, 1, 5]
GREEDY = pb.SamplingParams(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)


class Gate(TinyModel):
    """A model whose forward pass waits until it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def forward(self, *args: object) -> Output:
        self.entered.set()
        assert self.open.wait(timeout=10)
        return super().forward(*args)  # type: ignore[arg-type]  # passed on as they came


@pytest.fixture
def model() -> Gate:
    return Gate()


@pytest.fixture
async def stub(tmp_path: Path, model: Gate) -> AsyncIterator[TextGenerationServiceStub]:
    engine = Engine(tiny_backend(model), block_size=4)
    with ThreadPoolExecutor(1) as thread, Worker(engine, thread, overlap=False) as worker:
        server = grpc.aio.server()
        service = TextGenerationService(engine, worker, pb.InfoResponse(vocab_size=64))
        add_TextGenerationServiceServicer_to_server(service, server)
        server.add_insecure_port(f"unix://{tmp_path}/shard-0")
        await server.start()
        async with grpc.aio.insecure_channel(f"unix://{tmp_path}/shard-0") as channel:
            yield TextGenerationServiceStub(channel)
        model.open.set()
        await server.stop(None)


async def warm_up(stub: TextGenerationServiceStub) -> pb.WarmupResponse:
    request = pb.WarmupRequest(
        max_step_tokens=16, max_batch_size=4, max_total_tokens=64, max_pool_tokens=100
    )
    return await stub.Warmup(request)  # type: ignore[misc]  # the stub serves both APIs


def prefill(number: int = 1, sequence_id: int = 1) -> pb.Step:
    return pb.Step(
        number=number,
        new_sequences=[
            pb.NewSequence(
                id=sequence_id, token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=GREEDY
            )
        ],
        ids=[sequence_id],
        positions=[0],
        counts=[len(PROMPT)],
        grants=[pb.BlockGrant(id=sequence_id, blocks=[1, 2])],
    )


async def test_warmup_tells_the_pool(stub: TextGenerationServiceStub) -> None:
    answer = await warm_up(stub)

    assert (answer.num_blocks, answer.block_size) == (26, 4)
    assert answer.kv_bytes == 26 * 4 * 2 * 2 * 8 * 4
    assert answer.kv_token_bytes == 2 * 2 * 8 * 4
    assert answer.weight_bytes > 0
    assert answer.read_bandwidth == 0, "this engine has no probe"


async def test_two_steps_in_flight_are_answered_in_order(stub: TextGenerationServiceStub) -> None:
    await warm_up(stub)
    call = stub.Run()

    await call.write(prefill())
    await call.write(pb.Step(number=2, ids=[1], positions=[5], counts=[1]))
    results = [await call.read(), await call.read()]
    await call.done_writing()

    assert [result.number for result in results] == [1, 2]
    assert all(len(result.token_ids) == 1 for result in results)
    assert await call.read() is grpc.aio.EOF


async def test_health_is_answered_during_a_step(
    stub: TextGenerationServiceStub, model: Gate
) -> None:
    await warm_up(stub)
    call = stub.Run()
    model.open.clear()
    model.entered.clear()
    await call.write(prefill())
    assert await asyncio.to_thread(model.entered.wait, 10)

    during = await stub.Health(pb.HealthRequest())
    model.open.set()
    await call.read()
    after = await stub.Health(pb.HealthRequest())

    assert during.busy
    assert during.busy_ns > 0
    assert after.last_step == 1


async def test_a_failed_forward_pass_is_a_result_and_the_next_step_runs(
    stub: TextGenerationServiceStub, model: Gate
) -> None:
    await warm_up(stub)
    call = stub.Run()
    model.fail_at = 4

    await call.write(prefill())
    failed = await call.read()
    model.fail_at = None
    retry = prefill(2)
    retry.drop_ids.append(1)
    await call.write(retry)
    result = await call.read()

    assert failed.error == "the kernel broke"
    assert not failed.token_ids
    assert len(result.token_ids) == 1


async def test_a_new_stream_forgets_the_old_ones_sequences(
    stub: TextGenerationServiceStub,
) -> None:
    await warm_up(stub)
    first = stub.Run()
    await first.write(prefill())
    await first.read()
    first.cancel()

    second = stub.Run()
    await second.write(pb.Step(number=1, ids=[1], positions=[5], counts=[1]))
    result = await second.read()

    assert result.failures[0].message == "the sequence is not in memory"


async def test_a_new_stream_ends_the_one_before_it(stub: TextGenerationServiceStub) -> None:
    await warm_up(stub)
    first = stub.Run()
    await first.write(prefill())
    await first.read()

    second = stub.Run()
    await second.write(prefill())
    await second.read()

    with pytest.raises(grpc.aio.AioRpcError, match="another step stream was opened"):
        await first.read()


async def test_what_the_shard_cannot_do_fails_that_sequence(
    stub: TextGenerationServiceStub,
) -> None:
    await warm_up(stub)
    call = stub.Run()
    step = prefill()
    step.new_sequences[0].adapter_id = "fr"

    await call.write(step)
    result = await call.read()

    assert result.failures[0].message == "this shard has no adapter 'fr'"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [(pb.VERIFY, "this shard does not verify drafts"), (pb.VECTOR, "this shard gives no vectors")],
)
async def test_what_nobody_computes_yet_fails_that_sequence(
    stub: TextGenerationServiceStub, wanted: pb.Wanted, message: str
) -> None:
    await warm_up(stub)
    call = stub.Run()
    step = prefill()
    step.wanted.append(wanted)

    await call.write(step)
    result = await call.read()

    assert [failure.message for failure in result.failures] == [message]


async def test_a_chunk_that_wants_nothing_brings_no_token(stub: TextGenerationServiceStub) -> None:
    await warm_up(stub)
    call = stub.Run()
    step = prefill()
    step.wanted.append(pb.NOTHING)

    await call.write(step)
    result = await call.read()

    assert (list(result.ids), list(result.failures)) == ([], [])


async def test_run_before_warmup_is_refused(stub: TextGenerationServiceStub) -> None:
    call = stub.Run()

    with pytest.raises(grpc.aio.AioRpcError, match="Warmup comes before Run"):
        await call.read()


async def test_a_model_whose_output_is_not_finite_does_not_become_warm(
    stub: TextGenerationServiceStub, model: Gate
) -> None:
    model.nan_at = 1  # the token of the warm-up
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await warm_up(stub)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert raised.value.details() == "the model's output is not finite"
