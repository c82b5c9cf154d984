"""Sends large answers piece by piece: what a client does not read stays out of our memory."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from aiohttp import web

# A piece that no client takes for so long ends the connection.
PATIENCE_S = 30.0
PIECE_BYTES = 65_536
# Of all answers together that wait for their clients: some 20 of the longest ones, and a client
# that reads needs its own for milliseconds.
MAX_UNREAD_BYTES = 64 << 20


class Unread:
    """The large answers that wait in memory for their clients, and the limit of their bytes.

    Where a new one has no room, the clients that have taken nothing for longest lose theirs.
    """

    def __init__(self, max_bytes: int = MAX_UNREAD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        # Who has taken nothing for longest comes first.
        self._waiting: dict[object, tuple[int, Callable[[], None]]] = {}

    @contextmanager
    def held(self, num_bytes: int, drop: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Count an answer until the end; call what comes back whenever its client took a piece.

        `drop` ends the connection, if the answer has to go.
        """
        while self._waiting and self._num_bytes + num_bytes > self._max_bytes:
            self._forget(next(iter(self._waiting)))()
        key = object()
        self._waiting[key] = (num_bytes, drop)
        self._num_bytes += num_bytes

        def took() -> None:
            if key in self._waiting:
                self._waiting[key] = self._waiting.pop(key)

        try:
            yield took
        finally:
            if key in self._waiting:
                self._forget(key)

    def _forget(self, key: object) -> Callable[[], None]:
        num_bytes, drop = self._waiting.pop(key)
        self._num_bytes -= num_bytes
        return drop


UNREAD = web.AppKey("unread", Unread)


async def sent(
    request: web.Request, response: web.Response, *, patience_s: float = PATIENCE_S
) -> web.StreamResponse:
    """`response`, after the client has taken all of it but the last pieces.

    A small response comes back as it is: the connection has room for it. The others are counted in
    `Unread`. A client that takes nothing for `patience_s` seconds loses its connection.
    """
    body = response.body
    if not isinstance(body, bytes) or len(body) <= PIECE_BYTES:
        return response
    pieces = web.StreamResponse(status=response.status, headers=response.headers)
    pieces.content_length = len(body)

    def drop() -> None:
        if request.transport is not None:
            request.transport.abort()

    with suppress(ConnectionError), request.app[UNREAD].held(len(body), drop) as took:
        await pieces.prepare(request)
        try:
            for start in range(0, len(body), PIECE_BYTES):
                async with asyncio.timeout(patience_s):
                    await pieces.write(body[start : start + PIECE_BYTES])
                took()
            await pieces.write_eof()
        except TimeoutError:
            drop()
    return pieces
