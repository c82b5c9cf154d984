import asyncio

from kagami_benchmark.client import Outcome
from kagami_benchmark.load import Run, drive
from kagami_benchmark.workload import Length, Workload

ONE = Length(1, 1)


class Server:
    """Takes no time of the clock; knows how many asked at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.running = 0
        self.most = 0

    def clock(self) -> float:
        return self.now

    async def ask(self, body: bytes, outcome: Outcome) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.now += 1.0
        await asyncio.sleep(0)
        self.running -= 1
        outcome.ended = self.now


async def driven(workload: Workload, duration_s: float = 1000.0) -> tuple[Run, Server]:
    run, server = Run(workload.num_requests), Server()
    bodies = [b"{}"] * workload.num_requests
    await drive(
        run, workload, bodies, server.ask, duration_s=duration_s, seed="1", clock=server.clock
    )
    return run, server


async def test_no_more_clients_ask_at_once_than_there_are() -> None:
    run, server = await driven(Workload("w", ONE, ONE, 10, concurrency=3))

    assert (len(run.outcomes), server.most) == (10, 3)


async def test_nothing_is_sent_when_the_time_is_over() -> None:
    run, _ = await driven(Workload("w", ONE, ONE, 100, concurrency=1), duration_s=4.5)

    assert len(run.outcomes) == 5


async def test_with_a_rate_requests_come_by_themselves() -> None:
    """The clock stands while they are sent: what is due has nothing to do with answers."""
    run, _ = await driven(Workload("w", ONE, ONE, 2000, rate=1e6))

    dues = [outcome.started for outcome in run.outcomes]
    assert dues == sorted(dues)
    assert 0.9 < dues[-1] * 1e6 / 2000 < 1.1


async def test_the_same_seed_brings_the_same_arrivals() -> None:
    workload = Workload("w", ONE, ONE, 20, rate=1e6)

    first, second = (await driven(workload))[0], (await driven(workload))[0]

    assert [one.started for one in first.outcomes] == [one.started for one in second.outcomes]
