from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from tests.fakes.sse_server import HANG, SseServer, sse_server

from kagami_benchmark.client import Client, Outcome, connecting
from kagami_benchmark.prompts import Prompt
from kagami_benchmark.routes import ROUTES, Asking
from kagami_benchmark.targets import CHAT, COMPLETIONS, NATIVE

ASKING = Asking("m", ignore_eos=True, as_ids=False, sampling={})


def native(pauses: Sequence[float], **details: Any) -> list[tuple[float, object]]:
    last = len(pauses) - 1
    return [
        (
            pause,
            {"token": {"id": 7, "text": "a"}, "details": (details or None) if at == last else None},
        )
        for at, pause in enumerate(pauses)
    ]


async def asked(server: SseServer, path: str = NATIVE, timeout_s: float = 20) -> Outcome:
    body = msgspec.json.encode(ROUTES[path].body(Prompt("a b", (1, 2), 3), ASKING))
    outcome = Outcome(server.clock())
    async with connecting("secret") as session:
        client = Client(
            session,
            server.url + path,
            ROUTES[path].read,
            timeout_s=timeout_s,
            clock=server.clock,
        )
        await client.ask(body, outcome)
    return outcome


async def test_each_token_has_the_time_at_which_it_came() -> None:
    async with sse_server(lambda _: native([0.5, 0.1, 0.2])) as server:
        outcome = await asked(server)

    assert list(outcome.arrivals) == pytest.approx([0.5, 0.6, 0.8])
    assert outcome.succeeded


async def test_the_servers_own_counts_are_taken() -> None:
    counts = {"generated_tokens": 5, "input_length": 9}
    async with sse_server(lambda _: native([1, 1, 1], **counts)) as server:
        outcome = await asked(server)

    assert (outcome.prompt_tokens, outcome.output_tokens) == (9, 5)


async def test_without_counts_events_are_counted() -> None:
    async with sse_server(lambda _: native([1, 1, 1])) as server:
        assert (await asked(server)).output_tokens == 3


async def test_openais_usage_is_taken_and_its_chunk_is_no_token() -> None:
    chunks = [
        (1.0, {"choices": [{"text": "a"}]}),
        (1.0, {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}),
        (1.0, "[DONE]"),
    ]
    async with sse_server(lambda _: chunks) as server:
        outcome = await asked(server, COMPLETIONS)

    assert (list(outcome.arrivals), outcome.prompt_tokens) == ([1.0], 4)


async def test_a_chunk_that_only_names_the_role_is_no_first_token() -> None:
    chunks = [
        (1.0, {"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
        (2.0, {"choices": [{"delta": {"content": "a"}}]}),
    ]
    async with sse_server(lambda _: chunks) as server:
        assert list((await asked(server, CHAT)).arrivals) == [3.0]


@pytest.mark.parametrize(
    ("path", "event", "error"),
    [
        (NATIVE, {"error": "out of luck", "error_type": "generation"}, "out of luck"),
        (COMPLETIONS, {"error": {"message": "out of luck"}}, "out of luck"),
        (NATIVE, "{", "an event is not understood"),
        (COMPLETIONS, "[DONE]", "the answer had no token"),
    ],
)
async def test_what_goes_wrong_in_a_stream_is_told(path: str, event: object, error: str) -> None:
    async with sse_server(lambda _: [(1.0, event)]) as server:
        outcome = await asked(server, path)

    assert outcome.error.startswith(error)
    assert not outcome.succeeded


async def test_a_refusal_is_told_with_its_status() -> None:
    async with sse_server(lambda _: [], status=429) as server:
        assert (await asked(server)).error == "429 no room"


async def test_a_server_that_is_not_there_is_an_error() -> None:
    async with sse_server(lambda _: []) as server:
        pass

    assert "Cannot connect" in (await asked(server)).error


async def test_an_answer_that_takes_too_long_is_given_up() -> None:
    async with sse_server(lambda _: [(1.0, HANG)]) as server:
        outcome = await asked(server, timeout_s=0.05)

    assert outcome.error == "no whole answer within 0.05 s"
