"""The shards of one model as the router sees them: the unary calls, and who is there.

Addresses, not file names: a shard may live on another host. The step stream is in `stream.py`,
the conversions from and to protobuf in `messages.py`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from opentelemetry import trace

from kagami_proto import generate_pb2 as pb
from kagami_proto import generate_pb2_grpc, local_channel
from kagami_proto.errors import GenerationFailed, InvalidRequest, ShardLost
from kagami_proto.tracing import headers_of
from kagami_proto.values import Grammar
from kagami_proto.wire import grammar_to_pb
from kagami_router.scheduler.step import StepResults
from kagami_router.shards.messages import Pool, ShardInfo, info_from_pb, pool_from_pb
from kagami_router.shards.stream import StepStream

logger = logging.getLogger(__name__)

# A step result with prompt logprobs or a replay of a long prompt has no natural bound; a shard
# that starts binds its socket within seconds, so reconnecting never backs off for long.
CHANNEL_OPTIONS = (
    *local_channel.OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
)
# How often a log line says what is being waited for.
WAIT_REPORT_S = 10.0
# A grammar compiles within about a second, but stands behind others'.
COMPILE_TIMEOUT_S = 60.0


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
        return info_from_pb(facts[0])

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
        return pool_from_pb(pools)

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
