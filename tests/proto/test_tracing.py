import logging
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    server_attributes,
    url_attributes,
    user_agent_attributes,
)
from opentelemetry.semconv.schemas import Schemas
from tests.fakes.collector import Collector, collecting
from tests.fakes.span_names import names_of

from kagami_proto import tracing_plan
from kagami_proto.errors import GenerationFailed, InvalidRequest
from kagami_proto.open_tracing import open_tracing
from kagami_proto.span_export import BatchLimits, SpanExport
from kagami_proto.span_names import SCHEMA_URL, Key
from kagami_proto.tracing import (
    NO_TRACING,
    context_of,
    current_trace_id,
    headers_of,
    span,
)
from kagami_proto.tracing_plan import TracingPlan

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"
FAST = {"OTEL_BSP_SCHEDULE_DELAY": "10"}


def plan(
    environ: dict[str, str] | None = None,
    endpoint: str | None = None,
    name: str | None = None,
    part: str = "router",
) -> TracingPlan | None:
    return tracing_plan.plan(environ or {}, endpoint=endpoint, service_name=name, part=part)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as listening:
        yield listening


def test_without_an_endpoint_traces_are_off() -> None:
    assert plan() is None


@pytest.mark.parametrize(
    "environ", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}]
)
def test_the_environment_can_switch_them_off(environ: dict[str, str]) -> None:
    assert plan(environ, "http://c:4317") is None


@pytest.mark.parametrize(
    ("endpoint", "environ", "address", "protocol"),
    [
        ("http://c:4317", {}, "http://c:4317", "grpc"),
        ("c:4317", {}, "http://c:4317", "grpc"),
        ("https://c:4317", {}, "https://c:4317", "grpc"),
        ("http://c:4318", {}, "http://c:4318/v1/traces", "http/protobuf"),
        ("http://c/v1/traces", {}, "http://c/v1/traces", "http/protobuf"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:4317"}, "http://e:4317", "grpc"),
        ("http://c:1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:4317"}, "http://c:1", "grpc"),
        (
            "http://c:1/base/",
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "http://c:1/base/v1/traces",
            "http/protobuf",
        ),
        (
            None,
            {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://e:9/as/it/is",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            "http://e:9/as/it/is",
            "http/protobuf",
        ),
    ],
)
def test_where_spans_go(
    endpoint: str | None, environ: dict[str, str], address: str, protocol: str
) -> None:
    planned = plan(environ, endpoint)
    assert planned is not None
    assert (planned.endpoint, planned.protocol) == (address, protocol)


@pytest.mark.parametrize(
    ("name", "environ", "part", "service"),
    [
        (None, {}, "router", "kagami-router"),
        (None, {}, "shard", "kagami-shard"),
        ("x", {}, "router", "x"),
        ("x", {}, "shard", "x-shard"),
        (None, {"OTEL_SERVICE_NAME": "y"}, "launcher", "y-launcher"),
        ("x", {"OTEL_SERVICE_NAME": "y"}, "router", "x"),
    ],
)
def test_every_part_has_a_service_name_of_its_own(
    name: str | None, environ: dict[str, str], part: str, service: str
) -> None:
    planned = plan(environ, "http://c:4317", name, part)
    assert planned is not None
    assert planned.service_name == service


@pytest.mark.parametrize(
    ("environ", "endpoint", "text"),
    [
        ({}, "ftp://c", "must be a URL such as http://collector:4317. Given: 'ftp://c'"),
        ({}, "http://c:99999", "Given: 'http://c:99999'"),
        ({}, "http://", "Given: 'http://'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http://c", "Given: 'http/json'"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "http://c", "Given: 'zipkin'"),
    ],
)
def test_what_is_wrong_is_named(environ: dict[str, str], endpoint: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        plan(environ, endpoint)


def test_a_problem_costs_the_traces_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    wanted, problem = tracing_plan.plan_or_problem(
        {}, endpoint="ftp://c", service_name=None, part="router"
    )
    with open_tracing(wanted, problem=problem) as opened:
        assert opened is NO_TRACING
    (line,) = caplog.messages
    assert line.startswith("Traces are off: the OTLP endpoint must be a URL")


@pytest.mark.parametrize("is_http", [False, True])
def test_spans_arrive(collector: Collector, is_http: bool) -> None:
    wanted = plan(endpoint=collector.http_endpoint if is_http else collector.endpoint)
    if is_http:
        wanted = plan(
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, collector.http_endpoint, "mine"
        )
    with open_tracing(wanted, {"kagami.rank": 3}) as opened:
        with span(opened.tracer, "outer"), span(opened.tracer, "inner", {"a": 1}):
            pass
    inner = collector.one("inner")
    assert inner.parent_id == collector.one("outer").span_id
    assert inner.attributes == {"a": 1}
    assert inner.service == ("mine" if is_http else "kagami-router")
    assert inner.schema_url == SCHEMA_URL
    assert inner.resource["kagami.rank"] == 3


@pytest.mark.parametrize("is_http", [False, True])
def test_headers_of_the_environment_travel(
    collector: Collector, is_http: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
    protocol = "http/protobuf" if is_http else "grpc"
    endpoint = collector.http_endpoint if is_http else collector.endpoint
    with open_tracing(plan({"OTEL_EXPORTER_OTLP_PROTOCOL": protocol}, endpoint)) as opened:
        opened.tracer.start_span("one").end()
    assert collector.headers[0]["x-key"] == "secret"


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_tls_with_a_certificate_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(certificate))
    pair = (key.read_bytes(), certificate.read_bytes())
    with collecting(grpc.ssl_server_credentials([pair])) as collector:
        endpoint = f"https://localhost:{collector.grpc_port}"
        with open_tracing(plan(endpoint=endpoint)) as opened:
            opened.tracer.start_span("secret").end()
        assert collector.one("secret")


def test_the_sampler_of_the_environment_counts(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with open_tracing(plan(endpoint=collector.endpoint)) as opened:
        opened.tracer.start_span("left out").end()
        opened.tracer.start_span("sampled", context_of(PARENT)).end()
    assert [one.name for one in collector.spans] == ["sampled"]


def test_a_propagator_that_is_not_installed_is_no_panic(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_PROPAGATORS", "b3")
    with open_tracing(plan(endpoint=collector.endpoint)) as opened:
        assert opened.is_on


def test_a_span_can_get_an_id_beforehand(collector: Collector) -> None:
    with open_tracing(plan(endpoint=collector.endpoint)) as opened:
        assert opened.ids is not None
        opened.ids.choose(0xBEEF)
        for name in ("chosen", "not chosen"):
            opened.tracer.start_span(name).end()
    assert collector.one("chosen").span_id == f"{0xBEEF:016x}"
    assert collector.one("not chosen").span_id != f"{0xBEEF:016x}"


def test_a_bad_queue_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with open_tracing(plan({"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "http://127.0.0.1:1")) as opened:
        assert not opened.is_on
    assert "OTEL_BSP_MAX_QUEUE_SIZE must be a whole number > 0. Given: '-1'" in caplog.text


class Exporter(SpanExporter):
    """Exports as told; `answers` are taken from the front, the last one stays."""

    def __init__(self, *answers: SpanExportResult | Exception) -> None:
        self.answers = list(answers)
        self.go_on = threading.Event()
        self.go_on.set()
        self.exported = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.go_on.wait(10)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        self.exported += len(spans)
        return answer


OK, BAD = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
ONE = ReadableSpan("one")


def export(exporter: Exporter, **limits: float) -> SpanExport:
    return SpanExport(exporter, "http://c", BatchLimits(**{"delay_s": 0.01, **limits}))  # type: ignore[arg-type]


def test_a_stalled_collector_delays_nobody_and_loses_are_counted() -> None:
    exporter = Exporter(OK)
    exporter.go_on.clear()
    exporting = export(exporter, queue=10, batch=5)
    started = time.monotonic()
    for _ in range(1000):
        exporting.on_end(ONE)
    assert time.monotonic() - started < 1
    lost = exporting.dropped
    assert 1000 - 15 <= lost <= 1000 - 10
    exporter.go_on.set()
    exporting.shutdown()
    assert exporter.exported + lost == 1000


def test_an_end_waits_for_a_stalled_collector_a_short_time_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kagami_proto.span_export.CLOSE_TIMEOUT_S", 0.1)
    exporter = Exporter(OK)
    exporter.go_on.clear()
    exporting = export(exporter)
    exporting.on_end(ONE)
    started = time.monotonic()
    exporting.shutdown()
    assert time.monotonic() - started < 2
    exporter.go_on.set()


@pytest.mark.parametrize("failure", [BAD, RuntimeError("boom")])
def test_failed_exports_are_counted_and_told_once(
    failure: SpanExportResult | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    exporting = export(Exporter(failure))
    for count in range(1, 4):
        exporting.on_end(ONE)
        until = time.monotonic() + 5
        while exporting.dropped < count and time.monotonic() < until:
            time.sleep(0.005)
    exporting.shutdown()
    assert exporting.dropped == 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Traces cannot be exported")


def test_exports_that_work_again_are_told_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    exporting = export(Exporter(BAD, OK))
    exporting.on_end(ONE)
    exporting.force_flush()  # the second span goes into an export of its own
    exporting.on_end(ONE)
    exporting.shutdown()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_an_endpoint_where_nobody_listens_is_told_once_with_its_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1.5")
    environ = FAST | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    caplog.set_level(logging.WARNING)
    with open_tracing(plan(environ, "http://127.0.0.1:9")) as opened:
        opened.tracer.start_span("lost").end()
        until = time.monotonic() + 10
        while not opened.spans_dropped and time.monotonic() < until:
            time.sleep(0.02)
        assert opened.spans_dropped == 1
    (record,) = caplog.records
    assert "refused" in record.reason.lower()  # type: ignore[attr-defined]


def test_a_refusal_has_a_type_and_no_text(collector: Collector) -> None:
    with open_tracing(plan(endpoint=collector.endpoint)) as opened:
        with pytest.raises(InvalidRequest), span(opened.tracer, "refused"):
            raise InvalidRequest("what the client said")
    refused = collector.one("refused")
    assert refused.attributes == {Key.ERROR_TYPE: "validation"}
    assert not refused.is_error
    assert not refused.events


def test_our_own_failure_has_status_and_text(collector: Collector) -> None:
    with open_tracing(plan(endpoint=collector.endpoint)) as opened:
        with pytest.raises(GenerationFailed), span(opened.tracer, "failed"):
            raise GenerationFailed("no memory")
    failed = collector.one("failed")
    assert (failed.is_error, failed.status_text) == (True, "no memory")


def test_a_context_goes_through_headers() -> None:
    context = context_of(PARENT, "vendor=1")
    parent = trace.get_current_span(context).get_span_context()
    assert headers_of(parent) == {"traceparent": PARENT, "tracestate": "vendor=1"}


@pytest.mark.parametrize("bad", ["", "00-1-2-01", f"ff-{'ab' * 16}-{'cd' * 8}-01", "é"])
def test_a_bad_header_is_no_context(bad: str) -> None:
    assert not context_of(bad)


def test_outside_of_spans_there_is_no_trace_id() -> None:
    assert current_trace_id() == ""


def test_names_are_those_of_the_conventions() -> None:
    known = {
        value
        for module in (
            client_attributes,
            error_attributes,
            gen_ai_attributes,
            http_attributes,
            server_attributes,
            url_attributes,
            user_agent_attributes,
        )
        for name, value in vars(module).items()
        if name.isupper()
    }
    assert {key for key in names_of(Key) if not key.startswith("kagami.")} <= known
    assert SCHEMA_URL in {schema.value for schema in Schemas}
