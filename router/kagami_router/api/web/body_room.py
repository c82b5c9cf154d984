"""The memory of bodies that have not come whole: all connections share it.

A client may send nearly all of a body and then wait, on hundreds of connections. When the room is
full the oldest such body goes; an honest one comes within moments. A body that is there when its
handler asks for it, as most are, takes no room.
"""

from aiohttp import StreamReader, web

from kagami_router.api.web.body_rules import too_large

_MIN_ROOM_BYTES = 64_000_000
_MIN_BODIES = 2


class CrowdedOut(web.RequestPayloadError):
    """The body had to make room for another one."""


class BodyRoom:
    """Counts the bytes of the bodies that are coming."""

    def __init__(self, payload_limit: int) -> None:
        self._num_free = max(_MIN_ROOM_BYTES, _MIN_BODIES * payload_limit)
        self._held: dict[StreamReader, int] = {}  # the oldest first

    async def read(self, request: web.Request) -> bytes:
        """The body of `request`; raises `BodyTooLarge`, or `CrowdedOut` and what ends a body.

        A route that hands its call on to another one reads it twice.
        """
        if _WHOLE not in request:
            request[_WHOLE] = await self._read_once(request)
        return request[_WHOLE]

    async def _read_once(self, request: web.Request) -> bytes:
        content = request.content
        if content.is_eof() and content.exception() is None:
            body = content.read_nowait()
            if len(body) > request.client_max_size:
                raise too_large(request)
            return body
        try:
            return bytes(await self._read_on(request, content))
        finally:
            self._num_free += self._held.pop(content, 0)

    async def _read_on(self, request: web.Request, content: StreamReader) -> bytearray:
        body = bytearray()
        while part := await content.readany():
            body += part
            if len(body) > request.client_max_size:
                raise too_large(request)
            self._hold(content, len(part))
        return body

    def _hold(self, content: StreamReader, num_bytes: int) -> None:
        self._held[content] = self._held.get(content, 0) + num_bytes
        self._num_free -= num_bytes
        while self._num_free < 0:
            oldest = next(iter(self._held))
            self._num_free += self._held.pop(oldest)
            oldest.set_exception(CrowdedOut())


_WHOLE = web.RequestKey("whole_body", bytes)
ROOM = web.AppKey("body_room", BodyRoom)
