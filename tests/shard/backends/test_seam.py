"""A second backend, written in this file alone, serves through the real engine, worker and service.

It computes in numpy, with a toy model whose next token depends on every token before it: their
weighted sum, read back from the KV cache. No other file knows of it.
"""

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import torch

from kagami_proto import generate_pb2 as pb
from kagami_proto.generate_pb2_grpc import (
    TextGenerationServiceStub,
    add_TextGenerationServiceServicer_to_server,
)
from kagami_proto.values import DevicePolicy, SamplingParams, Wanted
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.step import NewSequence, Step, Work
from kagami_shard.engine.warmup import WarmupLimits
from kagami_shard.engine.worker import Worker
from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import KVCache, LayerShape
from kagami_shard.forward.output import Output, OutputKind
from kagami_shard.sampling.logprobs import TorchScorer
from kagami_shard.service import TextGenerationService

VOCAB, BLOCK = 50, 4
PROMPT = [3, 1, 4, 1, 5, 9]
GREEDY = pb.SamplingParams(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)


def next_token(ids: Sequence[int]) -> int:
    """What the toy model says, without any cache."""
    return sum((position + 1) * token for position, token in enumerate(ids)) % VOCAB


def continuation(count: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(PROMPT) :]


class ToyModel:
    """The facts of the toy model."""

    model_type = "toy"
    layers = (LayerShape(1, 1, 1),)
    vocab_size = VOCAB
    max_positions = 64
    bytes_loaded = weight_bytes = 8
    quantization = ""


class CountedSteps:
    """Its clock counts: a step takes two nanoseconds, one of them for sampling."""

    is_done = True

    def forward_ends(self) -> None: ...

    def step_ends(self) -> None: ...

    def times(self) -> tuple[int, int]:
        return 2, 1


class NumpyBackend:
    """A `Backend`."""

    name = "numpy"
    model = ToyModel()
    device = torch.device("cpu")
    dtype = torch.float32
    scorer = TorchScorer()
    policy = DevicePolicy(
        steps_in_flight=2,
        prefill_chunk=16,
        warmup_tokens=5,
        warmup_rows=3,
        pool_tokens=40,
        cache_share=1.0,
    )

    def __init__(self) -> None:
        self.num_tokens: list[int] = []
        """Of every batch that was run"""
        self.fails_with: Exception | None = None
        self.recovered_from: list[Exception] = []
        self.faster: SelfFeedingBackend | None = None

    def pool_bytes(self) -> int:
        return 1 << 20

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        layers = self.model.layers
        return KVCache(layers, num_blocks, block_size, dtype=self.dtype, device=self.device)

    def run(self, batch: ForwardBatch, cache: KVCache, wanted: OutputKind) -> Output:
        if self.fails_with is not None:
            raise self.fails_with
        self.num_tokens.append(batch.num_tokens)
        weighted = (batch.positions.numpy() + 1) * batch.input_ids.numpy()
        cache.keys[0].numpy().reshape(-1)[batch.slots.numpy()] = weighted
        sums = np.concatenate(
            [
                seen_sums(cache, table, kv_len, query_len)
                for table, kv_len, query_len in zip(
                    batch.queries.block_tables.tolist(),
                    batch.queries.kv_lens,
                    batch.queries.query_lens,
                    strict=True,
                )
            ]
        )[batch.selected_rows.numpy()]
        return Output(
            logits=torch.from_numpy(logits_of(sums)) if OutputKind.LOGITS in wanted else None,
            vectors=torch.from_numpy(sums[:, None]) if OutputKind.VECTORS in wanted else None,
        )

    def carry_on(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> "ToyDecodes | None":
        return None

    def elapsed(self, started_ns: int) -> CountedSteps:
        return CountedSteps()

    def recover(self, error: Exception) -> None:
        self.recovered_from.append(error)

    def upgrade(self, cache: KVCache | None) -> "NumpyBackend":
        return self.faster or self


def seen_sums(cache: KVCache, table: list[int], kv_len: int, query_len: int) -> np.ndarray:
    """`[query_len]`: for each query, what it and the tokens before it have left in the cache."""
    pages = cache.keys[0].numpy().reshape(cache.num_blocks, cache.block_size)
    return pages[table].reshape(-1)[:kv_len].cumsum()[kv_len - query_len :].astype(np.float32)


def logits_of(sums: np.ndarray) -> np.ndarray:
    logits = np.zeros((len(sums), VOCAB), np.float32)
    logits[np.arange(len(sums)), sums.astype(int) % VOCAB] = 5.0
    return logits


class SelfFeedingBackend(NumpyBackend):
    """The same, and greedy decodes feed themselves."""

    name = "numpy, self-feeding"

    def __init__(self) -> None:
        super().__init__()
        self.num_own_steps = 0

    def carry_on(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> "ToyDecodes":
        return ToyDecodes(self, cache, last_ids, positions, tables)


class ToyDecodes:
    """`Decodes`: reads the cache once, and then only adds up."""

    table_width = 16
    sampling_ns = 1

    def __init__(
        self,
        backend: SelfFeedingBackend,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        self._backend = backend
        self._flat = cache.keys[0].numpy().reshape(-1)
        self._ids, self._positions = list(last_ids), list(positions)
        self._tables = [list(table) for table in tables]
        self._sums = [
            float(seen_sums(cache, table, position, 1)[0]) if position else 0.0
            for table, position in zip(self._tables, positions, strict=True)
        ]

    def grant(self, row: int, first: int, blocks: Sequence[int]) -> None:
        assert first == len(self._tables[row])
        self._tables[row].extend(blocks)

    def run(self) -> int:
        self._backend.num_own_steps += 1
        for row, (token, position) in enumerate(zip(self._ids, self._positions, strict=True)):
            block = self._tables[row][position // BLOCK]
            self._flat[block * BLOCK + position % BLOCK] = (position + 1) * token
            self._sums[row] += (position + 1) * token
            self._ids[row] = int(self._sums[row]) % VOCAB
        self._positions = [position + 1 for position in self._positions]
        return 0

    def chosen(self) -> tuple[list[int], list[float]]:
        return list(self._ids), [-1.0] * len(self._ids)


class Shard:
    """A backend behind the real engine, worker, service and socket."""

    def __init__(self, backend: NumpyBackend) -> None:
        self.backend = backend
        self.engine = Engine(backend, block_size=BLOCK)

    async def serve(self, folder: Path) -> AsyncIterator["Shard"]:
        overlap = self.backend.policy.steps_in_flight > 1
        with (
            ThreadPoolExecutor(1) as thread,
            Worker(self.engine, thread, overlap=overlap) as worker,
        ):
            self.worker = worker
            server = grpc.aio.server()
            service = TextGenerationService(self.engine, worker, pb.InfoResponse(vocab_size=VOCAB))
            add_TextGenerationServiceServicer_to_server(service, server)
            server.add_insecure_port(f"unix://{folder}/shard-0")
            await server.start()
            async with grpc.aio.insecure_channel(f"unix://{folder}/shard-0") as channel:
                self.stub = TextGenerationServiceStub(channel)
                request = pb.WarmupRequest(max_step_tokens=16, max_batch_size=4)
                self.pool: pb.WarmupResponse = await self.stub.Warmup(request)
                yield self
            await server.stop(None)


@pytest.fixture(params=[NumpyBackend, SelfFeedingBackend])
async def shard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shard]:
    async for each in Shard(request.param()).serve(tmp_path):
        yield each


def prefill(number: int) -> pb.Step:
    """The prompt in one chunk, and blocks for 18 tokens more."""
    new = pb.NewSequence(id=1, token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=GREEDY)
    return pb.Step(
        number=number,
        new_sequences=[new],
        ids=[1],
        positions=[0],
        counts=[len(PROMPT)],
        grants=[pb.BlockGrant(id=1, blocks=[7, 2, 9, 4, 1, 5])],
    )


def decode(number: int) -> pb.Step:
    """Step `number` of a stream whose first step was the prefill."""
    return pb.Step(number=number, ids=[1], positions=[len(PROMPT) + number - 2], counts=[1])


async def test_a_second_backend_serves(shard: Shard) -> None:
    call = shard.stub.Run()
    tokens = []
    for number in range(1, 11):
        await call.write(prefill(number) if number == 1 else decode(number))
        result = await call.read()
        assert not result.failures
        tokens += result.token_ids
    await call.done_writing()

    assert tokens == continuation(10)
    if isinstance(shard.backend, SelfFeedingBackend):
        assert shard.backend.num_own_steps == 9, "every decode fed itself"


async def test_two_steps_are_in_flight(shard: Shard) -> None:
    call = shard.stub.Run()
    for number in range(1, 5):
        await call.write(prefill(number) if number == 1 else decode(number))
    results = [await call.read() for _ in range(4)]
    await call.done_writing()

    assert [token for result in results for token in result.token_ids] == continuation(4)


async def test_the_warm_up_and_the_pool_are_as_the_policy_says(shard: Shard) -> None:
    assert shard.backend.num_tokens == [5, 3]
    # A sequence may have 64 tokens, more than the policy's 40; block 0 is scratch.
    assert shard.pool.num_blocks == 1 + 64 // BLOCK


async def test_the_times_of_a_step_are_the_backends(shard: Shard) -> None:
    call = shard.stub.Run()
    await call.write(prefill(1))
    result = await call.read()
    await call.done_writing()

    assert (result.device_ns, result.sampling_ns) == (2, 1)


async def test_a_backend_recovers_from_a_step_that_failed(shard: Shard) -> None:
    call = shard.stub.Run()
    error = shard.backend.fails_with = RuntimeError("numpy broke")
    await call.write(prefill(1))
    failed = await call.read()
    shard.backend.fails_with = None
    again = prefill(2)
    again.drop_ids.append(1)
    await call.write(again)
    result = await call.read()
    await call.done_writing()

    assert failed.error == "numpy broke"
    assert shard.backend.recovered_from == [error]
    assert list(result.token_ids) == continuation(1)


async def test_a_faster_backend_takes_over_between_two_steps(shard: Shard) -> None:
    call = shard.stub.Run()
    faster = shard.backend.faster = SelfFeedingBackend()
    tokens: list[int] = []
    for number in range(1, 9):
        if number == 5:
            shard.worker.call(shard.engine.upgrade)
        await call.write(prefill(number) if number == 1 else decode(number))
        tokens += (await call.read()).token_ids
    await call.done_writing()

    assert tokens == continuation(8)
    assert shard.engine.backend.name == faster.name
    assert faster.num_own_steps == 4


def test_a_chunk_and_a_decode_share_a_step() -> None:
    engine = Engine(NumpyBackend(), block_size=BLOCK)
    engine.warmup(WarmupLimits(16, 4, 0, 0))
    first, second = ([*PROMPT], [8, 8, 2])
    news = [NewSequence(1, first, 6, SamplingParams()), NewSequence(2, second, 3, SamplingParams())]
    work = [Work(1, 0, 6), Work(2, 0, 2, Wanted.NOTHING)]
    engine.collect(engine.launch(Step(1, news, (), work, {1: [3, 1], 2: [2]})))
    step = Step(2, work=[Work(1, 6, 1), Work(2, 2, 1)])
    result = engine.collect(engine.launch(step))

    told = dict(zip(result.ids, result.token_ids, strict=True))
    assert told == {1: continuation(2)[1], 2: next_token(second)}
