"""Many streams at once, clients that go away, and a shared prefix."""

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest
from tests.integration.clients import generate, generate_together, stream
from tests.integration.conftest import PROMPTS, Server, running

pytestmark = pytest.mark.slow


async def streamed_text(session: aiohttp.ClientSession, url: str, prompt: str, count: int) -> str:
    events = [event async for event in stream(session, url, prompt, max_new_tokens=count)]
    text = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["generated_text"] == text
    return text


async def test_64_streams_complete_with_the_text_of_whole_answers(server: Server) -> None:
    prompts = [f"{PROMPTS[n % 19]} {n}" for n in range(64)]
    whole = await generate_together(server.url, prompts, max_new_tokens=16)

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
    ) as session:
        texts = await asyncio.gather(
            *(streamed_text(session, server.url, prompt, 16) for prompt in prompts)
        )

    assert texts == [answer["generated_text"] for answer in whole]


async def test_japanese_and_emoji_come_whole(bf16_server: Server) -> None:
    prompts = [
        "次の文を繰り返してください。富士山はとても高いです。富士山はとても",
        "🍕🍣🎉🍕🍣🎉🍕🍣🎉🍕🍣",
        "ありがとう😊 ありがとう😊 ありがとう😊",
    ]
    async with aiohttp.ClientSession() as session:
        texts = [await streamed_text(session, bf16_server.url, prompt, 50) for prompt in prompts]

    assert not any("\ufffd" in text for text in texts)
    assert any(ord(character) > 0x2FFF for text in texts for character in text)


@pytest.mark.parametrize("route", ["generate", "generate_stream"])
async def test_a_client_that_goes_away_frees_its_blocks_within_a_second(
    server: Server, route: str
) -> None:
    body = {"inputs": "Count for ever: 1 2 3", "parameters": {"max_new_tokens": 4000}}

    async def ask() -> None:
        async with session.post(f"{server.url}/{route}", json=body) as answer:
            await answer.read()

    async with aiohttp.ClientSession() as session:
        request = asyncio.ensure_future(ask())
        await until(lambda: server.metric("tgi_kv_blocks_used") > 0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    await until(lambda: server.metric("tgi_kv_blocks_used") == 0, within_s=1)


async def until(condition: object, *, within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not await asyncio.to_thread(condition):  # type: ignore[arg-type]  # a plain callable
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def first_token_seconds(url: str, num_clients: int) -> list[float]:
    """Time to first token of clients that come one after the other with one prefix."""
    prefix = " ".join(f"Rule {n}: be kind to number {n}." for n in range(102))  # 1,020 tokens
    times = []
    async with aiohttp.ClientSession() as session:
        for number in range(num_clients):
            started = time.perf_counter()
            arrivals = [
                time.perf_counter()
                async for _ in stream(
                    session, url, f"{prefix} Question {number}:", max_new_tokens=2
                )
            ]
            times.append(arrivals[0] - started)
    return times


async def test_a_shared_prefix_is_computed_once(server: Server, tmp_path: Path) -> None:
    before = server.metric("tgi_prefix_hit_tokens_total")
    cached = await first_token_seconds(server.url, 16)
    hits = server.metric("tgi_prefix_hit_tokens_total") - before
    with running(tmp_path, "--dtype", "float32", environ={"PREFIX_CACHING": "0"}) as without_cache:
        uncached = await first_token_seconds(without_cache.url, 3)
        assert without_cache.metric("tgi_prefix_hit_tokens_total") == 0

    assert hits >= 15 * 960
    # A ratio on one machine in one run, far from its border (seen: more than 10).
    assert sorted(uncached)[1] >= 4 * sorted(cached[1:])[8]


async def test_16_clients_at_once_compute_a_shared_prefix_once(server: Server) -> None:
    prefix = " ".join(f"Line {n} of the shared text." for n in range(150))
    before = server.metric("tgi_prefix_hit_tokens_total")

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(
            *(
                generate(session, server.url, f"{prefix} Client {n}:", max_new_tokens=4)
                for n in range(16)
            )
        )

    assert server.metric("tgi_prefix_hit_tokens_total") - before >= 15 * 1000
