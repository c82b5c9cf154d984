"""Makes the spans and pictures of deploy/tracing.md: three requests that are slow for a reason.

    python tests/benchmarks/trace_stories.py deploy/tracing

Starts the embedded model with limits that provoke each case, and a collector; writes what was
exported of the slow request as JSON, and its waterfall as SVG.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from tests.benchmarks.waterfall import draw
from tests.fakes.collector import Collector, Span, collecting
from tests.integration.conftest import running

_KEPT = ("kagami.", "gen_ai.usage.", "gen_ai.response.finish_reasons", "http.r")


async def post(session: aiohttp.ClientSession, prompt: str, tokens: int) -> str:
    """One generation of `tokens` tokens; its trace id."""
    parameters = {"max_new_tokens": tokens, "ignore_eos": True}
    body = {"inputs": prompt, "parameters": parameters}
    async with session.post("/generate", json=body) as answer:
        await answer.read()
        answer.raise_for_status()
        return answer.headers["x-trace-id"]


async def queued(session: aiohttp.ClientSession) -> str:
    """Two run, as many as may; the third waits for a place."""
    first = [asyncio.ensure_future(post(session, f"{n} A story:", 48)) for n in range(2)]
    await asyncio.sleep(0.2)
    slow = await post(session, "3 A story:", 12)
    await asyncio.gather(*first)
    return slow


async def long_prompt(session: aiohttp.ClientSession) -> str:
    """It decodes in peace until a neighbour brings a long prompt."""
    slow = asyncio.ensure_future(post(session, "A story:", 60))
    await asyncio.sleep(0.5)
    await post(session, "sea " * 3000, 1)
    return await slow


async def preempted(session: aiohttp.ClientSession) -> str:
    """Three grow until the cache has no block left; the youngest gives its up."""
    older = [asyncio.ensure_future(post(session, f"{n} " + "sun " * 100, 120)) for n in range(2)]
    await asyncio.sleep(0.1)
    slow = await post(session, "3 " + "moon " * 100, 120)
    await asyncio.gather(*older)
    return slow


@dataclass(frozen=True)
class Story:
    name: str
    title: str
    flags: tuple[str, ...]
    play: Callable[[aiohttp.ClientSession], Awaitable[str]]


STORIES = (
    Story("queued", "Slow because queued", ("--max-batch-size", "2"), queued),
    Story(
        "long-prompt",
        "Slow because of a long prompt in the batch",
        ("--max-batch-prefill-tokens", "4096"),
        long_prompt,
    ),
    Story(
        "preempted",
        "Slow because of preemption",
        ("--max-batch-total-tokens", "512", "--max-total-tokens", "256"),
        preempted,
    ),
)


def exported(spans: list[Span]) -> list[dict[str, Any]]:
    """What the guide shows of each span; times in nanoseconds."""
    return [
        {
            "service": span.service,
            "name": span.name,
            "trace_id": span.trace_id,
            "span_id": span.span_id,
            "parent_id": span.parent_id,
            "start": span.start,
            "end": span.end,
            "attributes": {k: v for k, v in span.attributes.items() if k.startswith(_KEPT)},
            "events": [
                {"name": name, "time": time, "attributes": dict(attributes)}
                for name, time, attributes in span.events
            ],
        }
        for span in sorted(spans, key=lambda one: one.start)
    ]


def tell(story: Story, collector: Collector, folder: Path) -> None:
    environ = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
    with tempfile.TemporaryDirectory() as sockets:
        with running(Path(sockets), *story.flags, environ=environ) as server:

            async def play() -> str:
                async with aiohttp.ClientSession(server.url) as session:
                    await post(session, "Hello", 4)
                    return await story.play(session)

            trace_id = asyncio.run(play())
    spans = exported([span for span in collector.spans if span.trace_id == trace_id])
    text = json.dumps(spans, indent=1)
    (folder / f"{story.name}.json").write_text(text + "\n")
    (folder / f"{story.name}.svg").write_text(draw(story.title, spans))
    print(story.title, *(f"  {span['name']}: {_told(span)}" for span in spans), sep="\n")


def _told(span: dict[str, Any]) -> str:
    events = [
        f"{event['name']} {event['attributes']}"
        for event in span["events"]
        if event["name"] != "chunk"
    ]
    return f"{(span['end'] - span['start']) / 1e6:.1f} ms {span['attributes']} {events}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for story in STORIES:
        with collecting() as collector:
            tell(story, collector, folder)


if __name__ == "__main__":
    main()
