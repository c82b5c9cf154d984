"""The shards as the router sees them: gRPC lives here, and the step stream's in `wire/`.

Turns steps into protobuf and results back. Addresses, not file names: a shard may live on another
host. Every shard of a model gets the same steps, so they agree by construction; sampled tokens
are read from the first, and a failure counts whoever reports it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from opentelemetry import trace

from kagami_proto import generate_pb2 as pb
from kagami_proto import generate_pb2_grpc
from kagami_proto.errors import GenerationFailed, InvalidRequest, ShardLost
from kagami_proto.tracing import headers_of
from kagami_proto.values import DevicePolicy, Grammar
from kagami_proto.wire import grammar_to_pb, policy_from_pb, sampling_to_pb, wanted_to_pb
from kagami_router.request.token_log import TopToken
from kagami_router.scheduler.step import (
    Failure,
    NewSequence,
    PromptLogprobs,
    Sample,
    Step,
    StepResults,
)
from kagami_router.shards.connection import CallConnection, CallEnded
from kagami_router.telemetry.sequence_trace import WireContext

logger = logging.getLogger(__name__)

# A step result with prompt logprobs or a replay of a long prompt has no natural bound; a shard
# that starts binds its socket within seconds, so reconnecting never backs off for long.
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
)
# How often a log line says what is being waited for.
WAIT_REPORT_S = 10.0
# A grammar compiles within about a second, but stands behind others'.
COMPILE_TIMEOUT_S = 60.0

_RUN = f"/{pb.DESCRIPTOR.services_by_name['TextGenerationService'].full_name}/Run"


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """Facts about the model and the device."""

    model_type: str
    dtype: str
    device_type: str
    attention: str
    vocab_size: int
    max_positions: int
    """0: unknown."""
    block_size: int
    eos_token_ids: frozenset[int]
    world_size: int
    version: str
    quantization: str
    """"int8", "gptq", …; empty: the weights are not quantized."""
    policy: DevicePolicy


@dataclass(frozen=True, slots=True)
class Pool:
    """The KV cache that fits all shards; block 0 is reserved."""

    num_blocks: int
    block_size: int
    kv_bytes: int
    """On one shard."""
    elapsed_s: float
    weight_bytes: int
    """On the shard that has most"""
    kv_token_bytes: int
    bandwidth: float
    """Bytes a second, of the slowest shard; 0: not measured"""


class StepStream:
    """One step stream to every shard; an async context manager.

    Entering it connects and raises `ShardLost`; the shards forget every sequence of the stream
    before it. `take` gets the results of each step, in order, as soon as all shards have told them.
    """

    def __init__(self, addresses: Sequence[str], take: Callable[[StepResults], None]) -> None:
        self._addresses = addresses
        self._take = take
        self._calls: list[CallConnection] = []
        # What each shard has told of steps that others have not told all of.
        self._told: list[deque[bytes]] = [deque() for _ in addresses]
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def are_open(self) -> list[bool]:
        """For each shard whether its stream stands."""
        return [call.is_open for call in self._calls] or [False] * len(self._addresses)

    async def __aenter__(self) -> Self:
        try:
            for told, address in zip(self._told, self._addresses, strict=True):
                call = await CallConnection.open(
                    address, _RUN, partial(self._receive, told), self._lost
                )
                self._calls.append(call)
        except CallEnded as error:
            self._close()
            raise ShardLost(str(error)) from error
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        for call in self._calls:
            call.close()
        if not self._over.cancel() and not self._over.cancelled():
            self._over.exception()  # read, so that asyncio does not miss a reader

    def send(self, step: Step, contexts: Mapping[int, WireContext] = {}) -> None:
        """Send a step to every shard; raises `ShardLost`.

        `contexts`: of the new sequences that are traced, by id.
        """
        message = step_to_pb(step, contexts).SerializeToString()
        try:
            for call in self._calls:
                call.send(message)
        except CallEnded as error:
            raise ShardLost(str(error)) from error

    async def lost(self) -> None:
        """Wait for the stream's end: raises `ShardLost`, or what `take` raised."""
        await self._over

    def _lost(self, reason: str) -> None:
        self._fail(ShardLost(reason))

    def _fail(self, error: BaseException) -> None:
        """Tell whoever waits for the end; asyncio's future takes no `StopIteration`."""
        if not self._over.done():
            is_told = isinstance(error, Exception) and not isinstance(error, StopIteration)
            self._over.set_exception(error if is_told else RuntimeError(repr(error)))

    def _receive(self, told: deque[bytes], message: bytes) -> None:
        told.append(message)
        if self._over.done() or not all(self._told):
            return
        # Nobody above us but the event loop: whoever waits for the end is told.
        try:
            messages = [pb.StepResult.FromString(each.popleft()) for each in self._told]
            self._take(results_from_pb(messages))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a library in Rust is no `Exception`
            self._fail(error)


class ShardGroup:
    """All shards of one model; an async context manager that owns their channels."""

    def __init__(self, addresses: Sequence[str]) -> None:
        if not addresses:
            raise ValueError("a model needs at least one shard")
        self._addresses = list(addresses)
        self._stubs: list[generate_pb2_grpc.TextGenerationServiceAsyncStub] = []
        self._stack = AsyncExitStack()
        self._has_answered = [False] * len(addresses)
        self._steps: StepStream | None = None

    async def __aenter__(self) -> Self:
        for address in self._addresses:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            await self._stack.enter_async_context(channel)
            self._stubs.append(generate_pb2_grpc.TextGenerationServiceStub(channel))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stubs.clear()
        await self._stack.aclose()

    def are_up(self) -> list[bool]:
        """For each shard whether it has answered and its step stream stands, if there is one."""
        return self._has_answered if self._steps is None else self._steps.are_open()

    async def wait_ready(self) -> ShardInfo:
        """Wait until every shard answers `Info`, however long its weights take to load."""
        facts = [await self._wait_for_info(rank) for rank in range(len(self._stubs))]
        return _info_from_pb(facts[0])

    async def _wait_for_info(self, rank: int) -> pb.InfoResponse:
        while True:
            try:
                facts = await self._stubs[rank].Info(
                    pb.InfoRequest(), wait_for_ready=True, timeout=WAIT_REPORT_S
                )
            except grpc.aio.AioRpcError as error:
                if error.code() not in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                ):
                    raise ShardLost(_reason(error)) from error
                logger.info(
                    "Waiting for shard to be ready",
                    extra={"rank": rank, "address": self._addresses[rank]},
                )
            else:
                self._has_answered[rank] = True
                return facts

    async def warmup(
        self,
        *,
        max_step_tokens: int,
        max_batch_size: int,
        max_total_tokens: int,
        max_pool_tokens: int,
    ) -> Pool:
        """Let every shard size its KV cache; the smallest pool counts.

        Raises `GenerationFailed` if the limits do not fit into memory, `ShardLost`.
        """
        request = pb.WarmupRequest(
            max_step_tokens=max_step_tokens,
            max_batch_size=max_batch_size,
            max_total_tokens=max_total_tokens,
            max_pool_tokens=max_pool_tokens,
        )
        try:
            pools = await asyncio.gather(
                *(stub.Warmup(request, metadata=_trace_metadata()) for stub in self._stubs)
            )
        except grpc.aio.AioRpcError as error:
            is_lost = error.code() is grpc.StatusCode.UNAVAILABLE
            raise (ShardLost if is_lost else GenerationFailed)(_reason(error)) from error
        smallest = min(pools, key=lambda pool: pool.num_blocks)
        return Pool(
            num_blocks=smallest.num_blocks,
            block_size=smallest.block_size,
            kv_bytes=smallest.kv_bytes,
            elapsed_s=max(pool.elapsed_ns for pool in pools) / 1e9,
            weight_bytes=max(pool.weight_bytes for pool in pools),
            kv_token_bytes=max(pool.kv_token_bytes for pool in pools),
            bandwidth=float(min(pool.read_bandwidth for pool in pools)),
        )

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Have every shard compile a grammar, or find that it has; raises `InvalidRequest`.

        `ShardLost` where a shard is gone, `GenerationFailed` where it takes too long.
        """
        message = grammar_to_pb(grammar)
        calls = [stub.CompileGrammar(message, timeout=COMPILE_TIMEOUT_S) for stub in self._stubs]
        try:
            answers = await asyncio.gather(*calls)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise GenerationFailed(
                    f"the grammar was not compiled within {COMPILE_TIMEOUT_S:g} s"
                ) from error
            raise ShardLost(_reason(error)) from error
        for answer in answers:
            if answer.error:
                raise InvalidRequest(f"grammar is not valid: {answer.error}")

    def open_steps(self, take: Callable[[StepResults], None]) -> StepStream:
        """A new step stream, to be entered; `take` gets what comes back."""
        self._steps = StepStream(self._addresses, take)
        return self._steps


def _trace_metadata() -> tuple[tuple[str, str], ...]:
    """The current span's context as gRPC metadata."""
    return tuple(headers_of(trace.get_current_span().get_span_context()).items())


def _reason(error: grpc.aio.AioRpcError) -> str:
    return error.details() or error.code().name


def _info_from_pb(info: pb.InfoResponse) -> ShardInfo:
    return ShardInfo(
        model_type=info.model_type,
        dtype=info.dtype,
        device_type=info.device_type,
        attention=info.attention,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
        block_size=info.block_size,
        eos_token_ids=frozenset(info.eos_token_ids),
        world_size=info.world_size,
        version=info.version,
        quantization=info.quantization,
        policy=policy_from_pb(info.policy),
    )


_NONE: tuple[tuple[()], ...] = ((),) * 5


def step_to_pb(step: Step, contexts: Mapping[int, WireContext] = {}) -> pb.Step:
    """Records become columns."""
    columns = zip(*step.work, strict=True) if step.work else _NONE
    sequences, positions, counts, blocks, wanted = columns
    ids = [sequence.id for sequence in sequences]
    message = pb.Step(number=step.number, ids=ids, positions=positions, counts=counts)
    if any(blocks):
        message.grants.extend(
            pb.BlockGrant(id=sequence_id, blocks=given)
            for sequence_id, given in zip(ids, blocks, strict=True)
            if given
        )
    if any(wanted):  # one token is 0
        message.wanted.extend(wanted_to_pb(wanted))
    for sequence_id, draft in step.drafts.items():
        message.drafts.append(pb.Draft(id=sequence_id, token_ids=draft))
    if step.drop_ids:
        message.drop_ids.extend(step.drop_ids)
    for new in step.new_sequences:
        message.new_sequences.append(_new_to_pb(new, contexts.get(new.id)))
    return message


def _new_to_pb(new: NewSequence, context: WireContext | None) -> pb.NewSequence:
    context = context or _NOT_TRACED
    return pb.NewSequence(
        id=new.id,
        token_ids=new.token_ids,
        num_prompt_tokens=new.num_prompt_tokens,
        sampling=sampling_to_pb(new.request.sampling),
        grammar=grammar_to_pb(new.request.grammar) if new.request.grammar else None,
        top_n_tokens=new.request.top_n_tokens,
        prompt_logprobs=new.prompt_logprobs,
        adapter_id=new.request.adapter or "",
        traceparent=context.traceparent,
        tracestate=context.tracestate,
        decode_span_id=context.decode_span_id,
    )


_NOT_TRACED = WireContext("", "", 0)


def results_from_pb(messages: Sequence[pb.StepResult]) -> StepResults:
    """What all shards say of one step: the first one's tokens, everybody's failures."""
    first = messages[0]
    none = repeat((), len(first.ids))
    # A row that is not whole is no row: its sequence got no token, which the scheduler sees.
    samples: list[Sample] = list(
        zip(first.ids, first.token_ids, first.logprobs, none, strict=False)
    )
    for top in first.top_tokens:
        alternatives = tuple(map(TopToken, top.token_ids, top.logprobs))
        samples[top.index] = (*samples[top.index][:3], alternatives)
    results = StepResults(
        first.number,
        samples,
        [_prompt_logprobs_from_pb(scored) for scored in first.prompt_logprobs],
        [Failure(failure.id, failure.message) for failure in first.failures],
        first.error,
        first.out_of_memory,
        first.host_ns,
        first.device_ns,
        first.sampling_ns,
        first.admission_ns,
        first.spans_dropped,
        [(vector.id, tuple(vector.values)) for vector in first.vectors],
    )
    for other in messages[1:]:
        results = _with_another(results, other)
    return results


def _with_another(results: StepResults, other: pb.StepResult) -> StepResults:
    """What one more shard says of the same step: who is slowest counts, and who fails."""
    failures = [Failure(failure.id, failure.message) for failure in other.failures]
    return results._replace(
        failures=[*results.failures, *failures],
        error=results.error or other.error,
        out_of_memory=results.out_of_memory or other.out_of_memory,
        host_ns=max(results.host_ns, other.host_ns),
        device_ns=max(results.device_ns, other.device_ns),
        sampling_ns=max(results.sampling_ns, other.sampling_ns),
        admission_ns=max(results.admission_ns, other.admission_ns),
        spans_dropped=results.spans_dropped + other.spans_dropped,
    )


def _prompt_logprobs_from_pb(scored: pb.PromptLogprobs) -> PromptLogprobs:
    width = scored.top_n
    flat = list(map(TopToken, scored.top_token_ids, scored.top_logprobs))
    return PromptLogprobs(
        scored.id,
        scored.first_position,
        list(scored.logprobs),
        [tuple(flat[start : start + width]) for start in range(0, len(flat), width or 1)],
    )
