"""Who sent a request: an address, or what the header says that the operator trusts."""

from collections.abc import Sequence

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict
from tests.fakes.fake_server import serving

from kagami_router.api.web.caller import CALLER_HEADER, caller_of


def caller(address: str | None, *headers: tuple[str, str], trusted: str = "") -> str:
    app = web.Application()
    app[CALLER_HEADER] = trusted
    request = make_mocked_request("POST", "/", app=app)
    return caller_of(request.clone(headers=CIMultiDict(headers), remote=address))


def test_a_caller_is_an_address() -> None:
    assert caller("192.0.2.1") == caller("192.0.2.1") != caller("192.0.2.2")


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Forwarded-For", "192.0.2.9")],
        [("Forwarded", "for=192.0.2.9")],
        [("X-Real-IP", "192.0.2.9")],
        [("Authorization", "Bearer made-up")],
        [("x-api-key", "made-up")],
    ],
)
def test_a_header_that_anybody_can_make_up_is_nobodys_name(
    headers: Sequence[tuple[str, str]],
) -> None:
    assert caller("192.0.2.1", *headers) == caller("192.0.2.1")
    assert caller("192.0.2.1", *headers, trusted="x-user") == caller("192.0.2.1")


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
    ],
)
def test_a_network_of_ipv6_addresses_is_one_caller(one: str, other: str, is_same: bool) -> None:
    assert (caller(one) == caller(other)) is is_same


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("198.51.100.7, 192.0.2.1", "203.0.113.5,192.0.2.1", True),
        ("192.0.2.1, 198.51.100.7", "192.0.2.1, 203.0.113.5", False),
    ],
)
def test_the_last_entry_of_a_trusted_header_counts(one: str, other: str, is_same: bool) -> None:
    callers = [
        caller("10.0.0.1", ("X-Forwarded-For", value), trusted="x-forwarded-for")
        for value in (one, other)
    ]
    assert (callers[0] == callers[1]) is is_same


def test_of_several_lines_the_last_one_counts() -> None:
    forged = [("X-Forwarded-For", "198.51.100.7"), ("X-Forwarded-For", "192.0.2.1")]
    assert caller("10.0.0.1", *forged, trusted="x-forwarded-for") == caller("192.0.2.1")


def test_a_trusted_header_that_is_missing_leaves_the_address() -> None:
    assert caller("192.0.2.1", trusted="x-user") == caller("192.0.2.1")
    assert caller("192.0.2.1", ("x-user", " "), trusted="x-user") == caller("192.0.2.1")


@pytest.mark.parametrize("value", ["Bearer sk-secret", "x" * 8000, "ж 1", "user 1"])
def test_a_name_is_short_and_holds_no_secret(value: str) -> None:
    name = caller("192.0.2.1", ("Authorization", value), trusted="Authorization")
    assert name == caller("192.0.2.2", ("Authorization", value), trusted="authorization")
    assert len(name) <= 64
    assert value not in name


def test_who_has_no_address_has_a_name_too() -> None:
    assert caller(None) == caller("") == ""


async def test_every_generation_knows_its_caller() -> None:
    async with serving(caller_header="x-user", max_concurrent_requests=8) as server:
        for path, body in (
            ("/generate", {"inputs": "a"}),
            ("/generate_stream", {"inputs": "a"}),
            ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
        ):
            async with server.post(path, body, headers={"x-user": path}) as response:
                await response.read()
                assert response.status == 200
        async with server.post("/generate", {"inputs": "a"}) as response:
            await response.read()
        names = [request.caller for request in server.loop.requests]
    assert len(set(names)) == 5
    assert names[2] == names[3] != names[1]
    assert names[-1] == "127.0.0.1"
