"""Bodies that do not come whole share a room; over a real server."""

import asyncio

import pytest
from tests.fakes.fake_server import FakeServer, serving

from kagami_router.api.web import body_room

HEAD = b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
LIMIT, SIZE = 100_000, 90_000
PATIENCE_S = 20


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for three bodies and a part of another one."""
    monkeypatch.setattr(body_room, "_MIN_ROOM_BYTES", 3 * LIMIT)


class Coming:
    """A body of which the last byte has not come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    async def on(cls, server: FakeServer, size: int = SIZE) -> "Coming":
        self = cls(*await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2])))
        self._writer.write(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % size)
        await self.reader.readuntil(b"\r\n\r\n")
        self._writer.write(b'{"inputs":"a"}' + b" " * (size - 15))
        await self._writer.drain()
        return self

    def end(self) -> None:
        self._writer.write(b" ")

    async def status(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            answer = await self.reader.readuntil(b"\r\n\r\n")
        self._writer.close()
        return int(answer.split()[1])


async def test_the_oldest_body_makes_room_for_a_new_one() -> None:
    async with serving(payload_limit=LIMIT) as server:
        coming = [await Coming.on(server) for _ in range(4)]
        assert await coming[0].status() == 429
        for one in coming[1:]:
            one.end()
            assert await one.status() == 200


async def test_what_has_ended_takes_no_room() -> None:
    async with serving(payload_limit=LIMIT) as server:
        first = await Coming.on(server)
        for _ in range(8):
            one = await Coming.on(server)
            one.end()
            assert await one.status() == 200
        first.end()
        assert await first.status() == 200
