"""Who gets a thread next."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from kagami_router.text.encode_queue import LONG_CHARACTERS, EncodeQueue

LONG = LONG_CHARACTERS + 1


class Work:
    """Texts to encode; each holds its thread until it is let go."""

    def __init__(self, queue: EncodeQueue) -> None:
        self._queue = queue
        self._gates: dict[str, threading.Event] = {}
        self._began: asyncio.Queue[str] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def submit(self, name: str, num_characters: int) -> "asyncio.Task[str]":
        self._gates[name] = threading.Event()

        def encode() -> str:
            self._loop.call_soon_threadsafe(self._began.put_nowait, name)
            self._gates[name].wait()
            return name

        return asyncio.ensure_future(self._queue.run(num_characters, encode))

    async def next(self) -> str:
        """The next one that has a thread."""
        async with asyncio.timeout(10):
            return await self._began.get()

    def let_go(self, *names: str) -> None:
        for name in names or tuple(self._gates):
            self._gates[name].set()


@asynccontextmanager
async def work(num_threads: int) -> AsyncIterator[Work]:
    with ThreadPoolExecutor(num_threads) as threads:
        made = Work(EncodeQueue(threads, num_threads))
        try:
            yield made
        finally:
            made.let_go()


async def test_the_shortest_that_waits_is_next() -> None:
    async with work(1) as texts:
        jobs = [texts.submit("first", 10)]
        assert await texts.next() == "first"
        jobs += [texts.submit(str(size), size) for size in (3_000_000, LONG, 60_000, 3000)]
        await asyncio.sleep(0)
        texts.let_go()
        order = [await texts.next() for _ in range(4)]
        assert order == ["3000", "60000", str(LONG), "3000000"]
        assert len(await asyncio.gather(*jobs)) == 5


async def test_one_long_text_at_a_time_leaves_threads_to_short_ones() -> None:
    async with work(3) as texts:
        jobs = [texts.submit(f"long {number}", LONG) for number in range(4)]
        assert await texts.next() == "long 0"
        jobs += [texts.submit(f"short {number}", 100) for number in range(2)]
        assert [await texts.next(), await texts.next()] == ["short 0", "short 1"]
        texts.let_go("long 0")
        assert await texts.next() == "long 1"
        texts.let_go()
        await asyncio.gather(*jobs)


async def test_a_long_text_is_not_overtaken_for_ever() -> None:
    """It counts as if it had come later by a time that grows with its length."""
    async with work(1) as texts:
        running = texts.submit("first", 1)
        await texts.next()
        long = texts.submit("long", LONG)
        await asyncio.sleep(LONG * 2e-6 * 1.1)
        later = [texts.submit(f"later {number}", 100) for number in range(3)]
        await asyncio.sleep(0)
        texts.let_go("first")
        assert await texts.next() == "long"
        texts.let_go()
        await asyncio.gather(running, long, *later)


async def test_who_leaves_the_queue_takes_no_thread() -> None:
    async with work(1) as texts:
        first, left, last = (texts.submit(name, 100) for name in ("first", "left", "last"))
        assert await texts.next() == "first"
        left.cancel()
        await asyncio.wait([left])
        texts.let_go()
        assert await texts.next() == "last"
        assert await asyncio.gather(first, last) == ["first", "last"]


async def test_work_whose_caller_left_keeps_its_thread_to_the_end() -> None:
    async with work(1) as texts:
        first = texts.submit("first", 100)
        await texts.next()
        first.cancel()
        await asyncio.wait([first])
        second = texts.submit("second", 100)
        await asyncio.sleep(0)
        assert texts._began.empty()
        texts.let_go()
        assert await second == "second"


async def test_a_turn_that_was_given_to_a_caller_that_left_is_given_on() -> None:
    async with work(1) as texts:
        first, left, last = (texts.submit(name, 100) for name in ("first", "left", "last"))
        assert await texts.next() == "first"
        texts.let_go("first")
        await first  # the next one has its turn now, and has not run yet
        left.cancel()
        texts.let_go()
        assert await last == "last"


async def test_an_error_of_the_work_is_raised_and_the_thread_is_free() -> None:
    with ThreadPoolExecutor(1) as threads:
        queue = EncodeQueue(threads, 1)
        with pytest.raises(ZeroDivisionError):
            await queue.run(10, lambda: 1 // 0)
        assert await queue.run(10, lambda: 1) == 1
