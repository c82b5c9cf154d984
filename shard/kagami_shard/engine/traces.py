"""The shard's spans: how long a sequence's steps took, and each single step if asked for.

A sequence has two spans. Each is a child of the router's span of the same phase, whose ids came
with the sequence:

    shard.prefill   from the first step with one of its chunks to the last
    shard.decode    all steps that brought one token each, summed up; it ends when the sequence is
                    dropped

Only sequences whose trace is sampled are recorded. All of it runs on the engine's one thread.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.context import Context

from kagami_proto.span_names import EventName, Key, SpanName
from kagami_proto.tracing import NO_TRACING, Tracing, context_of
from kagami_shard.engine.step import NewSequence, Step, StepResult

# OTLP's collectors hold 128 links of a span; the last ones say what happened at its end.
_MAX_LINKS = 128


@dataclass(slots=True)
class _Phase:
    """The steps of one sequence in one phase, until now; times in nanoseconds since 1970."""

    started_ns: int
    ended_ns: int = 0
    steps: int = 0
    tokens: int = 0
    sequences: int = 0
    host_ns: int = 0
    device_ns: int = 0
    slowest_ns: int = 0
    links: list[trace.Link] = field(default_factory=list)

    @property
    def attributes(self) -> Mapping[str, int | float]:
        between = self.ended_ns - self.started_ns - self.host_ns
        return {
            Key.STEPS: self.steps,
            Key.TOKENS: self.tokens,
            Key.MEAN_SEQUENCES: self.sequences / max(1, self.steps),
            Key.MAX_STEP_MS: self.slowest_ns / 1e6,
            Key.HOST_MS: self.host_ns / 1e6,
            Key.DEVICE_MS: self.device_ns / 1e6,
            Key.BETWEEN_STEPS_MS: max(0, between) / 1e6,
        }


@dataclass(slots=True)
class _Traced:
    """One sequence: the trace contexts of its phases, and its present phase."""

    prefill: Context
    decode: Context
    prompt_end: int
    phase: _Phase | None = None
    is_decoding: bool = False
    error: str = ""


class SequenceTraces:
    """The worker calls `launched` before each step, and `finished` with the step's result."""

    def __init__(
        self, tracing: Tracing = NO_TRACING, *, rank: int = 0, has_step_spans: bool = False
    ) -> None:
        self._tracing = tracing
        self._rank = rank
        self._has_step_spans = has_step_spans
        self._traced: dict[int, _Traced] = {}

    @property
    def spans_dropped(self) -> int:
        """Spans that could not be exported."""
        return self._tracing.spans_dropped

    def launched(self, step: Step) -> None:
        """End the spans of dropped sequences, and record new ones whose trace is sampled."""
        if self._traced:
            self._drop(step.drop_ids)
        if self._tracing.is_on:
            for new in step.new_sequences:
                if new.traceparent:
                    self._admit(new)

    def finished(self, step: Step, result: StepResult, started_ns: int) -> None:
        """Add the step to its sequences; it began at `started_ns`, in nanoseconds since 1970."""
        if not self._traced:
            return
        present = [(work, traced) for work in step.work if (traced := self._traced.get(work.id))]
        if not present:
            return
        ended_ns = time.time_ns()
        link = self._step_span(step, result, started_ns, ended_ns, [one for _, one in present])
        for work, traced in present:
            phase = traced.phase = traced.phase or _Phase(started_ns)
            if result.error:
                traced.error = result.error
                continue
            phase.ended_ns = ended_ns
            phase.steps += 1
            phase.tokens += work.num_tokens
            phase.sequences += len(step.work)
            phase.host_ns += result.host_ns
            phase.device_ns += result.device_ns
            phase.slowest_ns = max(phase.slowest_ns, result.host_ns)
            phase.links += link
            traced.error = result.failures.get(work.id, "")
            if not traced.is_decoding and work.position + work.num_tokens >= traced.prompt_end:
                self._end(traced)
                traced.is_decoding = True

    def reset(self) -> None:
        """End all spans and forget every sequence."""
        self._drop(list(self._traced))

    def _admit(self, new: NewSequence) -> None:
        prefill = context_of(new.traceparent, new.tracestate)
        parent = trace.get_current_span(prefill).get_span_context()
        if not parent.is_valid or not parent.trace_flags.sampled:
            return
        decode = trace.SpanContext(
            parent.trace_id,
            new.decode_span_id,
            is_remote=True,
            trace_flags=parent.trace_flags,
            trace_state=parent.trace_state,
        )
        inside = trace.set_span_in_context(trace.NonRecordingSpan(decode), Context())
        self._traced[new.id] = _Traced(prefill, inside, len(new.token_ids))

    def _drop(self, ids: Iterable[int]) -> None:
        for dropped in ids:
            if traced := self._traced.pop(dropped, None):
                self._end(traced)

    def _end(self, traced: _Traced) -> None:
        """Export the phase that is over, if it ever had a step."""
        if (phase := traced.phase) is None:
            return
        traced.phase = None
        span = self._tracing.recorder.start_span(
            SpanName.SHARD_DECODE if traced.is_decoding else SpanName.SHARD_PREFILL,
            traced.decode if traced.is_decoding else traced.prefill,
            trace.SpanKind.SERVER,
            {Key.RANK: self._rank, **phase.attributes},
            links=phase.links[-_MAX_LINKS:],
            start_time=phase.started_ns,
        )
        if traced.error:
            span.add_event(EventName.STEP_FAILED)
            span.set_attribute(Key.ERROR_TYPE, "generation")
            span.set_status(trace.Status(trace.StatusCode.ERROR, traced.error))
        span.end(phase.ended_ns or time.time_ns())

    def _step_span(
        self,
        step: Step,
        result: StepResult,
        started_ns: int,
        ended_ns: int,
        traced: Sequence[_Traced],
    ) -> list[trace.Link]:
        """Export the step as a trace of its own, if steps are asked for; returns the link to it."""
        if not self._has_step_spans:
            return []
        parents = [one.decode if one.is_decoding else one.prefill for one in traced]
        span = self._tracing.recorder.start_span(
            SpanName.SHARD_STEP,
            Context(),
            trace.SpanKind.INTERNAL,
            {
                Key.RANK: self._rank,
                Key.STEP_NUMBER: step.number,
                Key.STEP_SEQUENCES: len(step.work),
                Key.TOKENS: sum(work.num_tokens for work in step.work),
                Key.HOST_MS: result.host_ns / 1e6,
                Key.DEVICE_MS: result.device_ns / 1e6,
            },
            links=[trace.Link(_span_context(parent)) for parent in parents],
            start_time=started_ns,
        )
        if result.error:
            span.set_attribute(Key.ERROR_TYPE, "generation")
            span.set_status(trace.Status(trace.StatusCode.ERROR, result.error))
        span.end(ended_ns)
        return [trace.Link(span.get_span_context(), {Key.STEP_NUMBER: step.number})]


def _span_context(context: Context) -> trace.SpanContext:
    return trace.get_current_span(context).get_span_context()
