"""Output does not depend on batch-mates, pool size, preemption or restart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.clients import generate_all, generate_together, token_ids
from tests.integration.conftest import PROMPTS, Server, running

pytestmark = pytest.mark.slow
SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "seed": 20261122,
    "temperature": 0.9,
    "top_p": 0.9,
    "max_new_tokens": 40,
}
PROMPT = PROMPTS[1]
OTHERS = [f"{number} bottles of beer on the wall, {number} bottles of" for number in range(15)]
# Eleven blocks of 32 tokens; a prompt takes one, a whole sequence two or three.
SMALL_POOL = ("--max-batch-total-tokens", "352", "--max-total-tokens", "256")


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("small")
    with running(folder, "--dtype", "float32", *SMALL_POOL) as started:
        yield started


async def text_alone(server: Server) -> str:
    (answer,) = await generate_all(server.url, [PROMPT], **SAMPLED)
    text: str = answer["generated_text"]
    return text


async def test_a_seed_draws_the_same_in_a_batch_of_16(server: Server) -> None:
    alone = await text_alone(server)

    answers = await generate_together(server.url, [PROMPT, *OTHERS], **SAMPLED)

    assert answers[0]["generated_text"] == alone


async def test_a_seed_draws_the_same_after_a_preemption_and_in_another_server(
    server: Server, small_server: Server
) -> None:
    alone = await text_alone(server)
    before = small_server.metric("tgi_preemptions_total")

    answers = await generate_together(small_server.url, [*[PROMPT] * 6, *OTHERS[:6]], **SAMPLED)

    assert small_server.metric("tgi_preemptions_total") > before
    assert {answer["generated_text"] for answer in answers[:6]} == {alone}


async def test_a_pool_too_small_for_all_completes_all_with_the_same_greedy_output(
    server: Server, small_server: Server
) -> None:
    prompts = [f"{prompt} {number}" for number in range(4) for prompt in OTHERS[:2]]
    expected = await generate_together(server.url, prompts, max_new_tokens=60)  # room for all
    before = small_server.metric("tgi_preemptions_total")

    answers = await generate_together(small_server.url, prompts, max_new_tokens=60)

    assert small_server.metric("tgi_preemptions_total") > before
    assert [token_ids(a) for a in answers] == [token_ids(e) for e in expected]


async def test_a_restarted_server_draws_the_same(server: Server, tmp_path: Path) -> None:
    alone = await text_alone(server)

    with running(tmp_path, "--dtype", "float32") as second:
        assert await text_alone(second) == alone


@pytest.fixture(scope="module", params=[(), ("--quantize", "int8")], ids=["bf16", "int8"])
def native_servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """As served by default: with room for all, and with a pool that is too small for all."""
    with (
        running(tmp_path_factory.mktemp("roomy"), *request.param) as roomy,
        running(tmp_path_factory.mktemp("small"), *request.param, *SMALL_POOL) as small,
    ):
        yield roomy, small


def tokens_of(answer: dict[str, Any]) -> list[tuple[int, float]]:
    return [(token["id"], token["logprob"]) for token in answer["details"]["tokens"]]


async def test_greedy_ids_and_logprobs_are_the_same_bits_alone_together_and_after_preemptions(
    native_servers: tuple[Server, Server],
) -> None:
    roomy, small = native_servers
    prompts = [f"{number}. " + "A tale of two cities. " * 22 for number in range(6)]
    alone = await generate_all(roomy.url, prompts, max_new_tokens=60)
    expected = [tokens_of(answer) for answer in alone]
    before = small.metric("tgi_preemptions_total")

    beside = await generate_all(roomy.url, prompts, at_once=6, others=3, max_new_tokens=60)
    preempted = await generate_together(small.url, prompts, max_new_tokens=60)

    assert small.metric("tgi_preemptions_total") > before
    assert [tokens_of(answer) for answer in beside] == expected
    assert [tokens_of(answer) for answer in preempted] == expected
