import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from kagami_router.api.web.sending import PIECE_BYTES, UNREAD, Unread, sent

BODY = bytes(range(256)) * PIECE_BYTES  # 16 MiB: more than sockets hold


class Handler:
    """Answers with `BODY`; tells when the client had all of it."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.is_sent = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        whole = web.Response(body=BODY, headers={"x-own": "1"}, content_type="application/json")
        try:
            return await sent(request, whole, patience_s=self._patience_s)
        finally:
            self.is_sent.set()


@asynccontextmanager
async def served(handler: Handler, unread: Unread | None = None) -> AsyncIterator[TestServer]:
    app = web.Application()
    app[UNREAD] = unread or Unread()
    app.router.add_get("/", handler.answer)
    async with TestServer(app) as server:
        yield server


@asynccontextmanager
async def silent_client(server: TestServer) -> AsyncIterator[socket.socket]:
    """Asks, and reads nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (server.host, server.port))
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        yield client


async def test_a_large_answer_comes_whole_with_its_headers() -> None:
    async with served(Handler(10)) as server, ClientSession() as http:
        async with http.get(server.make_url("/")) as response:
            assert await response.read() == BODY
            assert response.headers["content-length"] == str(len(BODY))
            assert response.headers["content-type"] == "application/json"
            assert response.headers["x-own"] == "1"


@pytest.mark.parametrize("leaves", [False, True])
async def test_it_is_sent_when_the_client_has_taken_it_or_is_gone(leaves: bool) -> None:
    handler = Handler(60)
    loop = asyncio.get_running_loop()
    async with served(handler) as server, silent_client(server) as client:
        head = await loop.sock_recv(client, 4096)
        assert head.startswith(b"HTTP/1.1 200")
        assert not handler.is_sent.is_set()
        if leaves:
            client.close()
        else:
            while not handler.is_sent.is_set():
                assert await loop.sock_recv(client, 65_536)
        async with asyncio.timeout(10):
            await handler.is_sent.wait()


async def test_a_client_that_takes_nothing_loses_its_connection() -> None:
    handler = Handler(0.05)
    loop = asyncio.get_running_loop()
    async with served(handler) as server, silent_client(server) as client:
        async with asyncio.timeout(10):
            await handler.is_sent.wait()
            received = b""
            with suppress(ConnectionError):
                while chunk := await loop.sock_recv(client, 65_536):
                    received += chunk
        assert len(received) < len(BODY)


async def test_the_answer_that_waits_for_longest_goes_where_a_new_one_has_no_room() -> None:
    handler = Handler(60)
    async with served(handler, Unread(len(BODY))) as server, silent_client(server) as silent:
        loop = asyncio.get_running_loop()
        assert (await loop.sock_recv(silent, 4096)).startswith(b"HTTP/1.1 200")
        async with ClientSession() as http, http.get(server.make_url("/")) as response:
            assert await response.read() == BODY
        received = 4096
        async with asyncio.timeout(10):
            with suppress(ConnectionError):
                while chunk := await loop.sock_recv(silent, 65_536):
                    received += len(chunk)
        assert received < len(BODY)


def test_whoever_takes_pieces_keeps_its_answer() -> None:
    unread = Unread(100)
    dropped: list[str] = []
    with (
        unread.held(40, lambda: dropped.append("first")) as took,
        unread.held(40, lambda: dropped.append("second")),
    ):
        took()
        with unread.held(50, lambda: dropped.append("third")):
            assert dropped == ["second"]
    with unread.held(100, lambda: dropped.append("fourth")):
        assert dropped == ["second"]


def test_an_answer_larger_than_the_room_is_sent_alone() -> None:
    unread = Unread(100)
    dropped: list[int] = []
    with unread.held(50, lambda: dropped.append(50)), unread.held(500, lambda: dropped.append(500)):
        assert dropped == [50]
