"""The shards of one model from connecting to their loss; and again, if somebody asks.

Connect -> facts and policy -> warm-up -> scheduler. Opened again, the new scheduler has everybody
who was in the old one: they wait to be prefilled from their logs, and go on where they were.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from opentelemetry.trace import SpanKind, Tracer

from kagami_proto.errors import GenerationFailed, ShardLost
from kagami_proto.span_names import Key, SpanName
from kagami_proto.tracing import NO_TRACING, span
from kagami_proto.values import Grammar
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.step import Event, StepResults
from kagami_router.shards.client import ShardGroup
from kagami_router.shards.messages import Pool, ShardInfo
from kagami_router.shards.stream import StepStream

logger = logging.getLogger(__name__)

# A process that is about to end may still take a connection, and answer nothing or an error.
RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class WarmupLimits:
    """The largest step and sequence that will come; 0: as the shard sees fit."""

    max_step_tokens: int
    max_batch_size: int
    max_total_tokens: int = 0
    max_pool_tokens: int = 0


class ShardSession:
    """An async context manager: entering connects and warms up, leaving closes the connections.

    `configure` says from the facts and the pool how the scheduler has to be. Entering raises
    `ShardLost`, and `GenerationFailed` if the limits do not fit into memory.
    """

    def __init__(
        self,
        master: str,
        limits: WarmupLimits,
        configure: Callable[[ShardInfo, Pool], SchedulerConfig],
        *,
        tracer: Tracer = NO_TRACING.tracer,
    ) -> None:
        """`master`: path of the first shard's socket; of several it ends in "-0"."""
        self._master = master
        self._limits = limits
        self._configure = configure
        self._tracer = tracer
        self._connections = AsyncExitStack()
        self._group: ShardGroup | None = None
        self._facts: ShardInfo | None = None
        self._pool: Pool | None = None
        self._scheduler: Scheduler | None = None
        self._is_warm = False

    @property
    def facts(self) -> ShardInfo:
        """What the first shard says of itself."""
        assert self._facts is not None, "entered"
        return self._facts

    @property
    def pool(self) -> Pool:
        """The KV cache that the warm-up found."""
        assert self._pool is not None, "entered"
        return self._pool

    @property
    def scheduler(self) -> Scheduler:
        """The present one; another after each `reopen`."""
        assert self._scheduler is not None, "entered"
        return self._scheduler

    def are_up(self) -> Sequence[bool]:
        """For each shard whether it serves."""
        return self._group.are_up() if self._group is not None else ()

    async def __aenter__(self) -> Self:
        try:
            self._scheduler = Scheduler(await self._open())
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def reopen(self) -> list[Event]:
        """Wait for shards to be there again, and hand everybody to a new scheduler.

        Until then `scheduler` is the old one: who comes meanwhile is handed over too. Returns what
        it means for those that the new pool has no room for. Raises `ShardLost` where the limits no
        longer fit into memory; a shard that is lost on the way is waited for again.
        """
        config = None
        while config is None:
            await self._close()
            try:
                config = await self._open()
            except GenerationFailed as error:
                raise ShardLost(f"the shards cannot be warmed up again: {error}") from error
            except ShardLost as error:
                logger.info("Waiting for shards", extra={"error": str(error)})
                await asyncio.sleep(RETRY_S)
        self._scheduler, events = self.scheduler.successor(config)
        return events

    def open_steps(self, take: Callable[[StepResults], None]) -> StepStream:
        """A new step stream, to be entered; `take` gets what comes back."""
        assert self._group is not None, "entered"
        return self._group.open_steps(take)

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Have every shard compile a grammar; see `ShardGroup.compile_grammar`."""
        if self._group is None or not self._is_warm:
            raise ShardLost("the shards are being opened again")
        await self._group.compile_grammar(grammar)

    async def _open(self) -> SchedulerConfig:
        with span(self._tracer, SpanName.ROUTER_CONNECT) as opened:
            self._facts = await self._connect()
            opened.set_attribute(Key.WORLD_SIZE, self._facts.world_size)
        logger.info("Warming up model")
        with span(self._tracer, SpanName.ROUTER_WARMUP, kind=SpanKind.CLIENT) as opened:
            assert self._group is not None
            limits = self._limits
            self._pool = await self._group.warmup(
                max_step_tokens=limits.max_step_tokens,
                max_batch_size=limits.max_batch_size,
                max_total_tokens=limits.max_total_tokens,
                max_pool_tokens=limits.max_pool_tokens,
            )
            opened.set_attribute(Key.KV_BLOCKS, self._pool.num_blocks)
        self._is_warm = True
        return self._configure(self._facts, self._pool)

    async def _connect(self) -> ShardInfo:
        """All shards: the first tells how many there are, and they are numbered at their end."""
        facts = await self._wait_for([f"unix://{self._master}"])
        if facts.world_size <= 1:
            return facts
        prefix = self._master.removesuffix("-0")
        return await self._wait_for([f"unix://{prefix}-{rank}" for rank in range(facts.world_size)])

    async def _wait_for(self, addresses: list[str]) -> ShardInfo:
        self._group = await self._connections.enter_async_context(ShardGroup(addresses))
        return await self._group.wait_ready()

    async def _close(self) -> None:
        self._is_warm = False
        connections, self._connections = self._connections, AsyncExitStack()
        await connections.aclose()
