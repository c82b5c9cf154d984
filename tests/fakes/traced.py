"""Tracing that keeps finished spans in memory, as the process's exporter would get them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

from kagami_proto.tracing import Tracing
from kagami_proto.tracing_sdk import Ids


class _Export:
    dropped = 0

    def shutdown(self) -> None:
        pass


@dataclass(eq=False)
class Traced:
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    def __post_init__(self) -> None:
        ids = Ids()
        provider = TracerProvider(ParentBased(ALWAYS_ON), id_generator=ids, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        tracer = provider.get_tracer("tests")
        self.tracing = Tracing(tracer, tracer, ids, export=_Export())

    @contextmanager
    def request(self, name: str = "request") -> Iterator[trace.Span]:
        """A root span, current inside."""
        with self.tracing.tracer.start_as_current_span(name) as root:
            yield root

    @property
    def spans(self) -> list[ReadableSpan]:
        """By their start."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]
