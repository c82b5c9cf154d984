"""Small asynchronous helpers around the server's native routes."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp

Json = dict[str, Any]


async def generate(
    session: aiohttp.ClientSession, url: str, prompt: str, **parameters: Any
) -> Json:
    """One `/generate` answer, details and all."""
    body = {"inputs": prompt, "parameters": {"details": True, **parameters}}
    async with session.post(f"{url}/generate", json=body) as answer:
        payload: Json = await answer.json()
        assert answer.status == 200, payload
        return payload


async def generate_all(
    url: str, prompts: Sequence[str], *, at_once: int = 1, others: int = 0, **parameters: Any
) -> list[Json]:
    """All prompts, `at_once` of them together, while `others` unrelated requests keep running."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        noise = [asyncio.ensure_future(_noise(session, url, i)) for i in range(others)]
        places = asyncio.Semaphore(at_once)

        async def one(prompt: str) -> Json:
            async with places:
                return await generate(session, url, prompt, **parameters)

        try:
            return await asyncio.gather(*map(one, prompts))
        finally:
            for task in noise:
                task.cancel()
            await asyncio.gather(*noise, return_exceptions=True)


async def _noise(session: aiohttp.ClientSession, url: str, number: int) -> None:
    turn = 0
    while True:
        turn += 1
        prompt = f"Noise {number} in turn {turn}: " + "word " * (7 * number % 40)
        await generate(session, url, prompt, do_sample=True, max_new_tokens=20 + 3 * number)


async def generate_together(url: str, prompts: Sequence[str], **parameters: Any) -> list[Json]:
    """All prompts at once."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        return await asyncio.gather(
            *(generate(session, url, prompt, **parameters) for prompt in prompts)
        )


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: str, **parameters: Any
) -> AsyncIterator[Json]:
    """The events of `/generate_stream`."""
    body = {"inputs": prompt, "parameters": parameters}
    async with session.post(f"{url}/generate_stream", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data:"):
                event: Json = json.loads(line[5:])
                assert "error" not in event, event
                yield event


def token_ids(answer: Json) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


def logprobs(answer: Json) -> list[float]:
    return [token["logprob"] for token in answer["details"]["tokens"]]
