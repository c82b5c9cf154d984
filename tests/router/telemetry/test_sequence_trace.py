"""The spans of sequences, as the batching loop makes them over a fake shard."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from opentelemetry import trace
from tests.fakes.fake_shard import Request
from tests.fakes.submitted import Submitted
from tests.fakes.traced import Traced, events_of
from tests.router.serving.test_batching_loop import Served, collect, new_request, serving, until

from kagami_proto.errors import GenerationFailed
from kagami_proto.span_names import Key


@asynccontextmanager
async def tracing(folder: Path, num_blocks: int = 64) -> AsyncIterator[tuple[Served, Traced]]:
    traced = Traced()
    async with serving(folder, num_blocks=num_blocks, tracing=traced.tracing) as served:
        yield served, traced


async def test_queue_prefill_and_decode_follow_each_other(tmp_path: Path) -> None:
    async with tracing(tmp_path) as (served, traced):
        with traced.request() as root:
            await collect(Submitted(served.loop, new_request()))
    children = [span for span in traced.spans if span.name != "request"]
    assert [span.name for span in children] == ["queue", "prefill", "decode"]
    assert {span.parent.span_id for span in children if span.parent} == {
        root.get_span_context().span_id
    }
    times = [time for span in children for time in (span.start_time, span.end_time)]
    assert times == sorted(times, key=lambda time: time or 0)


async def test_prefill_and_decode_say_what_was_computed(tmp_path: Path) -> None:
    async with tracing(tmp_path) as (served, traced):
        with traced.request():
            await collect(Submitted(served.loop, new_request(b"x" * 50, 9)))
    prefill, decode = traced.one("prefill"), traced.one("decode")
    assert events_of(prefill) == ["chunk"]
    assert prefill.attributes is not None
    assert prefill.attributes[Key.PROMPT_TOKENS] == 50
    assert events_of(decode) == ["first_token", "slowest_step"]
    assert decode.attributes is not None
    assert (decode.attributes[Key.TOKENS], decode.attributes[Key.STEPS]) == (9, 8)
    assert decode.attributes[Key.MEAN_SEQUENCES] == 1


async def test_every_chunk_of_a_long_prompt_is_an_event(tmp_path: Path) -> None:
    async with tracing(tmp_path) as (served, traced):
        with traced.request():
            await collect(Submitted(served.loop, new_request(b"y" * 150, 2)))
    chunks = [event.attributes for event in traced.one("prefill").events]
    assert [(one[Key.POSITION], one[Key.TOKENS]) for one in chunks if one] == [
        (0, 64),
        (64, 64),
        (128, 22),
    ]


async def test_a_prefix_that_was_cached_is_told(tmp_path: Path) -> None:
    async with tracing(tmp_path) as (served, traced):
        await collect(Submitted(served.loop, new_request()))
        with traced.request():
            await collect(Submitted(served.loop, new_request()))
    attributes = traced.one("prefill").attributes
    assert attributes is not None
    assert attributes[Key.CACHED_TOKENS] == 16


async def test_a_request_that_is_not_sampled_has_no_spans(tmp_path: Path) -> None:
    off = trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=True))
    async with tracing(tmp_path) as (served, traced):
        with trace.use_span(off):
            await collect(Submitted(served.loop, new_request()))
    assert not traced.spans


async def test_one_trace_goes_through_preemption(tmp_path: Path) -> None:
    async with tracing(tmp_path, num_blocks=30) as (served, traced):
        streams = []
        for number in range(16):
            with traced.request(f"request {number}"):
                streams.append(
                    Submitted(served.loop, new_request(b"request number %d" % number, 12))
                )
        await asyncio.gather(*map(collect, streams))
        assert served.metrics.num_preempted > 0
    preempted = [span for span in traced.spans if "preempted" in events_of(span)]
    assert len(preempted) == served.metrics.num_preempted
    for span in preempted:
        own = [
            one
            for one in traced.spans
            if one.context.trace_id == span.context.trace_id and not one.name.startswith("request")
        ]
        after = [one for one in own if (one.start_time or 0) >= (span.end_time or 0)]
        assert [one.name for one in after][:2] == ["queue", "prefill"]
        assert after[-1].name == "decode"
    first_tokens = [name for span in traced.spans for name in events_of(span)].count("first_token")
    assert first_tokens == 16


async def test_what_a_queue_waits_for_is_told(tmp_path: Path) -> None:
    async with tracing(tmp_path, num_blocks=12) as (served, traced):
        with traced.request("first"):
            first = Submitted(served.loop, new_request(b"a" * 30, 8))
        with traced.request("second"):
            second = Submitted(served.loop, new_request(b"b" * 30, 8))
        await asyncio.gather(collect(first), collect(second))
    reasons = [span.attributes[Key.WAIT_REASON] for span in traced.named("queue")]  # type: ignore[index]
    assert reasons[:2] == ["next_step", "blocks"]


async def test_leaving_a_stream_is_a_cancelled_span(tmp_path: Path) -> None:
    async with tracing(tmp_path) as (served, traced):
        with traced.request():
            async with Submitted(served.loop, new_request(max_new_tokens=40)) as stream:
                await anext(stream)
        await until(lambda: served.scheduler.is_idle)
    assert "cancelled" in events_of(traced.one("decode"))


async def test_a_sequence_that_fails_ends_in_error(tmp_path: Path) -> None:
    async with tracing(tmp_path) as (served, traced):
        served.shard.engine.faults.sequence_error = lambda _: "bad luck"
        with traced.request(), pytest.raises(GenerationFailed):
            await collect(Submitted(served.loop, new_request()))
    prefill = traced.one("prefill")
    assert (prefill.status.is_ok, prefill.status.description) == (False, "bad luck")


async def test_a_failed_step_is_an_event_and_the_trace_goes_on(tmp_path: Path) -> None:
    failed: list[int] = []

    def fail_once(request: Request) -> str:
        if not failed and len(request.work) == 2 and request.number > 2:
            failed.append(request.number)
            return "out of luck"
        return ""

    async with tracing(tmp_path) as (served, traced):
        served.shard.engine.faults.pass_error = fail_once
        with traced.request():
            first = Submitted(served.loop, new_request())
        second = Submitted(served.loop, new_request(b"another"))
        await asyncio.gather(collect(first), collect(second))
    assert [span.name for span in traced.spans] == [
        *("request", "queue", "prefill", "decode"),
        *("queue", "prefill", "decode"),
    ]
    assert "step_failed" in events_of(traced.named("decode")[0])


async def test_the_shard_hears_of_both_spans(tmp_path: Path) -> None:
    async with tracing(tmp_path) as (served, traced):
        with traced.request() as root:
            await collect(Submitted(served.loop, new_request()))
        (new,) = [new for step in served.shard.steps for new in step.new_sequences]
    trace_id = trace.format_trace_id(root.get_span_context().trace_id)
    prefill = trace.format_span_id(traced.one("prefill").context.span_id)
    assert new.traceparent.startswith(f"00-{trace_id}-{prefill}-")
    assert new.decode_span_id == traced.one("decode").context.span_id
