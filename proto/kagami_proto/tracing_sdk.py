"""OpenTelemetry's SDK, put together as a `TracingPlan` asks; imported only where traces are on."""

import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version

from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kagami_proto.span_export import BatchLimits, SpanExport
from kagami_proto.span_names import SCHEMA_URL
from kagami_proto.tracing import Tracing
from kagami_proto.tracing_plan import TracingPlan

logger = logging.getLogger(__name__)


class Ids(IdGenerator):
    """Random ids, except a span's id that was chosen before it started; for one thread."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self._chosen: int | None = None

    def new(self) -> int:
        return self._random.generate_span_id()

    def choose(self, span_id: int) -> None:
        self._chosen = span_id

    def generate_span_id(self) -> int:
        chosen, self._chosen = self._chosen, None
        return self._random.generate_span_id() if chosen is None else chosen

    def generate_trace_id(self) -> int:
        return self._random.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        return True


@contextmanager
def open_sdk(
    plan: TracingPlan, attributes: Mapping[str, str | int], exporter_module: str
) -> Iterator[Tracing]:
    """Trace to `plan.endpoint` inside this context."""
    resource = Resource.create(
        {
            "service.version": version("kagami-tgi"),
            "service.instance.id": str(uuid.uuid4()),
            **attributes,
            "service.name": plan.service_name,
        },
        SCHEMA_URL,
    )
    limits = BatchLimits.of(plan.queue)
    propagator = _propagator()
    exporter = import_module(exporter_module).OTLPSpanExporter(endpoint=plan.endpoint)
    export, ids = SpanExport(exporter, plan.endpoint, limits), Ids()
    # The SDK reads OTEL_TRACES_SAMPLER and OTEL_SPAN_*_LIMIT.
    sampled = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
    recorded = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=ids)
    for provider in (sampled, recorded):
        provider.add_span_processor(export)
    logger.info(
        "Traces are exported",
        extra={
            "endpoint": plan.endpoint,
            "protocol": plan.protocol,
            "service": plan.service_name,
        },
    )
    try:
        yield Tracing(
            tracer=sampled.get_tracer("kagami", version("kagami-tgi"), schema_url=SCHEMA_URL),
            recorder=recorded.get_tracer("kagami", version("kagami-tgi"), schema_url=SCHEMA_URL),
            ids=ids,
            propagator=propagator,
            export=export,
        )
    finally:
        export.shutdown()


def _propagator() -> TextMapPropagator:
    """What OTEL_PROPAGATORS names; the W3C's where it names what is not installed."""
    try:
        return import_module("opentelemetry.propagate").get_global_textmap()  # type: ignore[no-any-return]  # an import by name
    # It raises whatever a propagator's own import raises.
    except Exception as error:
        logger.warning("OTEL_PROPAGATORS: %s; using tracecontext", error)
        return TraceContextTextMapPropagator()
