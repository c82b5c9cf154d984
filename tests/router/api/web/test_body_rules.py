"""What a body costs before route, key and length are known, told from the raw answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.fakes.fake_server import FakeServer, serving

BODY = b'{"inputs":"a"}'


@asynccontextmanager
async def connected(
    server: FakeServer,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    async with asyncio.timeout(20):
        yield reader, writer
    writer.close()


def head(*lines: str, path: str = "/generate", version: str = "1.1") -> bytes:
    first = f"POST {path} HTTP/{version}"
    return "\r\n".join(
        (first, "host: a", "content-type: application/json", *lines, "", "")
    ).encode()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Status and head of the next answer, its body read."""
    text = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = text.partition("content-length: ")[2].split("\r\n")[0]
    await reader.readexactly(int(length or 0))
    return int(text.split()[1]), text


@pytest.mark.parametrize(
    "coding", ["gzip", "GZIP", "x-gzip", "deflate", "br", "zstd", "gzip, identity", "gzip,gzip"]
)
async def test_a_coded_body_is_refused_before_it_is_unpacked(coding: str) -> None:
    # These bytes are not coded at all: to unpack them would be another error.
    coded = head(f"content-encoding: {coding}", f"content-length: {len(BODY)}") + BODY
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(coded)
        status, text = await answer_of(reader)
        assert (status, "accept-encoding: identity" in text) == (415, True)
        writer.write(head(f"content-length: {len(BODY)}") + BODY)
        assert (await answer_of(reader))[0] == 200


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
async def test_a_body_that_is_not_coded_may_say_so(coding: str) -> None:
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(head(f"content-encoding: {coding}", f"content-length: {len(BODY)}") + BODY)
        assert (await answer_of(reader))[0] == 200


@pytest.mark.parametrize(("path", "status"), [("/generate", 401), ("/nowhere", 404)])
async def test_a_coded_body_is_not_unpacked_for_a_stranger_or_without_a_route(
    path: str, status: int
) -> None:
    lines = ("content-encoding: gzip", f"content-length: {len(BODY)}")
    async with serving(key="Secret") as server, connected(server) as (reader, writer):
        writer.write(head(*lines, path=path) + BODY)
        assert (await answer_of(reader))[0] == status


@pytest.mark.parametrize(
    ("path", "lines", "status"),
    [
        ("/generate", ("content-length: 1001",), 413),
        ("/generate", ("content-length: 99999999999",), 413),
        ("/generate", ("content-length: 9", "content-encoding: gzip"), 415),
        ("/nowhere", ("content-length: 9",), 404),
        ("/v1/nowhere", ("content-length: 9",), 404),
        ("/info", ("content-length: 9",), 405),
    ],
)
async def test_a_body_that_is_not_wanted_is_not_asked_for(
    path: str, lines: tuple[str, ...], status: int
) -> None:
    async with serving(payload_limit=1000) as server, connected(server) as (reader, writer):
        writer.write(head("expect: 100-continue", *lines, path=path))
        answered, text = await answer_of(reader)
        assert (answered, "connection: close" in text) == (status, True)


async def test_a_stranger_is_not_asked_for_a_body() -> None:
    async with serving(key="Secret") as server, connected(server) as (reader, writer):
        writer.write(head("expect: 100-continue", f"content-length: {len(BODY)}"))
        assert (await answer_of(reader))[0] == 401


@pytest.mark.parametrize("expect", ["100-continue", "100-Continue"])
async def test_a_body_that_is_wanted_is_asked_for(expect: str) -> None:
    async with serving() as server, connected(server) as (reader, writer):
        for _ in range(2):
            writer.write(head(f"expect: {expect}", f"content-length: {len(BODY)}"))
            assert (await answer_of(reader))[0] == 100
            writer.write(BODY)
            assert (await answer_of(reader))[0] == 200


@pytest.mark.parametrize(
    ("expect", "version"), [("100-continue", "1.0"), ("more", "1.1"), ("\xff", "1.1"), ("", "1.1")]
)
async def test_an_expectation_that_http_does_not_know_is_ignored(expect: str, version: str) -> None:
    lines = (f"expect: {expect}", f"content-length: {len(BODY)}")
    async with serving() as server, connected(server) as (reader, writer):
        writer.write(head(*lines, version=version) + BODY)
        assert (await answer_of(reader))[0] == 200


async def test_a_length_beyond_the_limit_is_refused_before_the_body_has_come() -> None:
    async with serving(payload_limit=1000) as server, connected(server) as (reader, writer):
        writer.write(head("content-length: 1001"))
        assert (await answer_of(reader))[0] == 413


async def test_a_body_without_a_length_is_refused_at_the_limit() -> None:
    async with serving(payload_limit=1000) as server, connected(server) as (reader, writer):
        writer.write(head("transfer-encoding: chunked") + b"3e9\r\n" + b" " * 1001 + b"\r\n")
        assert (await answer_of(reader))[0] == 413
