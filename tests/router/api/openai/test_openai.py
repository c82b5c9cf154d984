"""Chunks between the first and the last of an OpenAI stream, which are written in a shorter way."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import pytest
from tests.fakes.fake_loop import FakeLoop, turns_of
from tests.fakes.fake_server import events_of, serving

from kagami_router.api.schemas.chunks import ChatChunk, CompletionChunk
from kagami_router.request.values import Token, ValidRequest
from kagami_router.serving.infer import Events

TEXTS = ("a", ' "\\\n\x01€\U0001f600', "", "z")
ROUTES: dict[str, tuple[dict[str, Any], type]] = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "a"}]}, ChatChunk),
    "/v1/completions": ({"prompt": "a"}, CompletionChunk),
}


def spoken(request: ValidRequest) -> list[Any]:
    return [*turns_of([Token(40 + index, text, -0.5, False) for index, text in enumerate(TEXTS)])]


@pytest.mark.parametrize("path", ROUTES)
async def test_every_chunk_is_written_as_its_schema_is_encoded(path: str) -> None:
    body, schema = ROUTES[path]
    async with (
        serving(FakeLoop(spoken)) as server,
        server.post(path, body | {"stream": True, "n": 2}) as response,
    ):
        lines = [line.removeprefix("data: ").encode() for line in await events_of(response)]
    chunks = lines[: lines.index(b"[DONE]")]
    assert len(chunks) == 2 * len(TEXTS)
    assert [msgspec.json.encode(msgspec.json.decode(one, type=schema)) for one in chunks] == chunks


class Watched:
    """Turns that note whether somebody wants them handed over."""

    def __init__(self, turns: AsyncIterator[Events]) -> None:
        self._turns = turns
        self.is_diverted = False

    def __aiter__(self) -> "Watched":
        return self

    async def __anext__(self) -> Events:
        return await anext(self._turns)

    def divert(self, sink: Callable[[Events], bool]) -> None:
        self.is_diverted = True


class WatchedLoop(FakeLoop):
    """Keeps the turns of its last request."""

    turns: Watched

    def submit(self, request: ValidRequest) -> AbstractAsyncContextManager[Watched]:  # type: ignore[override]  # what Infer asks of a loop
        return self._watched(super().submit(request))

    @asynccontextmanager
    async def _watched(
        self, stream: AbstractAsyncContextManager[AsyncIterator[Events]]
    ) -> AsyncIterator[Watched]:
        async with stream as turns:
            self.turns = Watched(turns)
            yield self.turns


@pytest.mark.parametrize("path", ROUTES)
async def test_tokens_are_written_within_the_loops_pass(path: str) -> None:
    body, _ = ROUTES[path]
    async with (
        serving(loop := WatchedLoop(spoken)) as server,
        server.post(path, body | {"stream": True}) as response,
    ):
        await response.text()
    assert loop.turns.is_diverted
