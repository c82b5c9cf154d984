"""How the bytes of a connection reach aiohttp's parser: in slices, and none after the last answer.

A socket brings up to 8 MB in one pass of the event loop. To parse it can take seconds (a body in
chunks of one byte: 60 ms for 256 KB), in which nobody else is answered. A slice takes 4 ms at most;
others have their turn before the next one.
"""

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

_SLICE_BYTES = 1 << 14
# Chunks are dear to parse. Honest ones are what one write of a client brings.
_FREE_CHUNKS = 4096
_MIN_CHUNK_BYTES = 32


class SlicedReader(RequestHandler):
    """The reading side of a connection."""

    __slots__ = ("_body", "_has_part_of_head", "_is_over", "_num_chunks", "_parsing", "_unparsed")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unparsed = bytearray()
        self._parsing: asyncio.Handle | None = None
        self._is_over = False
        """Nothing that comes is parsed any more"""
        self._body: Any = None
        """The body of the last message"""
        self._num_chunks = 0
        self._has_part_of_head = True
        """Whether a message has begun; the first one is due from the start"""

    def data_received(self, data: bytes) -> None:
        """Parse `data`, or its first slice and the others later; empty: go on after a pause."""
        if self._is_over:
            return
        if not self._unparsed and len(data) <= _SLICE_BYTES:
            self._parse(data)
            return
        self._unparsed += data
        if self._parsing is None:
            self._pause_reading_for_buffer()
            self._parse_slice()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._unparsed.clear()
        super().connection_lost(exc)
        self._body = None  # which holds this connection

    def _parse_slice(self) -> None:
        self._parsing = None
        if self._is_over or self._parser is None:
            return
        data = bytes(self._unparsed[:_SLICE_BYTES])
        del self._unparsed[:_SLICE_BYTES]
        if self._unparsed:
            self._parsing = self._loop.call_soon(self._parse_slice)
        self._parse(data)
        if not self._unparsed:
            self._resume_reading_if_drained()

    def _resume_reading_if_drained(self) -> None:
        if not self._unparsed:
            super()._resume_reading_if_drained()

    def _parse(self, data: bytes) -> None:
        num_messages, num_splits = self._request_count, _num_splits(self._body)
        is_between = self._waiter is not None
        super().data_received(data)
        if self._request_count != num_messages and self._messages:
            self._message_came()
            num_splits = 0
        elif is_between and data:
            self._has_part_of_head = True
        if (splits := _num_splits(self._body)) > num_splits:
            self._chunks_came(splits - num_splits)

    def _message_came(self) -> None:
        """A message where the rest of a body should be says that the body is broken.

        aiohttp queues that message behind the handler, which waits for the body.
        """
        message, body = self._messages[-1]
        if (error := getattr(message, "exc", None)) is not None:
            # Its traceback would hold what was parsed, and is held by it.
            error.__traceback__ = error.__context__ = None
            self._break_body("The body is not framed as its headers say")
        self._body, self._num_chunks, self._has_part_of_head = body, 0, False

    def _chunks_came(self, number: int) -> None:
        self._num_chunks += number
        if (
            self._num_chunks > _FREE_CHUNKS
            and self._body.total_bytes < self._num_chunks * _MIN_CHUNK_BYTES
        ):
            self._break_body(f"Its chunks are too small: {_MIN_CHUNK_BYTES} bytes are expected")

    def _break_body(self, reason: str) -> None:
        """Whoever waits for the rest of the body hears why it does not come."""
        self._read_no_more()
        if self._body is not None and not self._body.is_eof():
            self._body.set_exception(web.RequestPayloadError(reason))

    def _read_no_more(self) -> None:
        """Throw away what has not been parsed and what still comes."""
        self._is_over = True
        self._unparsed.clear()
        self._resume_reading_for_buffer()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer. A body that has not come whole is thrown away, and the connection ends.

        aiohttp would parse it for another 10 s, only to keep the connection.
        """
        if not request.content.is_eof():
            resp.force_close()
            self._read_no_more()
        return await super().finish_response(request, resp, start_time)


def _num_splits(body: Any) -> int:
    """How many ends of chunks wait in a body; 0 without chunks."""
    return len(getattr(body, "_http_chunk_splits", None) or ())
