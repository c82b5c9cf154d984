"""Sends large answers piece by piece: what a client does not read stays out of our memory."""

import asyncio
from contextlib import suppress

from aiohttp import web

# A piece that no client takes for so long ends the connection.
PATIENCE_S = 30.0
PIECE_BYTES = 65_536


async def sent(
    request: web.Request, response: web.Response, *, patience_s: float = PATIENCE_S
) -> web.StreamResponse:
    """`response`, after the client has taken all of it but the last pieces.

    Whoever holds a permit meanwhile bounds the answers that wait in memory. A small response comes
    back as it is: the connection has room for it. A client that takes nothing for `patience_s`
    seconds loses its connection.
    """
    body = response.body
    if not isinstance(body, bytes) or len(body) <= PIECE_BYTES:
        return response
    pieces = web.StreamResponse(status=response.status, headers=response.headers)
    pieces.content_length = len(body)
    with suppress(ConnectionError):  # the client is gone
        await pieces.prepare(request)
        try:
            for start in range(0, len(body), PIECE_BYTES):
                async with asyncio.timeout(patience_s):
                    await pieces.write(body[start : start + PIECE_BYTES])
            await pieces.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
    return pieces
