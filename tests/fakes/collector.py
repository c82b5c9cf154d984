"""A collector of traces: it receives spans by OTLP/gRPC and OTLP/HTTP and stores them.

It can refuse an export, or never answer it, as a real one does when it is overloaded.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan


@dataclass(frozen=True, slots=True)
class Span:
    """One span as it arrived; ids in hex, times in nanoseconds since 1970."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    """SERVER, CLIENT or INTERNAL."""
    start: int
    end: int
    attributes: Mapping[str, Any]
    events: tuple[tuple[str, int, Mapping[str, Any]], ...]
    links: tuple[tuple[str, str], ...]
    """Trace id and span id."""
    is_error: bool
    status_text: str
    resource: Mapping[str, Any]
    schema_url: str
    trace_state: str

    def event_names(self) -> list[str]:
        return [name for name, _, _ in self.events]


@dataclass(slots=True)
class Collector:
    """What has arrived, and how the next export is answered."""

    grpc_port: int = 0
    http_port: int = 0
    spans: list[Span] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    """The headers of each export, with names in small letters."""
    refuses: bool = False
    stalled: threading.Event = field(default_factory=threading.Event)
    """While set, exports get no answer."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.grpc_port}"

    @property
    def http_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def named(self, name: str) -> list[Span]:
        """The spans of that name, by their start."""
        found = [span for span in self.spans if span.name == name]
        return sorted(found, key=lambda span: span.start)

    def one(self, name: str) -> Span:
        """The only span of that name."""
        (span,) = self.named(name)
        return span

    def wait_for(self, condition: Callable[["Collector"], bool], timeout_s: float = 20.0) -> None:
        """Wait until the condition holds; AssertionError with what is there if it never does."""
        until = time.monotonic() + timeout_s
        while not condition(self):
            names = sorted({f"{span.service}: {span.name}" for span in self.spans})
            assert time.monotonic() < until, f"after {timeout_s} s only {names}"
            time.sleep(0.02)

    def take(self, request: pb.ExportTraceServiceRequest, headers: Mapping[str, str]) -> None:
        self.headers.append(headers)
        while self.stalled.is_set():
            time.sleep(0.05)
        for group in request.resource_spans:
            resource = _attributes(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [_span(one, resource, scope.schema_url) for one in scope.spans]


def _span(wire: WireSpan, resource: Mapping[str, Any], schema_url: str) -> Span:
    return Span(
        service=resource["service.name"],
        name=wire.name,
        trace_id=wire.trace_id.hex(),
        span_id=wire.span_id.hex(),
        parent_id=wire.parent_span_id.hex(),
        kind=WireSpan.SpanKind.Name(wire.kind).removeprefix("SPAN_KIND_"),
        start=wire.start_time_unix_nano,
        end=wire.end_time_unix_nano,
        attributes=_attributes(wire.attributes),
        events=tuple(
            (event.name, event.time_unix_nano, _attributes(event.attributes))
            for event in wire.events
        ),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in wire.links),
        is_error=wire.status.code == 2,
        status_text=wire.status.message,
        resource=resource,
        schema_url=schema_url,
        trace_state=wire.trace_state,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, str(kind)) if kind else None


class _Service(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        if self._collector.refuses:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "not with this key")
        headers = {str(key): str(value) for key, value in context.invocation_metadata()}
        self._collector.take(request, headers)
        return pb.ExportTraceServiceResponse()


def _http_server(collector: Collector) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            is_known = self.path == "/v1/traces" and not collector.refuses
            if is_known:
                headers = {name.lower(): value for name, value in self.headers.items()}
                collector.take(pb.ExportTraceServiceRequest.FromString(body), headers)
            self.send_response(200 if is_known else 403)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@contextmanager
def collecting(credentials: grpc.ServerCredentials | None = None) -> Iterator[Collector]:
    """A collector that listens on two ports of its own; with `credentials` gRPC speaks TLS."""
    collector = Collector()
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Service(collector), server)
        collector.grpc_port = (
            server.add_secure_port("127.0.0.1:0", credentials)
            if credentials
            else server.add_insecure_port("127.0.0.1:0")
        )
        server.start()
        http = _http_server(collector)
        collector.http_port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield collector
        finally:
            collector.stalled.clear()
            http.shutdown()
            thread.join()
            http.server_close()
            server.stop(0).wait()
