"""One gRPC call over HTTP/2, as its client sees it: bytes in, messages and bytes out.

No input or output of its own: `connection.py` owns the socket. A connection has this one stream,
number 1. Frames: RFC 9113; what they carry: gRPC's "PROTOCOL-HTTP2.md".

```
  send(message) ──► pending ──(windows)──► output    taken by the caller after each call
  receive(data) ──► frames ──► body ──► messages      returned
                      └─ SETTINGS, PING, WINDOW_UPDATE ──► output;  trailers, RST_STREAM, … ──► end
```
"""

import struct
from collections.abc import Callable
from enum import IntEnum
from urllib.parse import unquote

from kagami_router.shards import hpack

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_STREAM = 1
_FRAME_HEAD = 9
_MESSAGE_HEAD = 5
# A DATA frame that holds just one message: both heads.
_WHOLE = struct.Struct(">IBIBI")
# Nothing we receive has a natural bound, and the shard sends only what was asked for: the windows
# are as large as they can be, and opened again long before they are used up.
_MAX_WINDOW = (1 << 31) - 1
_WINDOW_STEP = 1 << 24
_FIRST_WINDOW = (1 << 16) - 1
_MAX_FRAME = 1 << 20
_FIRST_MAX_FRAME = 1 << 14
_CANCEL = 8

_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8
_PRIORITY = 0x20


class Kind(IntEnum):
    """Frame types (RFC 9113, section 6); any other is ignored."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Setting(IntEnum):
    """Section 6.5.2."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5


def frame(kind: Kind, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame (section 4.1)."""
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def _settings(values: dict[Setting, int]) -> bytes:
    return b"".join(struct.pack(">HI", name, value) for name, value in values.items())


class ClientCall:
    """A call in which both sides stream.

    `end` says why nothing follows any more; None while the call stands.
    """

    def __init__(self, method: str, authority: str) -> None:
        self.end: str | None = None
        self._input = bytearray()
        self._body = bytearray()
        self._headers = bytearray()
        self._ends_with_headers = False
        self._pending = bytearray()
        self._stream_window = self._connection_window = _FIRST_WINDOW
        self._peer_first_window = _FIRST_WINDOW
        self._peer_max_frame = _FIRST_MAX_FRAME
        self._num_consumed = 0
        self._goaway_reason = ""
        ours = {
            Setting.HEADER_TABLE_SIZE: 0,
            Setting.ENABLE_PUSH: 0,
            Setting.INITIAL_WINDOW_SIZE: _MAX_WINDOW,
            Setting.MAX_FRAME_SIZE: _MAX_FRAME,
        }
        headers = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", method.encode()),
            (b":authority", authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        )
        self._output = _PREFACE
        self._output += frame(Kind.SETTINGS, 0, 0, _settings(ours))
        self._open_window(0, _MAX_WINDOW - _FIRST_WINDOW)
        self._output += frame(Kind.HEADERS, _END_HEADERS, _STREAM, hpack.written(headers))
        self._takers: dict[int, Callable[[int, int, bytes], None]] = {
            Kind.DATA: self._take_data,
            Kind.HEADERS: self._take_headers,
            Kind.CONTINUATION: self._take_continuation,
            Kind.RST_STREAM: self._take_reset,
            Kind.SETTINGS: self._take_settings,
            Kind.PING: self._take_ping,
            Kind.GOAWAY: self._take_goaway,
            Kind.WINDOW_UPDATE: self._take_window,
        }

    def take_output(self) -> bytes:
        """What is to be written to the connection now."""
        output, self._output = self._output, b""
        return output

    def send(self, message: bytes) -> None:
        """One more message; what the peer's windows do not allow yet waits for them."""
        size = len(message) + _MESSAGE_HEAD
        if self._pending or size > self._room:
            self._pending += b"\0" + len(message).to_bytes(4) + message
            self._release()
        else:  # nearly always
            self._stream_window -= size
            self._connection_window -= size
            self._output += _WHOLE.pack(size << 8, 0, _STREAM, 0, len(message)) + message

    def cancel(self) -> None:
        """Tell the peer that nobody listens any more."""
        if self.end is None:
            self._output += frame(Kind.RST_STREAM, 0, _STREAM, struct.pack(">I", _CANCEL))
            self._fail("the call was cancelled")

    def receive(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes; may set `end`."""
        if (message := self._whole_message(data)) is not None:
            return [message]
        unread = self._input
        unread += data
        start = 0
        while self.end is None and len(unread) - start >= _FRAME_HEAD:
            size = int.from_bytes(unread[start : start + 3])
            if size > _MAX_FRAME:
                self._fail(f"a frame of {size} bytes came, {_MAX_FRAME} are allowed")
                break
            end = start + _FRAME_HEAD + size
            if end > len(unread):
                break
            if take := self._takers.get(unread[start + 3]):
                stream = int.from_bytes(unread[start + 5 : start + 9]) & _MAX_WINDOW
                take(unread[start + 4], stream, bytes(unread[start + _FRAME_HEAD : end]))
            start = end
        del unread[:start]
        return self._messages() if self._body else []

    def _whole_message(self, data: bytes) -> bytes | None:
        """What `data` brings where it is one frame of one message: the result of a step, mostly."""
        start = _FRAME_HEAD + _MESSAGE_HEAD
        size = len(data) - _FRAME_HEAD
        if (
            len(data) < start
            or self._input
            or self._body
            or self.end is not None
            or _WHOLE.unpack_from(data) != (size << 8, 0, _STREAM, 0, size - _MESSAGE_HEAD)
        ):
            return None
        self._consumed(size)
        return data[start:]

    def connection_lost(self, reason: str) -> None:
        """Nothing comes any more; `reason` counts where the peer has not told one."""
        self._fail(self._goaway_reason or reason)

    def _fail(self, reason: str) -> None:
        if self.end is None:
            self.end = reason

    def _messages(self) -> list[bytes]:
        body, messages, start = self._body, [], 0
        while len(body) - start >= _MESSAGE_HEAD:
            end = start + _MESSAGE_HEAD + int.from_bytes(body[start + 1 : start + 5])
            if body[start]:
                self._fail("a compressed message came, and none was asked for")
                break
            if end > len(body):
                break
            messages.append(bytes(body[start + _MESSAGE_HEAD : end]))
            start = end
        del body[:start]
        return messages

    @property
    def _room(self) -> int:
        """Bytes that may leave in one frame now."""
        return min(self._stream_window, self._connection_window, self._peer_max_frame)

    def _release(self) -> None:
        """Write as much of what waits as windows and frames allow (sections 5.2, 6.9)."""
        pending, frames = self._pending, [self._output]
        while pending and (room := self._room) > 0:
            part = bytes(pending[:room])
            del pending[:room]
            self._stream_window -= len(part)
            self._connection_window -= len(part)
            frames.append(frame(Kind.DATA, 0, _STREAM, part))
        self._output = b"".join(frames)

    def _open_window(self, stream: int, size: int) -> None:
        self._output += frame(Kind.WINDOW_UPDATE, 0, stream, struct.pack(">I", size))

    def _consumed(self, size: int) -> None:
        """Let the peer send as much again, now and then."""
        self._num_consumed += size
        if self._num_consumed >= _WINDOW_STEP:
            self._open_window(0, self._num_consumed)
            self._open_window(_STREAM, self._num_consumed)
            self._num_consumed = 0

    def _take_data(self, flags: int, stream: int, payload: bytes) -> None:
        self._consumed(len(payload))
        self._body += _unpadded(payload) if flags & _PADDED else payload
        if flags & _END_STREAM:
            self._fail("the stream ended without a status")

    def _take_headers(self, flags: int, stream: int, payload: bytes) -> None:
        block = _unpadded(payload) if flags & _PADDED else payload
        self._headers[:] = block[5:] if flags & _PRIORITY else block
        self._ends_with_headers = bool(flags & _END_STREAM)
        if flags & _END_HEADERS:
            self._headers_complete()

    def _take_continuation(self, flags: int, stream: int, payload: bytes) -> None:
        self._headers += payload
        if flags & _END_HEADERS:
            self._headers_complete()

    def _headers_complete(self) -> None:
        try:
            headers = hpack.read(bytes(self._headers))
        except ValueError as error:
            return self._fail(str(error))
        status = headers.get(":status", "200")
        if status != "200":
            return self._fail(f"HTTP status {status}")
        if self._ends_with_headers:
            message = unquote(headers.get("grpc-message", ""))
            code = headers.get("grpc-status", "unknown")
            self._fail(message or f"the stream ended with gRPC status {code}")
        return None

    def _take_reset(self, flags: int, stream: int, payload: bytes) -> None:
        self._fail(f"the stream was reset with HTTP/2 error {int.from_bytes(payload)}")

    def _take_settings(self, flags: int, stream: int, payload: bytes) -> None:
        if flags & _ACK:
            return
        for name, value in struct.iter_unpack(">HI", payload[: len(payload) // 6 * 6]):
            if name == Setting.INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._peer_first_window
                self._peer_first_window = value
            elif name == Setting.MAX_FRAME_SIZE:
                self._peer_max_frame = value
        self._output += frame(Kind.SETTINGS, _ACK, 0, b"")
        self._release()

    def _take_ping(self, flags: int, stream: int, payload: bytes) -> None:
        if not flags & _ACK:
            self._output += frame(Kind.PING, _ACK, 0, payload)

    def _take_goaway(self, flags: int, stream: int, payload: bytes) -> None:
        """Our stream goes on, unless the peer has not even seen it (section 6.8)."""
        words = payload[8:].decode("utf-8", "replace")
        self._goaway_reason = words or f"HTTP/2 error {int.from_bytes(payload[4:8])}"
        if int.from_bytes(payload[:4]) & _MAX_WINDOW < _STREAM:
            self._fail(self._goaway_reason)

    def _take_window(self, flags: int, stream: int, payload: bytes) -> None:
        size = int.from_bytes(payload) & _MAX_WINDOW
        if stream:
            self._stream_window += size
        else:
            self._connection_window += size
        self._release()


def _unpadded(payload: bytes) -> bytes:
    return payload[1 : len(payload) - payload[0]] if payload else payload
