import asyncio
from contextlib import ExitStack

import pytest
from tests.fakes.fake_loop import FakeLoop

from kagami_proto.errors import IncompleteGeneration, Overloaded, Unavailable
from kagami_proto.values import SamplingParams
from kagami_router.request.prompt import Prompt
from kagami_router.request.values import StoppingParams, ValidRequest
from kagami_router.serving.generation_stream import CallStats, Events
from kagami_router.serving.infer import Generation, Infer
from kagami_router.telemetry.metrics import Metrics

REQUEST = ValidRequest(Prompt((1, 2), "ab"), SamplingParams(), StoppingParams(2))


def infer_over(loop: FakeLoop, permits: int = 2) -> Infer:
    return Infer(loop, Metrics(), max_concurrent_requests=permits)


async def collect_one(infer: Infer) -> Generation:
    (generation,) = await infer.collect([REQUEST], CallStats(0.0))
    return generation


async def test_permits_come_back_whatever_happens() -> None:
    infer = infer_over(FakeLoop())
    with pytest.raises(ZeroDivisionError), infer.permits(2):
        raise ZeroDivisionError
    with infer.permits(2):
        pass


@pytest.mark.parametrize(("total", "spare"), [(128, 16), (8, 1), (7, 0), (1, 0)])
async def test_nobody_keeps_all_others_out(total: int, spare: int) -> None:
    infer = infer_over(FakeLoop(), permits=total)
    with ExitStack() as stack:
        for _ in range(total):
            stack.enter_context(infer.permits(caller="greedy"))
        with pytest.raises(Overloaded), infer.permits(caller="greedy"):
            pass
        for number in range(spare):
            stack.enter_context(infer.permits(caller=str(number)))
        for caller in ("0", "another"):
            with pytest.raises(Overloaded), infer.permits(caller=caller):
                pass
    with infer.permits(total, caller="greedy"):
        pass
    assert not infer._held


async def test_the_spare_permits_are_one_for_each_caller() -> None:
    infer = infer_over(FakeLoop(), permits=64)
    with infer.permits(64, caller="greedy"):
        with pytest.raises(Overloaded), infer.permits(2, caller="other"):
            pass
        with infer.permits(caller="other"):
            with pytest.raises(Overloaded), infer.permits(caller="other"):
                pass
        with infer.permits(caller="other"):
            pass


async def test_all_or_none_of_the_permits_are_taken() -> None:
    infer = infer_over(FakeLoop())
    with infer.permits(1):
        with pytest.raises(Overloaded, match="Model is overloaded"), infer.permits(2):
            pass
        with infer.permits(1):
            pass


async def test_collect_is_the_stream_in_one_piece() -> None:
    generation = await collect_one(infer_over(FakeLoop()))
    assert generation.end.generated_text == " failed:"
    assert [token.text for token in generation.tokens] == [" failed", ":"]
    assert generation.seed is None


async def test_streams_together_carry_their_index() -> None:
    infer = infer_over(FakeLoop())
    seen = []

    def sink(index: int, events: Events) -> bool:
        seen.extend((index, event.token.text) for event in events)
        return True

    async with infer.stream([REQUEST, REQUEST], CallStats(0.0), sink) as call:
        assert [backlog async for backlog in call] == []
    assert sorted(seen) == [(0, " failed"), (0, ":"), (1, " failed"), (1, ":")]


async def test_leaving_streams_together_cancels_them() -> None:
    loop = FakeLoop()
    loop.gate.clear()
    task = asyncio.ensure_future(infer_over(loop).collect([REQUEST, REQUEST], CallStats(0.0)))
    await loop.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.num_open == 0


async def test_draining_waits_for_what_runs_and_refuses_what_comes() -> None:
    loop = FakeLoop()
    loop.gate.clear()
    infer = infer_over(loop)

    async def work() -> str:
        with infer.permits():
            return (await collect_one(infer)).end.generated_text

    running = asyncio.ensure_future(work())
    await loop.entered.wait()
    draining = asyncio.ensure_future(infer.drain(60, 0))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable), infer.permits():
        pass
    assert not draining.done()
    loop.gate.set()
    assert await running == " failed:"
    await draining


async def test_the_deadline_ends_what_still_runs() -> None:
    loop = FakeLoop()
    loop.gate.clear()
    infer = infer_over(loop)

    async def work() -> None:
        with infer.permits():
            await collect_one(infer)

    running = asyncio.ensure_future(work())
    await loop.entered.wait()
    await infer.drain(0, 60)
    with pytest.raises(IncompleteGeneration, match="the server was stopped"):
        await running
    assert loop.num_open == 0
