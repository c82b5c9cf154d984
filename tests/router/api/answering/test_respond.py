"""Events are pushed to every stream by the batching loop itself, without waking a task."""

from collections import Counter
from typing import Any

import pytest
from tests.fakes.fake_loop import FakeLoop, step_events_of
from tests.fakes.fake_server import serving

from kagami_router.api.answering import respond
from kagami_router.api.answering.respond import INLINE_TOKENS
from kagami_router.api.routes import ROUTES
from kagami_router.api.web import sse
from kagami_router.request.values import PrefillToken, Token, ValidRequest
from kagami_router.serving.generation_stream import Events

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "stream": True}
STREAMS: dict[str, dict[str, Any]] = {
    "/": {"inputs": "a", "stream": True},
    "/generate_stream": {"inputs": "a"},
    "/v1/chat/completions": CHAT | {"n": 2},
    "/v1/completions": {"prompt": ["a", "b"], "stream": True, "n": 2},
    "/v1/responses": {"input": "a", "stream": True},
    "/v1/messages": CHAT,
    "/invocations": {"inputs": "a", "stream": True},
}
NUM_TOKENS = 6


def spoken(request: ValidRequest) -> list[Any]:
    return [*step_events_of([Token(40 + index, "a", -0.5, False) for index in range(NUM_TOKENS)])]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of pushed and of pulled events."""
    counted: Counter[str] = Counter()
    push, pull = respond._Stream.push, respond._Stream.pull

    def counting_push(stream: respond._Stream, index: int, events: Events) -> bytes | None:
        counted["pushed"] += len(events)
        return push(stream, index, events)

    async def counting_pull(stream: respond._Stream, backlog: sse.Backlog) -> bytes:
        counted["pulled"] += sum(len(events) for _, events in backlog)
        return await pull(stream, backlog)

    monkeypatch.setattr(respond._Stream, "push", counting_push)
    monkeypatch.setattr(respond._Stream, "pull", counting_pull)
    return counted


def test_every_route_that_streams_is_tried() -> None:
    assert {route.path for route in ROUTES if route.operation.event is not None} <= STREAMS.keys()


@pytest.mark.parametrize("path", STREAMS)
async def test_tokens_are_pushed(path: str, ways: Counter[str]) -> None:
    loop = FakeLoop(spoken)
    loop.gate.clear()
    async with (
        serving(loop) as server,
        server.post(path, STREAMS[path]) as response,
    ):
        await response.content.readuntil(b"\n\n")
        loop.gate.set()
        await response.text()

    num_generations = len(loop.requests)
    # The first token of each may come before the head of the response is written.
    assert ways["pulled"] <= num_generations
    assert ways["pushed"] >= num_generations * (NUM_TOKENS - 1)
    assert ways["pushed"] + ways["pulled"] == num_generations * NUM_TOKENS


async def test_a_prompt_with_many_logprobs_is_written_beside_the_event_loop(
    ways: Counter[str],
) -> None:
    prefill = tuple(PrefillToken(40, "a", -0.5) for _ in range(INLINE_TOKENS + 1))
    loop = FakeLoop(lambda _: [*step_events_of([Token(40, "a", -0.5, False)] * 2, prefill=prefill)])
    body = {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}
    async with serving(loop) as server, server.post("/v1/completions", body) as response:
        text = await response.text()

    assert ways["pulled"] >= 1
    assert text.count("data: ") == 3
