"""Where traces go, decided from the standard variables and two flags. Pure.

`plan(environ, …)` gives a `TracingPlan`, or None where nothing is traced. The variables are
OpenTelemetry's: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

GRPC, HTTP = "grpc", "http/protobuf"
EXPORTERS = {
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
    """As `plan`, but returns the problem instead of raising: a server serves without traces."""
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
            if value not in EXPORTERS:
                raise ValueError(f"{name} must be {GRPC} or {HTTP}. Given: {value!r}")
            return value
    return None
