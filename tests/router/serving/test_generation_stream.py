"""When events are pushed, and when they wait for the consumer."""

import asyncio
from collections.abc import Callable

import pytest

from kagami_router.request.values import StreamEvent, Token
from kagami_router.serving.generation_stream import MAX_BACKLOG, CallEvents, Events


def said(text: str) -> Events:
    return (StreamEvent(Token(1, text, -0.5, False)),)


class Consumer:
    """Reads a call's events in a task; keeps what was pushed to the sink."""

    def __init__(self) -> None:
        self.pushed: list[str] = []
        self.num_given_up = 0
        self.call = CallEvents(1, self)
        self.task = asyncio.ensure_future(anext(self.call))

    def __call__(self, index: int, events: Events) -> bool:
        self.pushed += [event.token.text for event in events]
        return True

    def give_up(self) -> None:
        self.num_given_up += 1


async def test_a_waiting_consumer_is_pushed_to() -> None:
    consumer = Consumer()
    await asyncio.sleep(0)
    consumer.call.put(0, said("one"))
    assert consumer.pushed == ["one"]
    assert not consumer.task.done()
    consumer.task.cancel()


@pytest.mark.parametrize(
    "wake",
    [
        lambda consumer: consumer.task.cancel(),
        lambda consumer: consumer.call.fail(ValueError("lost")),
    ],
    ids=["a timeout or a client that left", "a failure"],
)
async def test_nothing_is_pushed_between_the_wake_and_the_end(
    wake: Callable[[Consumer], object],
) -> None:
    consumer = Consumer()
    await asyncio.sleep(0)
    wake(consumer)
    consumer.call.put(0, said("late"))
    await asyncio.wait([consumer.task])
    assert consumer.pushed == []


async def test_a_client_that_is_too_far_behind_loses_its_call_once() -> None:
    consumer = Consumer()
    consumer.call.put(0, said("read"))
    assert len(await consumer.task) == 1  # and nothing is read any more
    for _ in range(MAX_BACKLOG - 1):
        consumer.call.put(0, said("unread"))
    assert consumer.num_given_up == 0
    for _ in range(3):
        consumer.call.put(0, said("unread"))
    assert consumer.num_given_up == 1
