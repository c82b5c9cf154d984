"""The spans of one sequence in the router: queue, prefill, decode.

One span is open at a time; which one is where the sequence is:

    queue ─admitted─► prefill ─last chunk─► decode ─► finished
      ▲                  │                     │
      └─────── preempted, or its step failed ──┘

The batching loop tells what happens, in its own clock's seconds; spans are in nanoseconds since
1970. A sequence whose request is not sampled has none of this.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from opentelemetry import trace
from opentelemetry.context import Context

from kagami_proto.span_names import EventName, Key, SpanName
from kagami_proto.tracing import ChosenIds, Tracing, headers_of
from kagami_proto.values import Wanted
from kagami_router.request.values import End
from kagami_router.scheduler.sequence import Sequence, WaitReason
from kagami_router.scheduler.step import NewSequence, Step, StepResults, WorkItem


class WireContext(NamedTuple):
    """What a shard needs to hang its spans under ours."""

    traceparent: str
    """Of the prefill span."""
    tracestate: str
    decode_span_id: int
    """Of the span that begins with the first token."""


@dataclass(slots=True)
class _Decoding:
    """The steps behind the first token; each brought one or more."""

    steps: int = 0
    total_ns: int = 0
    sequences: int = 0
    """Summed over the steps."""
    slowest_ns: int = 0
    slowest: Step | None = None
    slowest_at: float = 0.0


class SequenceTrace:
    """Opens and ends the spans of one sequence under the span that is current when it is made."""

    def __init__(self, tracing: Tracing, sequence: Sequence, now: float, *, ahead: int) -> None:
        assert tracing.ids is not None, "only where traces are on"
        self._tracer = tracing.tracer
        self._ids: ChosenIds = tracing.ids
        self._sequence = sequence
        self._epoch_s = time.time() - now
        self._parent = trace.set_span_in_context(trace.get_current_span(), Context())
        self.is_queued = True
        self._reason: WaitReason | None = None
        self._decode_span_id = 0
        self._decoding: _Decoding | None = None
        self._has_token = False
        self._span = self._open(SpanName.QUEUE, now, {Key.QUEUE_AHEAD: ahead})

    def waits(self, now: float) -> None:
        """A step was made without it."""
        reason = self._sequence.waits_for
        if reason is not self._reason:
            self._reason = reason
            self._event(EventName.WAITING, now, {Key.WAIT_REASON: reason.value})

    def admitted(self, new: NewSequence, now: float) -> WireContext:
        """It joined the batch: what to tell the shards."""
        reason = self._reason or WaitReason.NEXT_STEP
        self._end(now, {Key.WAIT_REASON: reason.value})
        self.is_queued = False
        self._span = self._open(
            SpanName.PREFILL,
            now,
            {
                Key.PROMPT_TOKENS: len(new.token_ids),
                Key.CACHED_TOKENS: new.num_cached_tokens,
                Key.IS_REPLAY: new.is_replay,
            },
            trace.SpanKind.CLIENT,
        )
        self._decoding = None
        self._decode_span_id = self._ids.new()
        headers = headers_of(self._span.get_span_context())
        return WireContext(
            headers["traceparent"], headers.get("tracestate", ""), self._decode_span_id
        )

    def stepped(self, work: WorkItem, step: Step, results: StepResults, now: float) -> None:
        """A step with this sequence came back."""
        if self.is_queued:  # preempted, or failed, after this step had left
            return
        if results.error:
            self._event(EventName.STEP_FAILED, now, {Key.STEP_NUMBER: step.number})
            self._wait_again(now)
        elif (decoding := self._decoding) is not None:
            step_ns = results.host_ns
            decoding.steps += 1
            decoding.total_ns += step_ns
            decoding.sequences += len(step.work)
            if step_ns > decoding.slowest_ns:
                decoding.slowest_ns, decoding.slowest, decoding.slowest_at = step_ns, step, now
        else:
            chunk = {Key.POSITION: work.position, Key.TOKENS: work.num_tokens}
            self._event(EventName.CHUNK, now, {**chunk, **_figures(step, results.host_ns)})
            if work.wanted is Wanted.ONE_TOKEN:
                self._start_decode(now)

    def _start_decode(self, now: float) -> None:
        self._end(now)
        self._ids.choose(self._decode_span_id)
        self._span = self._open(SpanName.DECODE, now, {}, trace.SpanKind.CLIENT)
        self._decoding = _Decoding()
        if not self._has_token:
            self._has_token = True
            self._event(EventName.FIRST_TOKEN, now)

    def preempted(self, now: float) -> None:
        """It gave up its blocks, and waits to be prefilled again."""
        if not self.is_queued:
            self._event(EventName.PREEMPTED, now, {Key.TOKENS: self._sequence.log.num_generated})
        self._wait_again(now)

    def put_back(self, now: float) -> None:
        """The shards were lost: it waits to be prefilled again when there are others."""
        self._wait_again(now)

    def _wait_again(self, now: float) -> None:
        if not self.is_queued:
            self._end(now)
            self._decoding, self._reason, self.is_queued = None, None, True
            self._span = self._open(SpanName.QUEUE, now, {Key.IS_REPLAY: True})

    def finished(self, end: End, now: float) -> None:
        """It has all its tokens."""
        self._end(
            now, {Key.TOKENS: end.num_generated, Key.FINISH_REASONS: (end.finish_reason.value,)}
        )

    def failed(self, message: str, now: float) -> None:
        """It cannot be computed."""
        self._span.set_attribute(Key.ERROR_TYPE, "generation")
        self._span.set_status(trace.Status(trace.StatusCode.ERROR, message))
        self._end(now)

    def cancelled(self, now: float) -> None:
        """Nobody waits for it any more."""
        self._event(EventName.CANCELLED, now)
        self._end(now)

    def _open(
        self,
        name: str,
        now: float,
        attributes: Mapping[str, int | bool],
        kind: trace.SpanKind = trace.SpanKind.INTERNAL,
    ) -> trace.Span:
        return self._tracer.start_span(
            name,
            self._parent,
            kind,
            {Key.SEQUENCE_ID: self._sequence.id, **attributes},
            start_time=self._ns(now),
        )

    def _end(self, now: float, attributes: Mapping[str, int | str | tuple[str, ...]] = {}) -> None:
        if decoding := self._decoding:
            steps = max(1, decoding.steps)
            self._span.set_attributes(
                {
                    Key.STEPS: decoding.steps,
                    Key.MEAN_STEP_MS: decoding.total_ns / steps / 1e6,
                    Key.MAX_STEP_MS: decoding.slowest_ns / 1e6,
                    Key.MEAN_SEQUENCES: decoding.sequences / steps,
                }
            )
            if decoding.slowest is not None:
                figures = _figures(decoding.slowest, decoding.slowest_ns)
                self._event(EventName.SLOWEST_STEP, decoding.slowest_at, figures)
        self._span.set_attributes(dict(attributes))
        self._span.end(self._ns(now))

    def _event(
        self, name: str, now: float, attributes: Mapping[str, int | float | str] = {}
    ) -> None:
        self._span.add_event(name, dict(attributes), self._ns(now))

    def _ns(self, now: float) -> int:
        return int((self._epoch_s + now) * 1e9)


def _figures(step: Step, step_ns: int) -> dict[str, int | float]:
    return {
        Key.STEP_NUMBER: step.number,
        Key.STEP_MS: step_ns / 1e6,
        Key.STEP_SEQUENCES: len(step.work),
        Key.STEP_PREFILL_TOKENS: step.num_prefill_tokens,
    }
