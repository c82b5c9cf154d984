"""A shard without a model, and the same over a real socket.

`FakeEngine` keeps in every slot of its pool what was written there: a position and a hash of all
tokens up to it. Before a sequence computes anything, each slot it attends to must hold just that,
so a block that is shared, freed or cached wrongly is found at once. The next token is a function
of that hash: any order, batching, preemption or replay must give the same tokens.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import grpc.aio

from kagami_proto import generate_pb2 as pb
from kagami_proto import generate_pb2_grpc
from kagami_proto.values import DEVICE_POLICIES, Wanted
from kagami_proto.wire import policy_to_pb, wanted_from_pb

VOCAB_SIZE = 257
EOS = 256
_MASK = (1 << 61) - 1


def extended(prefix: int, token_id: int) -> int:
    """The hash of a prefix and one more token."""
    return ((prefix ^ (token_id + 1)) * 0x9E3779B97F4A7C15 + 0x1234567) & _MASK


def hash_of(ids: Sequence[int]) -> int:
    prefix = 0
    for token_id in ids:
        prefix = extended(prefix, token_id)
    return prefix


def next_token(prefix: int, eos_every: int = 0) -> int:
    """What follows a prefix: a letter or a space, or EOS about once in `eos_every` times."""
    if eos_every and (prefix >> 20) % eos_every == 0:
        return EOS
    letter = (prefix >> 30) % 27
    return 97 + letter if letter < 26 else 32


def generated(prompt: Sequence[int], max_new_tokens: int, eos_every: int = 0) -> list[int]:
    """What a request must bring, whatever happens around it."""
    prefix = hash_of(prompt)
    ids: list[int] = []
    while len(ids) < max_new_tokens and (not ids or ids[-1] != EOS):
        ids.append(next_token(prefix, eos_every))
        prefix = extended(prefix, ids[-1])
    return ids


class Entry(NamedTuple):
    """The work of one sequence in one step."""

    id: int
    position: int
    num_tokens: int
    wanted: Wanted = Wanted.ONE_TOKEN


@dataclass
class Request:
    """A step as the wire brings it, without protobuf."""

    number: int
    work: list[Entry]
    drop_ids: Sequence[int] = ()
    new: dict[int, list[int]] = field(default_factory=dict)
    grants: dict[int, list[int]] = field(default_factory=dict)
    drafts: Mapping[int, Sequence[int]] = field(default_factory=dict)


@dataclass
class Result:
    """What each sequence got (by id), who failed, or what the whole pass failed with."""

    number: int
    tokens: dict[int, list[int]] = field(default_factory=dict)
    vectors: dict[int, tuple[float, ...]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    error: str = ""
    out_of_memory: bool = False


@dataclass
class Faults:
    """What goes wrong, asked anew for every step."""

    pass_error: Callable[[Request], str] = lambda _: ""
    out_of_memory: Callable[[Request], bool] = lambda _: False
    sequence_error: Callable[[int], str] = lambda _: ""


@dataclass
class _State:
    ids: list[int]
    hashes: list[int]
    blocks: list[int] = field(default_factory=list)
    has_holes: bool = False
    """It was in a pass that failed: what it computes from then on is nonsense."""

    def append(self, token_id: int) -> None:
        self.ids.append(token_id)
        self.hashes.append(extended(self.hashes[-1], token_id))


def vector_of(prompt: Sequence[int]) -> tuple[float, ...]:
    """What a request for a vector must bring: a function of all tokens of the prompt."""
    prefix = hash_of(prompt)
    return (float(prefix & 0xFFFF), float(prefix >> 20 & 0xFFFF))


class FakeEngine:
    """Runs steps on a pool that knows what was written to each of its slots."""

    def __init__(self, num_blocks: int, block_size: int, *, eos_every: int = 0) -> None:
        self.faults = Faults()
        self.num_computed = 0
        self.largest_step = 0
        self._block_size = block_size
        self._slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)
        self._states: dict[int, _State] = {}
        self._eos_every = eos_every

    @property
    def ids(self) -> set[int]:
        """The sequences it holds."""
        return set(self._states)

    def reset(self) -> None:
        self._states.clear()

    def run(self, step: Request) -> Result:
        for dropped in step.drop_ids:
            self._states.pop(dropped, None)
        for sequence_id, ids in step.new.items():
            assert sequence_id not in self._states, "sent twice without a drop"
            self._states[sequence_id] = _State(list(ids), _prefix_hashes(ids))
        for sequence_id, blocks in step.grants.items():
            if state := self._states.get(sequence_id):
                assert 0 not in blocks, "the reserved block was given"
                state.blocks += blocks
        result = Result(step.number)
        if self.faults.out_of_memory(step):
            result.error, result.out_of_memory = "out of memory", True
        else:
            result.error = self.faults.pass_error(step)
        if result.error:
            self._write_garbage(step.work)
            return result
        self.largest_step = max(self.largest_step, sum(entry.num_tokens for entry in step.work))
        for entry in step.work:
            self._compute(entry, step.drafts.get(entry.id, ()), result)
        return result

    def _compute(self, entry: Entry, draft: Sequence[int], result: Result) -> None:
        state = self._states.get(entry.id)
        end = entry.position + entry.num_tokens
        if state is None or end > len(state.ids) + len(draft):
            result.failures[entry.id] = "the sequence is not in memory or lacks ids"
            return
        if error := self.faults.sequence_error(entry.id):
            result.failures[entry.id] = error
            del self._states[entry.id]
            return
        is_behind = entry.wanted in (Wanted.ONE_TOKEN, Wanted.VECTOR)
        assert not is_behind or end == len(state.ids), "wanted before the end of what is known"
        if state.has_holes:
            self._write_garbage([entry])
            if entry.wanted is Wanted.ONE_TOKEN:
                state.append(0)
                result.tokens[entry.id] = [0]
            return
        num_known = len(state.ids)
        assert bool(draft) == (entry.wanted is Wanted.VERIFY)
        assert not draft or (entry.position, entry.num_tokens) == (num_known - 1, 1 + len(draft))
        for token_id in draft:
            state.append(token_id)
        self.num_computed += entry.num_tokens
        for position in range(entry.position, end):
            self._slots[self._slot(state, position)] = (position, state.hashes[position + 1])
        for position in range(end):
            found = self._slots[self._slot(state, position)]
            assert found == (position, state.hashes[position + 1]), (
                f"sequence {entry.id} attends to {found} at position {position}"
            )
        if entry.wanted is Wanted.VECTOR:
            result.vectors[entry.id] = vector_of(state.ids)
        elif entry.wanted is not Wanted.NOTHING:
            result.tokens[entry.id] = self._accept(state, num_known)

    def _accept(self, state: _State, num_known: int) -> list[int]:
        """The drafted tokens behind the first `num_known` that are right, and one more."""
        end = num_known
        while True:
            token_id = next_token(state.hashes[end], self._eos_every)
            if state.ids[end : end + 1] != [token_id]:
                break
            end += 1
        del state.ids[end:], state.hashes[end + 1 :]
        state.append(token_id)
        return state.ids[num_known:]

    def _write_garbage(self, work: Sequence[Entry]) -> None:
        """A pass that failed half-way has written something somewhere."""
        for entry in work:
            if state := self._states.get(entry.id):
                state.has_holes = True
                for position in range(entry.position, entry.position + entry.num_tokens):
                    self._slots[self._slot(state, position)] = (-1, -1)

    def _slot(self, state: _State, position: int) -> int:
        block = state.blocks[position // self._block_size]
        return block * self._block_size + position % self._block_size


def _prefix_hashes(ids: Sequence[int]) -> list[int]:
    hashes = [0]
    for token_id in ids:
        hashes.append(extended(hashes[-1], token_id))
    return hashes


class FakeShard(generate_pb2_grpc.TextGenerationServiceServicer):
    """The protocol of generate.proto in front of a `FakeEngine`; an async context manager.

    `gate`, cleared, holds results back until it is set: steps pile up as behind a slow device.
    `compiling`, cleared, does so with grammars; `compile_began` is set when one has arrived.
    """

    def __init__(
        self, path: str, *, num_blocks: int = 64, block_size: int = 4, eos_every: int = 0
    ) -> None:
        self.address = f"unix://{path}"
        self.engine = FakeEngine(num_blocks, block_size, eos_every=eos_every)
        self.gate = asyncio.Event()
        self.gate.set()
        self.compiling = asyncio.Event()
        self.compiling.set()
        self.compile_began = asyncio.Event()
        self.steps: list[pb.Step] = []
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        generate_pb2_grpc.add_TextGenerationServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        """Go away at once, whatever is running."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(grace=None)

    async def Info(self, request: pb.InfoRequest, context: object) -> pb.InfoResponse:
        return pb.InfoResponse(
            model_type="fake",
            dtype="torch.float32",
            device_type="cpu",
            attention="none",
            vocab_size=VOCAB_SIZE,
            max_positions=2048,
            block_size=self._block_size,
            eos_token_ids=[EOS],
            world_size=1,
            version="0",
            policy=policy_to_pb(DEVICE_POLICIES["cpu"]),
        )

    async def Health(self, request: pb.HealthRequest, context: object) -> pb.HealthResponse:
        return pb.HealthResponse(last_step=len(self.steps))

    async def Warmup(self, request: pb.WarmupRequest, context: object) -> pb.WarmupResponse:
        return pb.WarmupResponse(
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            kv_bytes=1,
            elapsed_ns=10**9,
            weight_bytes=10**6,
            kv_token_bytes=10,
            read_bandwidth=10**10,
        )

    async def CompileGrammar(
        self, request: pb.Grammar, context: object
    ) -> pb.CompileGrammarResponse:
        self.compile_began.set()
        await self.compiling.wait()
        return pb.CompileGrammarResponse(error="no" if request.source == "bad" else "")

    async def Run(
        self, request_iterator: AsyncIterator[pb.Step], context: object
    ) -> AsyncIterator[pb.StepResult]:
        self.engine.reset()
        async for message in request_iterator:
            self.steps.append(message)
            await self.gate.wait()
            yield self._answer(message)

    def _answer(self, message: pb.Step) -> pb.StepResult:
        step = Request(
            number=message.number,
            work=[
                Entry(*entry)
                for entry in zip(
                    message.ids,
                    message.positions,
                    message.counts,
                    wanted_from_pb(message.wanted) or [Wanted.ONE_TOKEN] * len(message.ids),
                    strict=True,
                )
            ],
            drop_ids=message.drop_ids,
            new={new.id: list(new.token_ids) for new in message.new_sequences},
            grants={grant.id: list(grant.blocks) for grant in message.grants},
            drafts={draft.id: list(draft.token_ids) for draft in message.drafts},
        )
        result = self.engine.run(step)
        wanted = {new.id: new for new in message.new_sequences}
        rows = [(key, token_id) for key, ids in result.tokens.items() for token_id in ids]
        answer = pb.StepResult(
            number=result.number,
            ids=[sequence_id for sequence_id, _ in rows],
            token_ids=[token_id for _, token_id in rows],
            logprobs=[-0.5] * len(rows),
            vectors=[pb.Vector(id=key, values=values) for key, values in result.vectors.items()],
            failures=[
                pb.SequenceFailure(id=sequence_id, message=text)
                for sequence_id, text in result.failures.items()
            ],
            error=result.error,
            out_of_memory=result.out_of_memory,
            host_ns=2_000_000,
            device_ns=1_000_000,
            sampling_ns=200_000,
            admission_ns=100_000,
        )
        if result.error:
            return answer
        for entry in step.work:
            new = wanted.get(entry.id)
            if new is not None and new.prompt_logprobs:
                answer.prompt_logprobs.append(
                    pb.PromptLogprobs(
                        id=new.id,
                        first_position=entry.position + 1,
                        logprobs=[-1.0] * (entry.num_tokens - 1),
                        **_prompt_tops(new, entry),
                    )
                )
        for index, (sequence_id, _) in enumerate(rows):
            new = wanted.get(sequence_id)
            if new is not None and new.top_n_tokens:
                ids = [answer.token_ids[index], *range(new.top_n_tokens - 1)]
                answer.top_tokens.append(
                    pb.TopTokens(index=index, token_ids=ids, logprobs=[-0.5] * len(ids))
                )
        return answer


def _prompt_tops(new: pb.NewSequence, entry: Entry) -> dict[str, Any]:
    """At each position the prompt token itself, then the letters from A on."""
    width = new.top_n_tokens
    targets = new.token_ids[entry.position + 1 : entry.position + entry.num_tokens]
    return {
        "top_n": width,
        "top_token_ids": [i for target in targets for i in (target, *range(65, 90))[:width]],
        "top_logprobs": [-1.0] * width * len(targets),
    }
