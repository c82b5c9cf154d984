"""Tokens per second and latencies of a server on the four workloads of the design.

    python tests/benchmarks/workloads.py              starts a launcher with the embedded model
    python tests/benchmarks/workloads.py --url URL    measures the server that is there

Prompts are made of repeated words so that one word is one token of the embedded model; the number
that the server counted is what is reported. EOS is ignored, every answer has its full length.
Each workload runs `--rounds` times; the median by output tokens/s is printed.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import aiohttp
from tests.integration.conftest import running


class Workload(NamedTuple):
    name: str
    concurrency: int
    requests: int
    shared_tokens: int
    own_tokens: int
    output_tokens: int


WORKLOADS = (
    Workload("W1: 1 client, 128 in, 128 out", 1, 2, 0, 128, 128),
    Workload("W2: 16 clients, 128 in, 128 out", 16, 16, 0, 128, 128),
    Workload("W3: 16 clients, 1024 shared + 32 in, 64 out", 16, 32, 1024, 32, 64),
    Workload("W4: 4 clients, 1024 in, 8 out", 4, 8, 0, 1024, 8),
)


@dataclass
class Measured:
    """One request: when it started and when each event came."""

    started: float
    arrivals: list[float]
    prompt_tokens: int


class Figures(NamedTuple):
    output_rate: float
    total_rate: float
    first_token: Sequence[float]
    gaps: Sequence[float]


def prompt_of(workload: Workload, number: int, salt: int) -> str:
    """A prompt whose own part no other request has, with `salt` also in the shared part."""
    shared = f"{salt} " + "sea " * (workload.shared_tokens - 3) if workload.shared_tokens else ""
    return f"{shared}{salt + 7 * number} " + "sun " * (workload.own_tokens - 4)


async def request(session: aiohttp.ClientSession, url: str, prompt: str, count: int) -> Measured:
    body = {
        "inputs": prompt,
        "parameters": {"max_new_tokens": count, "ignore_eos": True, "details": True},
    }
    started = time.perf_counter()
    arrivals: list[float] = []
    last = b""
    async with session.post(f"{url}/generate_stream", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data:"):
                arrivals.append(time.perf_counter())
                last = line
    event = json.loads(last[5:])
    assert event["details"]["generated_tokens"] == count, event
    return Measured(started, arrivals, event["details"]["input_length"])


async def run(url: str, workload: Workload, salt: int) -> Figures:
    """All requests of a workload, `concurrency` at a time."""
    numbers = iter(range(workload.requests))
    results: list[Measured] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def client() -> None:
            for number in numbers:
                prompt = prompt_of(workload, number, salt)
                results.append(await request(session, url, prompt, workload.output_tokens))

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(workload.concurrency)))
        elapsed = time.perf_counter() - started
    output = sum(len(result.arrivals) for result in results)
    prompt_tokens = sum(result.prompt_tokens for result in results)
    return Figures(
        output / elapsed,
        (output + prompt_tokens) / elapsed,
        [result.arrivals[0] - result.started for result in results],
        [b - a for r in results for a, b in zip(r.arrivals, r.arrivals[1:], strict=False)],
    )


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000


async def measure(url: str, rounds: int) -> None:
    await run(url, WORKLOADS[1]._replace(output_tokens=8), 10)
    print("| workload | out tok/s | total tok/s | TTFT p50 / p99 ms | ITL p50 / p99 ms |")
    print("|---|---|---|---|---|")
    for index, workload in enumerate(WORKLOADS):
        salts = [1000 * (index + 1) + 131 * number for number in range(rounds)]
        figures = [await run(url, workload, salt) for salt in salts]
        middle = statistics.median_low([each.output_rate for each in figures])
        chosen = next(each for each in figures if each.output_rate == middle)
        first, gaps = chosen.first_token, chosen.gaps
        print(
            f"| {workload.name} | {chosen.output_rate:.0f} | {chosen.total_rate:.0f} "
            f"| {percentile(first, 0.5):.0f} / {percentile(first, 0.99):.0f} "
            f"| {percentile(gaps, 0.5):.1f} / {percentile(gaps, 0.99):.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--url", help="of a running server (default: start one)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="for the launcher, after --")
    args = parser.parse_args()
    if args.url:
        asyncio.run(measure(args.url, args.rounds))
        return
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), *args.flags) as server:
        asyncio.run(measure(server.url, args.rounds))


if __name__ == "__main__":
    main()
