"""How the bytes of a connection reach aiohttp's parser: in slices, and none after the last answer.

A socket brings up to 8 MB in one pass of the event loop. To parse it can take seconds (a body in
chunks of one byte: 60 ms for 256 KB), in which nobody else is answered. A slice takes 4 ms at most;
others have their turn before the next one.
"""

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

_SLICE_BYTES = 1 << 14
# Of a head, and of the framing of a body: the parser keeps the fields of both until their end.
_MAX_FRAMING = 1 << 15
# Requests that wait behind another one on their connection, with bodies that have come already.
_MAX_QUEUED = 4
# Chunks are dear to parse. Honest ones are what one write of a client brings: 24 bytes at least.
_CONTENT_TO_FRAMING = 4


class SlicedReader(RequestHandler):
    """The reading side of a connection."""

    __slots__ = (
        "_body",
        "_has_part_of_head",
        "_is_chunked",
        "_is_over",
        "_num_framing",
        "_parsing",
        "_unparsed",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_msg_queue_size = _MAX_QUEUED
        self._msg_queue_resume_size = _MAX_QUEUED // 2
        self._unparsed = bytearray()
        self._parsing: asyncio.Handle | None = None
        self._is_over = False
        """Nothing that comes is parsed any more"""
        self._body: Any = None
        """The body of the last message"""
        self._is_chunked = False
        self._num_framing = 0
        """Bytes of the head that is not complete, or of the framing of the body's chunks"""
        self._has_part_of_head = True
        """Whether a message has begun; the first one is due from the start"""

    def data_received(self, data: bytes) -> None:
        """Parse `data`, now or in slices; empty: go on after a pause."""
        if self._is_over:
            return
        if not self._unparsed and len(data) <= _SLICE_BYTES:
            self._parse(data)
            return
        self._unparsed += data
        if not self._buffer_paused:
            self._pause_reading_for_buffer()
        self._go_on()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._unparsed.clear()
        super().connection_lost(exc)
        self._body = None  # which holds this connection

    def _go_on(self) -> None:
        """Parse the next slice soon, unless a handler has to take something first."""
        is_full = self._reading_paused or len(self._messages) >= self._max_msg_queue_size
        if self._unparsed and self._parsing is None and not is_full:
            self._parsing = self._loop.call_soon(self._parse_slice)

    def _parse_slice(self) -> None:
        self._parsing = None
        if self._is_over or self._parser is None:
            return
        data = bytes(self._unparsed[:_SLICE_BYTES])
        del self._unparsed[:_SLICE_BYTES]
        self._parse(data)
        self._resume_reading_if_drained()

    def _resume_reading_if_drained(self) -> None:
        if self._unparsed:
            self._go_on()
        else:
            super()._resume_reading_if_drained()

    def _parse(self, data: bytes) -> None:
        if self._close or self._force_close:  # aiohttp parses nothing, either: it is no framing
            return
        num_messages = self._request_count
        body = self._body
        is_in_head = body is None or body.is_eof()
        if is_in_head and self._is_chunked:  # the body has ended: what follows is another head
            self._is_chunked, self._num_framing = False, 0
        num_content = 0 if body is None else body.total_bytes
        super().data_received(data)
        if self._request_count != num_messages and self._messages:
            self._message_came()
        elif is_in_head:
            self._head_came(len(data))
        elif self._is_chunked:
            self._chunks_came(len(data) - (body.total_bytes - num_content))

    def _head_came(self, num_bytes: int) -> None:
        """A part of a head that is not complete."""
        self._has_part_of_head |= num_bytes > 0
        self._num_framing += num_bytes
        if self._num_framing > _MAX_FRAMING:
            error = BadHttpMessage(f"Got more than {_MAX_FRAMING} bytes when reading: a head")
            self._read_no_more()
            self._messages.append((_ErrInfo(error.code, error, error.message), EMPTY_PAYLOAD))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    def _message_came(self) -> None:
        """A message where the rest of a body should be says that the body is broken.

        aiohttp queues that message behind the handler, which waits for the body.
        """
        message, body = self._messages[-1]
        self._has_part_of_head, self._num_framing = False, 0
        if (error := getattr(message, "exc", None)) is not None:
            # Its traceback would hold what was parsed, and is held by it.
            error.__traceback__ = error.__context__ = None
            self._break_body("The body is not framed as its headers say")
        self._body = body
        self._is_chunked = getattr(message, "chunked", False)

    def _chunks_came(self, num_bytes: int) -> None:
        """The framing of a body's chunks: their sizes and extensions, and its trailers."""
        self._num_framing += num_bytes
        if self._num_framing > _MAX_FRAMING + self._body.total_bytes // _CONTENT_TO_FRAMING:
            self._break_body("Its chunks are too small")

    def _break_body(self, reason: str) -> None:
        """Whoever waits for the rest of the body hears why it does not come."""
        self._read_no_more()
        if self._body is not None and not self._body.is_eof() and self._body.exception() is None:
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
