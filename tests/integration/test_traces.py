"""Real processes that export to a collector: one trace for each request, across all of them."""

import json
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.collector import Collector, Span, collecting
from tests.fakes.span_names import names_of
from tests.integration.conftest import Server, running

from kagami_proto.span_names import Key, OtherServersKey, SpanName

pytestmark = pytest.mark.slow

FAST_EXPORT = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
TRACE, SPAN = "ab" * 16, "cd" * 8
SHORT = {"inputs": "a", "parameters": {"max_new_tokens": 4}}
CHAT = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 12}


@dataclass(frozen=True)
class Traced:
    server: Server
    collector: Collector


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """A server that logs errors only, and exports all the same."""
    environ = FAST_EXPORT | {"LOG_LEVEL": "error"}
    with collecting() as collector:
        flags = ("--otlp-endpoint", collector.endpoint, "--otlp-step-spans")
        with running(tmp_path_factory.mktemp("traced"), *flags, environ=environ) as server:
            yield Traced(server, collector)


def post(
    url: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> tuple[Mapping[str, str], bytes]:
    request = urllib.request.Request(
        url,
        json.dumps(body).encode(),
        {"content-type": "application/json", **(headers or {})},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(answer.headers.items()), answer.read()


def chat(traced: Traced, trace_id: str) -> list[Span]:
    """The spans of one chat that asks to be part of this trace."""
    headers = {"traceparent": f"00-{trace_id}-{SPAN}-01"}
    post(f"{traced.server.url}/v1/chat/completions", CHAT, headers)
    ends = (SpanName.SHARD_DECODE, "POST /v1/chat/completions")
    traced.collector.wait_for(
        lambda it: {*ends} <= {span.name for span in it.spans if span.trace_id == trace_id}
    )
    return [span for span in traced.collector.spans if span.trace_id == trace_id]


def test_a_request_is_one_connected_trace(traced: Traced) -> None:
    spans = {span.name: span for span in chat(traced, TRACE)}
    root = "POST /v1/chat/completions"
    parents = {
        root: SPAN,
        **dict.fromkeys(("template", "validate", "queue", "prefill", "decode"), root),
        "shard.prefill": "prefill",
        "shard.decode": "decode",
    }
    assert set(spans) == set(parents)
    for name, parent in parents.items():
        assert spans[name].parent_id == (spans[parent].span_id if parent in spans else SPAN), name


def test_both_services_take_part_with_the_kinds_of_a_call(traced: Traced) -> None:
    spans = {span.name: span for span in chat(traced, "01" * 16)}
    for name in ("prefill", "decode"):
        assert (spans[name].service, spans[name].kind) == ("kagami-router", "CLIENT")
        shards = spans[f"shard.{name}"]
        assert (shards.service, shards.kind) == ("kagami-shard", "SERVER")


def test_times_of_router_and_shard_fit_into_each_other(traced: Traced) -> None:
    spans = {span.name: span for span in chat(traced, "02" * 16)}
    slack_ns = 50_000_000
    for name in ("prefill", "decode"):
        outer, inner = spans[name], spans[f"shard.{name}"]
        assert outer.start - slack_ns <= inner.start <= inner.end <= outer.end + slack_ns
        assert inner.attributes[Key.DEVICE_MS] <= (inner.end - inner.start) / 1e6


def test_each_step_is_linked_with_the_request_both_ways(traced: Traced) -> None:
    spans = chat(traced, "03" * 16)
    decode = next(span for span in spans if span.name == "decode")
    steps = [
        step
        for step in traced.collector.named(SpanName.SHARD_STEP)
        if (decode.trace_id, decode.span_id) in step.links
    ]
    assert len(steps) == decode.attributes[Key.STEPS]
    (shard_decode,) = [span for span in spans if span.name == "shard.decode"]
    assert set(shard_decode.links) == {(step.trace_id, step.span_id) for step in steps}


def test_the_start_is_a_trace_of_its_own(traced: Traced) -> None:
    traced.collector.wait_for(lambda it: bool(it.named(SpanName.ROUTER_START)))
    root_id = traced.collector.one(SpanName.SHARD_LOAD).trace_id
    names = {span.name for span in traced.collector.spans if span.trace_id == root_id}
    assert names >= {
        SpanName.SHARD_LOAD,
        SpanName.SHARD_WARMUP,
        SpanName.ROUTER_START,
        SpanName.ROUTER_LOAD_TOKENIZER,
        SpanName.ROUTER_CONNECT,
        SpanName.ROUTER_WARMUP,
    }
    warmup = traced.collector.one(SpanName.SHARD_WARMUP)
    assert warmup.parent_id == traced.collector.one(SpanName.ROUTER_WARMUP).span_id


def test_only_known_attributes_are_exported(traced: Traced) -> None:
    chat(traced, "04" * 16)
    used = {key for span in traced.collector.spans for key in span.attributes}
    used |= {key for span in traced.collector.spans for _, _, event in span.events for key in event}
    assert used <= names_of(Key) | names_of(OtherServersKey)


def test_a_stalled_collector_costs_spans_and_no_request(traced: Traced) -> None:
    traced.collector.stalled.set()
    try:
        for _ in range(3):
            started = time.monotonic()
            post(f"{traced.server.url}/generate", SHORT)
            assert time.monotonic() - started < 10
    finally:
        traced.collector.stalled.clear()


def test_what_cannot_be_exported_is_said_once_and_counted(tmp_path: Path) -> None:
    # Long enough for a second try, which is told with its cause: it comes after 0.8 to 1.2 s.
    environ = FAST_EXPORT | {"OTEL_EXPORTER_OTLP_TIMEOUT": "1.5"}
    with running(
        tmp_path, "--otlp-endpoint", "http://127.0.0.1:9/v1/traces", environ=environ
    ) as server:
        for _ in range(3):
            post(f"{server.url}/generate", SHORT)
        until = time.monotonic() + 30
        while len(lines_of(server)) < 3 and time.monotonic() < until:  # launcher, shard, router
            time.sleep(0.1)
        post(f"{server.url}/generate", SHORT)
        assert server.metric("tgi_trace_spans_dropped_total")
        said = lines_of(server)
    assert len(said) == 3
    assert any("refused" in line for line in said)


def lines_of(server: Server) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if "cannot be exported" in line]
