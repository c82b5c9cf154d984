"""The shard's spans, as the worker makes them around a tiny model."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from tests.fakes.tiny_model import TinyModel
from tests.fakes.traced import Traced, events_of
from tests.shard.engine.test_worker import PROMPT, new_engine

from kagami_proto.span_names import Key
from kagami_proto.values import SamplingParams
from kagami_shard.engine.step import NewSequence, Step, Work
from kagami_shard.engine.traces import SequenceTraces
from kagami_shard.engine.worker import Worker

TRACE, PREFILL, DECODE = "ab" * 16, "cd" * 8, 0xEF
BLOCKS = {1: [1, 2, 3]}


def new(flags: str = "01", sequence_id: int = 1) -> NewSequence:
    return NewSequence(
        sequence_id,
        PROMPT,
        len(PROMPT),
        SamplingParams(),
        traceparent=f"00-{TRACE}-{PREFILL}-{flags}",
        tracestate="vendor=1",
        decode_span_id=DECODE,
    )


def run(
    *steps: Step, model: TinyModel | None = None, step_spans: bool = False, overlap: bool = False
) -> Traced:
    traced = Traced()
    traces = SequenceTraces(traced.tracing, rank=2, has_step_spans=step_spans)
    engine = new_engine(model or TinyModel())
    with (
        ThreadPoolExecutor(1) as thread,
        Worker(engine, thread, overlap=overlap, traces=traces) as worker,
    ):
        for step in steps:
            worker.run(step, lambda _: None)
    return traced


CHUNKED = (
    Step(1, [new()], (), [Work(1, 0, 3)], BLOCKS),
    Step(2, work=[Work(1, 3, 2)]),
    Step(3, work=[Work(1, 5, 1)]),
    Step(4, work=[Work(1, 6, 1)]),
    Step(5, drop_ids=[1]),
)


def parent_of(span: ReadableSpan) -> tuple[str, int]:
    assert span.parent is not None
    return f"{span.parent.trace_id:032x}", span.parent.span_id


@pytest.mark.parametrize("overlap", [False, True])
def test_two_spans_hang_under_the_routers_two(overlap: bool) -> None:
    traced = run(*CHUNKED, overlap=overlap)
    assert [span.name for span in traced.spans] == ["shard.prefill", "shard.decode"]
    assert parent_of(traced.one("shard.prefill")) == (TRACE, int(PREFILL, 16))
    assert parent_of(traced.one("shard.decode")) == (TRACE, DECODE)
    assert {span.context.trace_state.to_header() for span in traced.spans} == {"vendor=1"}


def test_they_say_what_was_computed() -> None:
    traced = run(*CHUNKED)
    for name, tokens in (("shard.prefill", 5), ("shard.decode", 2)):
        attributes = traced.one(name).attributes
        assert attributes is not None
        assert (attributes[Key.STEPS], attributes[Key.TOKENS]) == (2, tokens)
        assert (attributes[Key.RANK], attributes[Key.MEAN_SEQUENCES]) == (2, 1)
        assert 0 < attributes[Key.DEVICE_MS] <= attributes[Key.HOST_MS]  # type: ignore[operator]


def test_a_sequence_that_is_not_sampled_has_none() -> None:
    assert not run(Step(1, [new("00")], (), [Work(1, 0, 5)], BLOCKS), Step(2, drop_ids=[1])).spans


def test_without_the_flag_a_step_has_no_span() -> None:
    assert not run(*CHUNKED).named("shard.step")


def test_steps_and_sequences_are_linked_both_ways() -> None:
    traced = run(*CHUNKED, step_spans=True)
    steps = traced.named("shard.step")
    assert [link.context.span_id for span in steps for link in span.links] == [
        *(int(PREFILL, 16),) * 2,
        *(DECODE,) * 2,
    ]
    for name, its_steps in (("shard.prefill", steps[:2]), ("shard.decode", steps[2:])):
        linked = [link.context.span_id for link in traced.one(name).links]
        assert linked == [step.context.span_id for step in its_steps]


def test_a_step_is_a_trace_of_its_own() -> None:
    traced = run(*CHUNKED, step_spans=True)
    steps = traced.named("shard.step")
    assert len({span.context.trace_id for span in steps} - {int(TRACE, 16)}) == 4
    assert all(span.parent is None for span in steps)


def test_a_step_without_sampled_sequences_has_no_span() -> None:
    traced = run(Step(1, [new("00")], (), [Work(1, 0, 5)], BLOCKS), step_spans=True)
    assert not traced.spans


def test_a_failed_step_makes_its_spans_errors() -> None:
    model = TinyModel()
    model.fail_at = 3
    traced = run(
        Step(1, [new()], (), [Work(1, 0, 5)], BLOCKS),
        Step(2, drop_ids=[1]),
        model=model,
        step_spans=True,
    )
    for name in ("shard.prefill", "shard.step"):
        assert traced.one(name).status.description == "the kernel broke"
    assert events_of(traced.one("shard.prefill")) == ["step_failed"]


def test_a_new_stream_ends_all_spans() -> None:
    traced = Traced()
    traces = SequenceTraces(traced.tracing)
    with (
        ThreadPoolExecutor(1) as thread,
        Worker(new_engine(TinyModel()), thread, overlap=False, traces=traces) as worker,
    ):
        worker.run(CHUNKED[0], lambda _: None)
        worker.call(worker.reset)
    assert [span.name for span in traced.spans] == ["shard.prefill"]
