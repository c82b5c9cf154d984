"""What a process traces with, and how a trace's context travels between processes.

`tracing_plan.py` decides where traces go, `open_tracing.py` starts them; the names of spans and
attributes are in `span_names.py`. W3C Trace Context: https://www.w3.org/TR/trace-context/.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kagami_proto.errors import row_of
from kagami_proto.span_names import Key


class _Export(Protocol):
    @property
    def dropped(self) -> int: ...

    def shutdown(self) -> None: ...


class ChosenIds(Protocol):
    """Makes the ids of spans; the id of the next span can be chosen before it starts."""

    def new(self) -> int:
        """An id for a span that starts later."""
        ...

    def choose(self, span_id: int) -> None:
        """The next span that is started by this thread's caller gets this id."""
        ...


@dataclass(frozen=True, slots=True)
class Tracing:
    """What a process needs to trace; with `NO_TRACING` nothing is recorded."""

    tracer: trace.Tracer = field(default_factory=trace.NoOpTracer)
    """Starts traces by the sampler of OTEL_TRACES_SAMPLER, and children by their parents."""
    recorder: trace.Tracer = field(default_factory=trace.NoOpTracer)
    """Records every span: for callers that have checked the sampled flag themselves."""
    ids: ChosenIds | None = None
    propagator: TextMapPropagator = field(default_factory=TraceContextTextMapPropagator)
    export: _Export | None = None

    @property
    def is_on(self) -> bool:
        return self.export is not None

    @property
    def spans_dropped(self) -> int:
        """Spans of this process that no collector has seen."""
        return self.export.dropped if self.export is not None else 0

    def close(self) -> None:
        """Export what is queued; for a process that ends without leaving its contexts."""
        if self.export is not None:
            self.export.shutdown()


NO_TRACING = Tracing()


@contextmanager
def span(
    tracer: trace.Tracer, name: str, attributes: Mapping[str, Any] | None = None, **given: Any
) -> Iterator[trace.Span]:
    """A span around the body, current inside; what the body raises becomes its error.

    `given`: further arguments of `Tracer.start_as_current_span`.
    """
    with tracer.start_as_current_span(
        name,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
        **given,
    ) as opened:
        try:
            yield opened
        except Exception as error:
            mark_failed(opened, error)
            raise


def mark_failed(failed: trace.Span, error: BaseException) -> None:
    """Give a span the type of an error, and the status where it is the server's own.

    The text of a refusal may quote what the client sent, so it stays in the log; by the semantic
    conventions a 4xx leaves a server's status unset.
    """
    row = row_of(error)
    failed.set_attribute(Key.ERROR_TYPE, row.kind if row else type(error).__name__)
    if row is None or row.status >= 500 or not row.is_refusal:
        failed.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))


def context_of(traceparent: str, tracestate: str = "") -> Context:
    """The context that these two headers stand for; an empty one where they are not valid."""
    carrier = {"traceparent": traceparent, "tracestate": tracestate}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def headers_of(context: trace.SpanContext) -> dict[str, str]:
    """`traceparent`, and `tracestate` where there is one, for what this span causes."""
    headers: dict[str, str] = {}
    inside = trace.set_span_in_context(trace.NonRecordingSpan(context), Context())
    TraceContextTextMapPropagator().inject(headers, inside)
    return headers


def current_trace_id() -> str:
    """The trace that this task works for, as 32 hex digits; empty if there is none."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""
