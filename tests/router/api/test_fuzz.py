"""Malformed bodies: each is answered, none is an internal error, nothing stays allocated."""

import asyncio
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.fake_server import FakeServer, serving
from tests.fakes.mutations import BODIES, mutated

from kagami_proto.errors import InvalidRequest
from kagami_proto.values import Grammar
from kagami_router.api.routes import ROUTES

POSTS = sorted(route.path for route in ROUTES if route.method == "POST")
ANSWER_S = 10
# Iterations of the event loop: a stream's handler ends after its last byte has been read.
NUM_ITERATIONS = 20
# Each example is one request; all requests go to the same server.
fuzzed = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


async def compile_grammar(grammar: Grammar) -> None:
    if len(grammar.source) % 7 == 0:
        raise InvalidRequest("grammar is not valid: no")


class Fuzzed:
    """A server and its event loop, for tests that are not async."""

    def __init__(self, runner: asyncio.Runner, server: FakeServer) -> None:
        self._runner = runner
        self._server = server

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and bytes of the answer, after all permits and requests were released."""
        return self._runner.run(asyncio.wait_for(self._post(path, body), ANSWER_S))

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        target = path.format(model="m", version="1")
        headers = {"content-type": "application/json"}
        async with self._server.http.post(target, data=body, headers=headers) as response:
            status, answer = response.status, await response.read()
        for _ in range(NUM_ITERATIONS):
            await asyncio.sleep(0)
        assert self._server.has_all_permits()
        assert self._server.loop.num_open == 0
        return status, answer


@pytest.fixture(scope="module")
def fuzzing() -> Iterator[Fuzzed]:
    with asyncio.Runner() as runner:
        context = serving(compile_grammar=compile_grammar)
        server = runner.run(context.__aenter__())
        yield Fuzzed(runner, server)
        runner.run(context.__aexit__(None, None, None))


def test_every_post_route_has_bodies() -> None:
    assert POSTS
    assert [path for path in POSTS if path not in BODIES] == []


@pytest.mark.parametrize("path", POSTS)
@fuzzed
@given(random=st.randoms(use_true_random=False))
def test_a_mutated_body_is_never_our_fault(fuzzing: Fuzzed, path: str, random: Random) -> None:
    body = mutated(random, path)
    status, answer = fuzzing.post(path, body)
    assert status < 500, (body, answer)
    assert b"Internal error" not in answer, (body, answer)


@pytest.mark.parametrize("path", POSTS)
@fuzzed
@given(body=st.binary(max_size=64))
def test_bytes_are_never_our_fault(fuzzing: Fuzzed, path: str, body: bytes) -> None:
    status, answer = fuzzing.post(path, body)
    assert status < 500, (body, answer)
