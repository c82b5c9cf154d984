"""Traces: where they go (OTLP), and how their context travels between processes.

    plan(environ, …) -> TracingPlan | None     pure; None = off
    open_tracing(plan, …) -> Tracing           loads the SDK, starts the exporting thread

The SDK is imported when there is somewhere to export to, and not before. The names of spans and
attributes are in `span_names.py`. W3C Trace Context: https://www.w3.org/TR/trace-context/.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kagami_proto.errors import row_of
from kagami_proto.span_names import Key

logger = logging.getLogger(__name__)

GRPC, HTTP = "grpc", "http/protobuf"
_EXPORTERS = {
    GRPC: "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    HTTP: "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}
_HTTP_PORT, _HTTP_PATH = 4318, "/v1/traces"
_SUFFIXES = {"router": "", "shard": "-shard", "launcher": "-launcher"}


@dataclass(frozen=True, slots=True)
class TracingPlan:
    """Where spans go, and under which name."""

    endpoint: str
    protocol: str
    service_name: str
    queue: Mapping[str, str] = field(default_factory=dict)
    """The variables OTEL_BSP_*."""


def plan(
    environ: Mapping[str, str], *, endpoint: str | None, service_name: str | None, part: str
) -> TracingPlan | None:
    """What flags and OTEL_* variables ask for; None: no traces.

    `part` is "router", "shard" or "launcher": the service is `kagami-{part}`, or what
    `service_name` or OTEL_SERVICE_NAME say, with `-shard` or `-launcher` behind it. Raises
    `ValueError` that names the variable or flag.
    """
    is_off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower()
    if is_off or exporter == "none":
        return None
    if exporter not in ("otlp", ""):
        raise ValueError(f"OTEL_TRACES_EXPORTER must be otlp or none. Given: {exporter!r}")
    own_endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    given = endpoint or own_endpoint or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not given:
        return None
    name = service_name or environ.get("OTEL_SERVICE_NAME")
    url, protocol = _url(given), _protocol(environ)
    if protocol is None:
        is_http = url.port == _HTTP_PORT or url.path.endswith(_HTTP_PATH)
        protocol = HTTP if is_http else GRPC
    address = url.geturl()
    if protocol == HTTP and (endpoint or not own_endpoint) and not url.path.endswith(_HTTP_PATH):
        address = address.rstrip("/") + _HTTP_PATH
    return TracingPlan(
        endpoint=address,
        protocol=protocol,
        service_name=name + _SUFFIXES[part] if name else f"kagami-{part}",
        queue={key: value for key, value in environ.items() if key.startswith("OTEL_BSP_")},
    )


def plan_or_problem(
    environ: Mapping[str, str], *, endpoint: str | None, service_name: str | None, part: str
) -> tuple[TracingPlan | None, str]:
    """As `plan`, but what is wrong comes beside it: it must not keep a server from serving."""
    try:
        return plan(environ, endpoint=endpoint, service_name=service_name, part=part), ""
    except ValueError as error:
        return None, str(error)


def _url(text: str) -> Any:
    url = urlsplit(text if "://" in text else f"http://{text}")
    try:
        has_place = bool(url.hostname) and url.port != 0
    except ValueError:
        has_place = False
    if url.scheme not in ("http", "https") or not has_place:
        raise ValueError(
            f"the OTLP endpoint must be a URL such as http://collector:4317. Given: {text!r}"
        )
    return url


def _protocol(environ: Mapping[str, str]) -> str | None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if value := environ.get(name):
            if value not in _EXPORTERS:
                raise ValueError(f"{name} must be {GRPC} or {HTTP}. Given: {value!r}")
            return value
    return None


class _Export(Protocol):
    @property
    def dropped(self) -> int: ...

    def shutdown(self) -> None: ...


class ChosenIds(Protocol):
    """Makes the ids of spans; the next one may be chosen beforehand."""

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
    """Records whatever it is told: for those who have looked at the sampled flag themselves."""
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
def open_tracing(
    wanted: TracingPlan | None,
    attributes: Mapping[str, str | int] | None = None,
    *,
    problem: str = "",
) -> Iterator[Tracing]:
    """Trace inside this context, to its end with what is queued (one second at most).

    `attributes` are of the process (the resource). What is wrong with the plan, or was with what
    it should have been made of, is logged, and costs the traces and nothing else.
    """
    if problem:
        logger.warning("Traces are off: %s", problem)
    with ExitStack() as stack:
        tracing = NO_TRACING
        if wanted is not None:
            try:
                # Takes 100 ms that nobody should pay who does not trace.
                sdk = import_module("kagami_proto.tracing_sdk")
                opened = sdk.open_sdk(wanted, dict(attributes or {}), _EXPORTERS[wanted.protocol])
                tracing = stack.enter_context(opened)
            except (ImportError, ValueError, OSError) as error:
                logger.warning("Traces are off: %s", error)
        yield tracing


@contextmanager
def span(
    tracer: trace.Tracer, name: str, attributes: Mapping[str, Any] | None = None, **given: Any
) -> Iterator[trace.Span]:
    """A span around the body, current inside; what the body raises becomes its error.

    `given` is what `Tracer.start_as_current_span` takes besides.
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
    if row is None or row.status >= 500 or row.kind == "generation":
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
