"""The socket of a call, with grpcio's server at its other end."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from kagami_proto import local_channel
from kagami_router.shards.connection import CallConnection, CallEnded
from kagami_router.shards.http2 import ClientCall

METHOD = "/test.Service/Echo"


class Service(grpc.GenericRpcHandler):
    """Sends back what it gets; "abort" ends the call."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                if request == b"abort":
                    await context.abort(grpc.StatusCode.ABORTED, "another stream: 1 %")
                yield request

        return grpc.stream_stream_rpc_method_handler(echo) if details.method == METHOD else None


class Echo:
    """A server, one call to it, and what came of that."""

    def __init__(self, address: str, **options: int) -> None:
        self.address = address
        self.options = {**dict(local_channel.OPTIONS), **options}
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> "Echo":
        self.server = grpc.aio.server(options=list(self.options.items()))
        self.server.add_generic_rpc_handlers((Service(),))
        port = self.server.add_insecure_port(self.address)
        await self.server.start()
        if not self.address.startswith("unix:"):
            self.address = self.address.replace(":0", f":{port}")
        self.call = await self.open(METHOD)
        return self

    async def open(self, method: str) -> CallConnection:
        return await CallConnection.open(
            self.address, method, self.received.put_nowait, self.ended.set_result
        )

    async def __aexit__(self, *_: object) -> None:
        self.call.close()
        await self.server.stop(grace=None)


@pytest.mark.parametrize("place", ["unix:{}/s", "unix://{}/s", "unix:{}/a%41", "127.0.0.1:0"])
async def test_messages_go_and_come(tmp_path: Path, place: str) -> None:
    async with Echo(place.format(tmp_path)) as echo:
        for message in (b"one", b"", b"three"):
            echo.call.send(message)
            assert await echo.received.get() == message


async def test_large_messages_go_and_come(tmp_path: Path) -> None:
    messages = [bytes((number,)) * 3_000_000 for number in range(4)]
    async with Echo(f"unix:{tmp_path}/s") as echo:
        for message in messages:
            echo.call.send(message)
        assert [await echo.received.get() for _ in messages] == messages


async def test_a_status_is_told(tmp_path: Path) -> None:
    async with Echo(f"unix:{tmp_path}/s") as echo:
        echo.call.send(b"abort")
        assert await echo.ended == "another stream: 1 %"
        assert not echo.call.is_open
        with pytest.raises(CallEnded, match="another stream"):
            echo.call.send(b"more")


async def test_a_method_that_is_unknown_ends_the_call(tmp_path: Path) -> None:
    async with Echo(f"unix:{tmp_path}/s") as echo:
        await echo.open("/test.Service/None")
        assert "Method not found" in await echo.ended


async def test_a_server_that_goes_ends_the_call(tmp_path: Path) -> None:
    async with Echo(f"unix:{tmp_path}/s") as echo:
        await echo.server.stop(grace=None)
        assert await echo.ended


async def test_a_closed_call_is_cancelled_at_the_server(tmp_path: Path) -> None:
    async with Echo(f"unix:{tmp_path}/s") as echo:
        echo.call.close()
        await echo.server.stop(grace=10)  # returns at once: nothing runs any more
        assert not echo.ended.done()


async def test_nobody_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CallEnded, match="cannot connect to unix:"):
        await CallConnection.open(f"unix:{tmp_path}/none", METHOD, print, print)


async def test_only_the_clock_that_we_set_ends_a_peer_that_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinged = asyncio.Event()

    def stopped(call: ClientCall, flags: int, stream: int, payload: bytes) -> None:
        pinged.set()  # a process that is stopped sees the ping much later

    monkeypatch.setattr(ClientCall, "_take_ping", stopped)
    clock = "grpc.http2.ping_timeout_ms"
    assert dict(local_channel.OPTIONS)[clock] > 24 * 3600 * 1000
    async with Echo(f"unix:{tmp_path}/s", **{clock: 100}) as echo, asyncio.timeout(60):
        while not pinged.is_set():
            echo.call.send(b"a")
            await echo.received.get()
        assert await echo.ended == "ping timeout"
