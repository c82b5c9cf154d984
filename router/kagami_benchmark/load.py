"""When requests are sent: after the answer to the one before, or at random times.

Both have limits: the number of requests, the time after which no more are sent, and the client's
timeout for a single request.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from kagami_benchmark.client import Outcome
from kagami_benchmark.workload import Workload, gaps

Ask = Callable[[bytes, Outcome], Coroutine[None, None, None]]


@dataclass(slots=True, eq=False)
class Run:
    """One run of a workload, while it goes on and when it is over."""

    num_requests: int
    outcomes: list[Outcome] = field(default_factory=list)
    """The outcomes of all requests sent until now."""
    started: float = 0.0
    ended: float = 0.0
    client_cpu_s: float = 0.0
    """CPU time of this process during the run."""

    @property
    def num_ended(self) -> int:
        return sum(bool(one.ended) for one in self.outcomes)


async def drive(
    run: Run,
    workload: Workload,
    bodies: Sequence[bytes],
    ask: Ask,
    *,
    duration_s: float,
    seed: str,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Send `bodies` as the workload says; fills `run`, which is complete when this returns."""
    cpu = time.process_time()
    run.started = clock()
    if workload.rate:
        await _open_loop(run, bodies, ask, gaps(workload.rate, Random(seed)), duration_s, clock)
    else:
        await _closed_loop(run, bodies, ask, workload.concurrency, duration_s, clock)
    run.ended = max((one.ended for one in run.outcomes), default=clock())
    run.client_cpu_s = time.process_time() - cpu


async def _closed_loop(
    run: Run,
    bodies: Sequence[bytes],
    ask: Ask,
    concurrency: int,
    duration_s: float,
    clock: Callable[[], float],
) -> None:
    rest = iter(bodies)

    async def client() -> None:
        for body in rest:
            if clock() - run.started > duration_s:
                return
            outcome = Outcome(clock())
            run.outcomes.append(outcome)
            await ask(body, outcome)

    async with asyncio.TaskGroup() as clients:
        for _ in range(min(concurrency, len(bodies))):
            clients.create_task(client())


async def _open_loop(
    run: Run,
    bodies: Sequence[bytes],
    ask: Ask,
    pauses: Iterable[float],
    duration_s: float,
    clock: Callable[[], float],
) -> None:
    """A request's time starts when it is due, also where the client itself is late."""
    due = run.started
    async with asyncio.TaskGroup() as requests:
        for body, pause in zip(bodies, pauses, strict=False):
            due += pause
            if due - run.started > duration_s:
                return
            await asyncio.sleep(due - clock())
            outcome = Outcome(due)
            run.outcomes.append(outcome)
            requests.create_task(ask(body, outcome))
