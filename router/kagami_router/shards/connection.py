"""The socket of one gRPC call, read and written on the event loop's own thread.

grpcio hands every message from thread to thread, three wakings each way; here the loop's own wait
for the socket is the only one, and a step leaves with the call that wrote it (notes/0010).
"""

import asyncio
import socket
from collections.abc import Callable
from urllib.parse import unquote

from kagami_router.shards.http2 import ClientCall

# A result of 256 sequences has 3 KB; prompt logprobs come in several reads.
_READ_BYTES = 1 << 16


class CallEnded(Exception):
    """The call is over; says why."""


class CallConnection:
    """One call of a method whose both sides stream, over a connection of its own.

    `take` gets each message as it comes; `ended` is told once why none comes any more, unless the
    call is closed from this side.
    """

    def __init__(
        self,
        connected: socket.socket,
        method: str,
        take: Callable[[bytes], None],
        ended: Callable[[str], None],
    ) -> None:
        self._socket = connected
        self._call = ClientCall(method, "localhost")
        self._take = take
        self._ended = ended
        self._unsent = bytearray()
        self._is_connected = True
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connected, self._read_ready)
        self._write()

    @classmethod
    async def open(
        cls, address: str, method: str, take: Callable[[bytes], None], ended: Callable[[str], None]
    ) -> "CallConnection":
        """Connect to "unix:PATH" or "HOST:PORT" and call; raises `CallEnded`."""
        try:
            connected = await _connect(address)
        except OSError as error:
            raise CallEnded(f"cannot connect to {address}: {error.strerror or error}") from error
        return cls(connected, method, take, ended)

    @property
    def is_open(self) -> bool:
        return self._call.end is None

    def send(self, message: bytes) -> None:
        """Send one message now, or as soon as the peer takes it; raises `CallEnded`."""
        if self._call.end is not None:
            raise CallEnded(self._call.end)
        self._call.send(message)
        self._write()

    def close(self) -> None:
        """End the call, if it has not ended, and the connection."""
        self._call.cancel()
        self._write()
        self._disconnect()

    def _read_ready(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._call.connection_lost(str(error.strerror or error))
        else:
            if not data:
                self._call.connection_lost("the shard closed the connection")
            for message in self._call.receive(data):
                self._take(message)
            self._write()
        if self._call.end is not None and self._is_connected:
            self._disconnect()
            self._ended(self._call.end)

    def _write(self) -> None:
        """Write what the call has to say; what the socket does not take follows when it does."""
        output = self._call.take_output()
        if not output or not self._is_connected:
            return
        if self._unsent:
            self._unsent += output
            return
        num_sent = self._try_to_send(output)
        if num_sent < len(output):
            self._unsent += memoryview(output)[num_sent:]
            self._loop.add_writer(self._socket, self._write_ready)

    def _write_ready(self) -> None:
        del self._unsent[: self._try_to_send(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _try_to_send(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # the reader sees why, and tells
            return len(data)

    def _disconnect(self) -> None:
        if self._is_connected:
            self._is_connected = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()


async def _connect(address: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    target: str | tuple[object, ...]
    if address.startswith("unix:"):
        # gRPC takes the path for a URI's: percent-encoded.
        family, target = socket.AF_UNIX, unquote(address.removeprefix("unix:").removeprefix("//"))
    else:
        host, _, port = address.rpartition(":")
        family, *_, target = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        if family != socket.AF_UNIX:
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(connecting, target)
    except BaseException:
        connecting.close()
        raise
    return connecting
