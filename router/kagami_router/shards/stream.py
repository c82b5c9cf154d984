"""The step stream: one bidirectional call to every shard of a model.

Every shard gets the same steps, so they agree by construction. The results of a step count when
all shards have told theirs.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from kagami_proto import generate_pb2 as pb
from kagami_proto.errors import ShardLost
from kagami_router.scheduler.step import Step, StepResults
from kagami_router.shards.connection import CallConnection, CallEnded
from kagami_router.shards.messages import results_from_pb, step_to_pb
from kagami_router.telemetry.sequence_trace import WireContext

_RUN = f"/{pb.DESCRIPTOR.services_by_name['TextGenerationService'].full_name}/Run"


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
