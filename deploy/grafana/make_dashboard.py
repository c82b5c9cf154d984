"""Writes dashboard.json beside itself: `python deploy/grafana/make_dashboard.py`.

The dashboard is a table of rows, panels and queries; where a panel stands follows from its place.
The last row asks what TGI's own dashboard asks, with its label `container`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboard.json"
_PANELS_A_LINE, _WIDTH, _HEIGHT = 3, 8, 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: legend -> query; `unit` is Grafana's name of the unit."""

    title: str
    unit: str
    queries: Mapping[str, str]
    help: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]
    collapsed: bool = False


def _rate(metric: str, labels: str = "", by: str = "") -> str:
    """The rate of a counter a second, summed over all instances."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({_series(metric, labels)}[$__rate_interval]))"


def _gauge(metric: str, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} ({_series(metric)})"


def _series(metric: str, labels: str = "") -> str:
    chosen = 'instance=~"$instance"'
    return f"{metric}{{{', '.join([chosen, labels] if labels else [chosen])}}}"


def _quantiles(metric: str) -> dict[str, str]:
    rate = _rate(f"{metric}_bucket", by="le")
    return {name: f"histogram_quantile({q}, {rate})" for name, q in _QUANTILES.items()}


def _p90(metric: str, by: str) -> str:
    return f"histogram_quantile(0.9, {_rate(f'{metric}_bucket', by=f'le, {by}')})"


def _tgi(metric: str, labels: str = "") -> str:
    chosen = 'container="$service"'
    return f"{metric}{{{', '.join([labels, chosen] if labels else [chosen])}}}"


def _tgi_quantiles(metric: str, labels: str = "") -> dict[str, str]:
    rate = f"sum by (le) (rate({_tgi(f'{metric}_bucket', labels)}[10m]))"
    return {name: f"histogram_quantile({q}, {rate})" for name, q in _QUANTILES.items()}


_DECODE, _PREFILL = 'method="decode"', 'method="prefill"'

ROWS = (
    Row(
        "Traffic",
        (
            Panel(
                "Requests a second",
                "reqps",
                {"asked": _rate("tgi_request_count"), "answered": _rate("tgi_request_success")},
            ),
            Panel(
                "Tokens a second",
                "short",
                {
                    "generated": _rate("tgi_generated_tokens_total"),
                    "prompt, {{source}}": _rate("tgi_prompt_tokens_total", by="source"),
                },
                "Prompt tokens by where their KV came from",
            ),
            Panel(
                "Tokens of a request, median",
                "short",
                {
                    "prompt": _quantiles("tgi_request_input_length")["p50"],
                    "generated": _quantiles("tgi_request_generated_tokens")["p50"],
                },
            ),
        ),
    ),
    Row(
        "Latency",
        (
            Panel("Time to first token", "s", _quantiles("tgi_time_to_first_token_seconds")),
            Panel("Time between tokens", "s", _quantiles("tgi_inter_token_latency_seconds")),
            Panel("Whole request", "s", _quantiles("tgi_request_duration")),
        ),
    ),
    Row(
        "Queue",
        (
            Panel(
                "Waiting and running",
                "short",
                {
                    "waiting": _gauge("tgi_requests_waiting"),
                    "running": _gauge("tgi_requests_running"),
                },
            ),
            Panel("Time in the queue", "s", _quantiles("tgi_request_queue_duration")),
            Panel("Time in validation", "s", _quantiles("tgi_request_validation_duration")),
        ),
    ),
    Row(
        "Batch",
        (
            Panel(
                "Fill: tokens of a step / its budget",
                "percentunit",
                _quantiles("tgi_batch_fill_tokens_ratio"),
            ),
            Panel(
                "Fill: sequences of a step / max batch size",
                "percentunit",
                _quantiles("tgi_batch_fill_sequences_ratio"),
            ),
            Panel(
                "Size",
                "short",
                {
                    "sequences": _gauge("tgi_batch_current_size"),
                    "joined in one step, p90": _quantiles("tgi_batch_next_size")["p90"],
                },
            ),
        ),
    ),
    Row(
        "KV cache",
        (
            Panel(
                "Blocks",
                "short",
                {
                    "used": _gauge("tgi_kv_blocks_used"),
                    "cached": _gauge("tgi_kv_blocks_cached"),
                    "capacity": _gauge("tgi_kv_blocks_capacity"),
                },
                "cached: kept only for the prefix cache, given up when they are needed",
            ),
            Panel(
                "Share of the looked-up tokens that the prefix cache had",
                "percentunit",
                {
                    "hits": f"{_rate('tgi_prefix_hit_tokens_total')}"
                    f" / {_rate('tgi_prefix_lookup_tokens_total')}"
                },
            ),
            Panel("Preemptions a second", "short", {"preemptions": _rate("tgi_preemptions_total")}),
        ),
    ),
    Row(
        "Steps",
        (
            Panel(
                "Duration of a step by kind, p90",
                "s",
                {"{{kind}}": _p90("tgi_step_duration_seconds", by="kind")},
            ),
            Panel(
                "Steps a second",
                "short",
                {"{{kind}}": _rate("tgi_step_duration_seconds_count", by="kind")},
            ),
            Panel(
                "Share of the memory's bandwidth that decoding uses",
                "percentunit",
                {"{{instance}}": _series("tgi_memory_bandwidth_used_ratio")},
                "Bytes read / device time / bandwidth measured at warm-up",
            ),
        ),
    ),
    Row(
        "Failures",
        (
            Panel(
                "Failures a second",
                "short",
                {
                    "{{err}}": _rate("tgi_request_failure", by="err"),
                    "step, {{method}}": _rate("tgi_batch_inference_failure", by="method"),
                },
            ),
            Panel(
                "Shards",
                "short",
                {
                    "rank {{rank}} up": f"min by (rank) ({_series('tgi_shard_up')})",
                    "rank {{rank}} restarts": _gauge("tgi_shard_restarts_total", by="rank"),
                },
            ),
            Panel(
                "Spans dropped a second",
                "short",
                {"spans": _rate("tgi_trace_spans_dropped_total")},
                "Spans that could not be given to the trace collector",
            ),
        ),
    ),
    Row(
        "As TGI's dashboard asks",
        (
            Panel(
                "Time to first token (queue + prefill)",
                "s",
                {
                    "queue": _tgi_quantiles("tgi_request_queue_duration")["p50"],
                    "prefill": _tgi_quantiles("tgi_batch_inference_duration", _PREFILL)["p50"],
                },
            ),
            Panel(
                "Time per token",
                "s",
                _tgi_quantiles("tgi_request_mean_time_per_token_duration"),
            ),
            Panel("Request", "s", _tgi_quantiles("tgi_request_duration")),
            Panel(
                "Requests in a minute",
                "short",
                {
                    "asked": f"sum(increase({_tgi('tgi_request_count')}[1m]))",
                    "answered": f"sum(increase({_tgi('tgi_request_success')}[1m]))",
                    "{{err}}": f"sum(increase({_tgi('tgi_request_failure')}[1m])) by (err)",
                },
            ),
            Panel(
                "Generated tokens of a request",
                "short",
                {
                    **_tgi_quantiles("tgi_request_generated_tokens"),
                    "mean": f"sum(rate({_tgi('tgi_request_generated_tokens_sum')}[10m])"
                    f" / rate({_tgi('tgi_request_generated_tokens_count')}[10m]))",
                },
            ),
            Panel("Prompt tokens", "short", _tgi_quantiles("tgi_request_input_length")),
            Panel("Queue time", "s", _tgi_quantiles("tgi_request_queue_duration")),
            Panel("Queue size", "short", {"size": f"sum({_tgi('tgi_queue_size')})"}),
            Panel("Speculated tokens", "short", _tgi_quantiles("tgi_request_skipped_tokens")),
            Panel(
                "Batch",
                "short",
                {
                    "size": f"avg({_tgi('tgi_batch_current_size')})",
                    "tokens": f"avg({_tgi('tgi_batch_current_max_tokens')})",
                },
            ),
            Panel(
                "Joins by reason",
                "short",
                {"{{reason}}": f"sum(increase({_tgi('tgi_batch_concat')}[1m])) by (reason)"},
            ),
            Panel(
                "Joining a batch",
                "s",
                _tgi_quantiles("tgi_batch_concat_duration", _DECODE),
            ),
            Panel("Prefill", "s", _tgi_quantiles("tgi_batch_inference_duration", _PREFILL)),
            Panel("Decode", "s", _tgi_quantiles("tgi_batch_inference_duration", _DECODE)),
            Panel("Forward", "s", _tgi_quantiles("tgi_batch_forward_duration", _DECODE)),
            Panel("Sampling", "s", _tgi_quantiles("tgi_batch_decode_duration", _DECODE)),
            Panel("Filtering", "s", _tgi_quantiles("tgi_batch_filter_duration", _DECODE)),
        ),
        collapsed=True,
    ),
)


def _panel(panel: Panel, number: int, place: int, top: int) -> dict[str, Any]:
    line, column = divmod(place, _PANELS_A_LINE)
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _DATASOURCE,
        "gridPos": {
            "h": _HEIGHT,
            "w": _WIDTH,
            "x": column * _WIDTH,
            "y": top + line * _HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"calcs": ["lastNotNull"], "displayMode": "list"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def _rows() -> list[dict[str, Any]]:
    """Headings and panels as a flat list; a collapsed heading contains its own panels."""
    made: list[dict[str, Any]] = []
    number, top = 1, 0
    for row in ROWS:
        panels = [
            _panel(panel, number + 1 + place, place, top + 1)
            for place, panel in enumerate(row.panels)
        ]
        made.append(
            {
                "id": number,
                "type": "row",
                "title": row.title,
                "collapsed": row.collapsed,
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": top},
                "panels": panels if row.collapsed else [],
            }
        )
        number += 1 + len(panels)
        top += 1
        if not row.collapsed:
            made += panels
            top += -(-len(panels) // _PANELS_A_LINE) * _HEIGHT
    return made


def _variable(name: str, label: str, *, multi: bool) -> dict[str, Any]:
    """A variable whose choices are the values of a label of the scraped servers."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": _DATASOURCE,
        "query": {"query": f"label_values(tgi_request_count, {name_of_label(name)})", "refId": "v"},
        "refresh": 2,
        "includeAll": multi,
        "multi": multi,
        "current": {"text": "All", "value": "$__all"} if multi else {},
    }


def name_of_label(variable: str) -> str:
    """The label that a variable chooses from; TGI's dashboard says service and means container."""
    return "container" if variable == "service" else variable


def dashboard() -> dict[str, Any]:
    """The whole dashboard, as Grafana 10 and later read it."""
    return {
        "uid": "kagami",
        "title": "Kagami",
        "tags": ["kagami", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {
                    "type": "datasource",
                    "name": "datasource",
                    "label": "Prometheus",
                    "query": "prometheus",
                },
                _variable("instance", "instance", multi=True),
                _variable("service", "container (TGI's row)", multi=False),
            ]
        },
        "panels": _rows(),
    }


def text() -> str:
    """The file's text: one panel a line, so that a diff shows which panel changed."""
    whole = dashboard()
    panels = ",\n  ".join(json.dumps(panel) for panel in whole.pop("panels"))
    head = json.dumps(whole, indent=1)
    return f'{head.removesuffix("}").rstrip()},\n "panels": [\n  {panels}\n ]\n}}\n'


if __name__ == "__main__":
    TARGET.write_text(text())
