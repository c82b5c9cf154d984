import asyncio
from collections.abc import Sequence

import pytest

from kagami_proto.errors import Overloaded
from kagami_router.text.turns import Turns


def turns(max_waiting: int = 100, max_size: int = 10**6) -> Turns:
    return Turns("things", max_waiting=max_waiting, max_size=max_size)


async def order(given: Turns, wanted: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """In which order these get their turns, when all come while somebody has one."""
    had: list[tuple[str, int]] = []

    async def take(caller: str, size: int) -> None:
        async with given.turn(caller, size):
            had.append((caller, size))
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        async with given.turn("somebody", 1):
            for caller, size in wanted:
                tasks.create_task(take(caller, size))
            await asyncio.sleep(0)
    return had


async def test_a_small_one_passes_the_large_ones_of_others() -> None:
    had = await order(turns(), [("a", 50)] * 20 + [("b", 1)])
    assert had[0] == ("b", 1)


async def test_a_small_one_passes_the_large_ones_of_its_own_caller() -> None:
    had = await order(turns(), [("a", 50)] * 20 + [("a", 1)])
    assert had[0] == ("a", 1)


async def test_callers_share_by_size() -> None:
    had = await order(turns(), [("a", 50)] * 10 + [("b", 100)] * 5)
    half = had[: len(had) // 2 + 1]
    assert sum(size for who, size in half if who == "b") >= 200


async def test_a_large_one_is_passed_by_no_more_than_its_size() -> None:
    had = await order(turns(), [("a", 1)] * 90 + [("b", 30)])
    assert had.index(("b", 30)) <= 30


async def test_one_caller_cannot_fill_the_line_of_another() -> None:
    given = turns(max_waiting=3)
    async with asyncio.TaskGroup() as tasks:
        async with given.turn("a", 1):
            waiting = [tasks.create_task(order_of_one(given, "a")) for _ in range(3)]
            waiting.append(tasks.create_task(order_of_one(given, "b")))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="3 things of you wait already"):
                async with given.turn("a", 1):
                    pass
    assert all(task.result() for task in waiting)


async def order_of_one(given: Turns, caller: str) -> bool:
    async with given.turn(caller, 1):
        return True


async def test_what_waits_has_a_greatest_size_for_one_caller_and_for_all() -> None:
    given = turns(max_size=10)
    async with given.turn("a", 1):
        waiting = [asyncio.ensure_future(order_of(given, f"{n}", 10)) for n in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="of all wait already, 80 bytes"):
            async with given.turn("new", 1):
                pass
    await asyncio.gather(*waiting)


async def order_of(given: Turns, caller: str, size: int) -> None:
    async with given.turn(caller, size):
        pass


async def test_who_leaves_gives_the_turn_to_the_next() -> None:
    given = turns()
    async with given.turn("a", 1):
        first, second, third = (
            asyncio.ensure_future(order_of(given, f"{number}", number)) for number in (1, 2, 3)
        )
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
    first.cancel()  # it has its turn by now, and does not know it yet
    await third
    assert first.cancelled()
    assert second.cancelled()


async def test_nothing_is_kept_when_nobody_waits() -> None:
    given = turns()
    await order(given, [(f"{n}", n) for n in range(20)])
    assert not given._ends
    assert not given._lines
    assert not given._is_taken


async def test_who_leaves_in_the_moment_of_its_turn_is_passed_over() -> None:
    given = turns()
    async with given.turn("a", 1):
        first = asyncio.ensure_future(order_of(given, "b", 1))
        second = asyncio.ensure_future(order_of(given, "c", 2))
        await asyncio.sleep(0)
        first.cancel()  # noticed after the turn is passed on
    await second
    assert first.cancelled()
