"""Chunks between the first and the last of an OpenAI stream: they are joined from bytes."""

from typing import Any

import msgspec
import pytest
from tests.fakes.fake_loop import FakeLoop, step_events_of
from tests.fakes.fake_server import events_of, serving

from kagami_router.api.schemas.chunks import ChatChunk, CompletionChunk
from kagami_router.request.values import Token, ValidRequest

TEXTS = ("a", ' "\\\n\x01€\U0001f600', "", "z")
ROUTES: dict[str, tuple[dict[str, Any], type]] = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "a"}]}, ChatChunk),
    "/v1/completions": ({"prompt": "a"}, CompletionChunk),
}


def spoken(request: ValidRequest) -> list[Any]:
    return [
        *step_events_of([Token(40 + index, text, -0.5, False) for index, text in enumerate(TEXTS)])
    ]


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
